"""Training a language model: a run folder that can be killed at any moment and resumed bit for bit.

runs/x/config.json model.safetensors tokenizer.json     the model, replaced after each checkpoint
runs/x/adapter/                                         its LoRA adapters; the model has them merged
runs/x/best/                                            the model with the lowest held-out loss so far
runs/x/train_config.json metrics.jsonl loss.png tensorboard/
runs/x/checkpoints/step-00001000/                       weights, optimizer, random state, data position
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from anymamba.base.errors import CheckpointError
from anymamba.base.files import contents, require_utf8, sweep
from anymamba.data.batches import Batch
from anymamba.data.tokenizer import FILE_NAME, Tokenizer
from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.training import lora
from anymamba.training.checkpoint import FOLDER, check_files, checkpoints, load_checkpoint
from anymamba.training.clock import Clock
from anymamba.training.config import ParallelConfig, TrainConfig
from anymamba.training.data import (
    TrainingData,
    held_out_batches,
    is_dna,
    open_data,
    require_enough_steps,
    run_tokenizer,
    training_batches,
    with_steps_of_epochs,
)
from anymamba.training.genomes import GenomeData
from anymamba.training.given_genomes import Given
from anymamba.training.interrupts import PendingSignal, deferred_signals
from anymamba.training.masking import Masking
from anymamba.training.metrics import MetricsLog, NoLog, plot_loss
from anymamba.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from anymamba.training.outline import outline, unit_of
from anymamba.training.parallel.agreement import data_values, flat_values, of_data
from anymamba.training.parallel.launch import is_restarted, note_launch
from anymamba.training.parallel.processes import Processes
from anymamba.training.parallel.start import processes_of
from anymamba.training.repeating import prepare, repeatable
from anymamba.training.report import Report, Silent, TrainResult
from anymamba.training.run_config import (
    TRAIN_CONFIG,
    complete,
    config_path,
    read_config,
    require_possible,
    write_config,
)
from anymamba.training.snapshot import Progress, restore, snapshot
from anymamba.training.steps import LossFunction, batch_loss, held_out_nats, states_of_batches

BEST = "best"
"""The folder, in that of a run, of its best model."""

Sample = Callable[[LanguageModel, Tokenizer, TrainConfig], str]
"""Generates a text with the model of a run; it must leave the model and the random state as they are."""


def train(
    config: TrainConfig,
    run: str | Path,
    report: Report | None = None,
    sample: Sample | None = None,
    *,
    by_epochs: bool = False,
    genomes: Given | None = None,
) -> TrainResult:
    """Train from the beginning into a new run folder.

    Under torchrun, all processes call it. What torchrun starts again goes on from the last checkpoint.

    Args:
        sample: generates the text that is reported at each evaluation; None reports none.
        by_epochs: take, in place of the config's steps, those of a length warm-up with as many epochs at the context
            as at each length before it. Without a length warm-up the steps are the config's.
        genomes: open genomes to train on in place of files: `Genome`, `pyfaidx.Fasta` or another mapping from names to
            sequences, each alone or in a pair with its intervals. To resume the run they are given again.
    Raises FileExistsError if the folder is not empty, InUseError if another process is writing it, ValueError if the
    carried state would grow from batch to batch. An error before the first checkpoint leaves nothing; after any later
    one the last good checkpoint remains.
    """
    run = Path(run)
    with processes_of(config, run, "train") as processes:
        restarted = processes.from_first(lambda: is_restarted(run, processes.launch))
        if restarted and processes.from_first((run / TRAIN_CONFIG).exists):
            return _resume(processes, read_config(run), run, report, sample, genomes=genomes)
        require_utf8(run)
        require_possible(config)
        if processes.is_first and run.exists() and not run.is_dir():
            raise FileExistsError(_exists(run))
        with processes.owning(run):
            if processes.is_first and restarted:
                _delete_contents(run)  # it was killed before it had a config
            if processes.is_first and contents(run):
                raise FileExistsError(_exists(run))
            try:
                trainer = _start(processes, config, run, report, sample, by_epochs, genomes)
            except BaseException:
                if processes.is_first and not checkpoints(run):
                    _delete_contents(run)
                raise
            return trainer.run_to_end()


def _exists(run: Path) -> str:
    return f"{run} exists; resume it (--resume {run}) or choose another folder (--out)"


def _start(
    processes: Processes,
    config: TrainConfig,
    run: Path,
    report: Report | None,
    sample: Sample | None,
    by_epochs: bool,
    genomes: Given | None,
) -> _Trainer:
    """A new run with its first checkpoint."""
    tokenizer = run_tokenizer(config, genomes=genomes)
    config = complete(config, tokenizer, dna=is_dna(config, genomes))
    return _Trainer(processes, config, run, tokenizer, report, sample, by_epochs, genomes)


def _delete_contents(run: Path) -> None:
    for path in contents(run):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # Windows does not delete an open file
                path.unlink()


def resume(
    run: str | Path,
    report: Report | None = None,
    sample: Sample | None = None,
    *,
    steps: int | None = None,
    max_minutes: float | None = None,
    parallel: ParallelConfig | None = None,
    genomes: Given | None = None,
) -> TrainResult:
    """Resume a run from its newest checkpoint, or from its beginning if it has none yet.

    The result is bit-identical to that of a run without interruption.

    Args:
        sample: as in `train`.
        steps: a new number of steps in all, with which also a finished run goes on. The learning rate follows the
            schedule of a run of that length from here on. Defaults to the run's own.
        max_minutes: a new limit of the time in all; defaults to the run's own.
        parallel: other degrees of parallelism, for another number of processes; defaults to the run's own. Results are
            then equal but for rounding.
        genomes: those that the run was started with.
    Raises ValueError if the run has done that many steps or has used that time, FileNotFoundError if the folder is not
    a run, InUseError if another process is writing it, CheckpointError if the checkpoint is broken or the data has
    changed.
    """
    run = Path(run)
    require_utf8(run)
    config_path(run)
    stored = read_config(run)
    config = dataclasses.replace(
        stored,
        steps=stored.steps if steps is None else steps,
        max_minutes=stored.max_minutes if max_minutes is None else max_minutes,
        parallel=parallel or stored.parallel,
    )
    longer = steps is not None or max_minutes is not None
    with processes_of(config, run, "resume") as processes:
        # what torchrun starts again may have done all steps before a rank died
        longer = longer and not processes.from_first(lambda: is_restarted(run, processes.launch))
        return _resume(processes, config, run, report, sample, longer, genomes)


def _resume(
    processes: Processes,
    config: TrainConfig,
    run: Path,
    report: Report | None,
    sample: Sample | None,
    longer: bool = False,
    genomes: Given | None = None,
) -> TrainResult:
    """Resume a run with a config that may differ from its own in what `resume` changes."""
    require_possible(config)
    with processes.owning(run):
        own = run if (run / FILE_NAME).is_file() else None  # since the first checkpoint
        tokenizer = run_tokenizer(config, own, genomes)
        trainer = _Trainer(processes, config, run, tokenizer, report, sample, genomes=genomes)
        if longer:
            trainer.require_more_to_do()
        trainer.note_start()
        return trainer.run_to_end()


class _Trainer:
    """A run in progress: what changes at each step, and how to save and restore it."""

    def __init__(
        self,
        processes: Processes,
        config: TrainConfig,
        run: Path,
        tokenizer: Tokenizer,
        report: Report | None,
        sample: Sample | None,
        by_epochs: bool = False,
        genomes: Given | None = None,
    ) -> None:
        self.processes, self.run, self.tokenizer, self.sample = processes, run, tokenizer, sample
        self.report: Report = report if report is not None and processes.is_first else Silent()
        processes.require_equal("configs", flat_values(config))
        self.training, self.held_out = processes.in_turn(
            lambda: open_data(config, tokenizer, self.report.on_tables, genomes)
        )
        processes.require_equal("data", data_values(self.training, self.held_out))
        if by_epochs:
            config, self.training = with_steps_of_epochs(config, self.training)
        require_enough_steps(config, self.training)
        self.data = of_data(self.training)
        self.config = config
        found = processes.from_first(self._found)
        if not found:
            self.note_start()
        self.masking = Masking.of(tokenizer, config.seed) if config.objective == "mlm" else None
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.deterministic:
            prepare()
        torch.manual_seed(config.seed)
        source = self._build_model(processes.device) if processes.is_first else None
        self.base = processes.from_first(lambda: lora.base_digest(source) if source and config.lora else None)
        self.model = processes.spread(source, lambda: self._build_model("meta"))
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.progress = Progress()
        self.carried: LanguageModelState | None = None
        self.labels_per_byte = self.training.n_tokens / max(1, self.training.n_bytes)
        if found:
            self._restore(found[-1])
        self.log = MetricsLog(config, run, self.progress.step) if processes.is_first else NoLog()
        self.seconds, self.timed_tokens = 0.0, 0
        self.clock = Clock(config.max_minutes, self.progress, processes.from_first)
        if not found:
            self._checkpoint()
            processes.written()  # an error here leaves no folder
        elif self.progress.step >= config.steps:
            self._save_model()  # a run that was killed after its last checkpoint does not have it yet

    def _found(self) -> list[Path]:
        sweep(self.run / FOLDER)
        return checkpoints(self.run)

    def note_start(self) -> None:
        """Write the config, and which launcher has started this process."""
        if self.processes.is_first:
            note_launch(self.run, self.processes.launch)
            write_config(self.run, self.config)

    def _build_model(self, device: str) -> LanguageModel:
        config = self.config
        if config.start_from is not None and device != "meta":
            model = LanguageModel.from_pretrained(  # verified when the run was started
                config.start_from, device=device, dtype=torch.float32, verify=False
            )
        else:
            model = LanguageModel(config.model, device=device)
        if config.lora is not None:
            lora.add_adapters(model, config)
        model.activation_checkpointing = config.activation_checkpointing
        return model.to(device).train()  # adapters are made on the CPU

    # ------------------------------------------------------------------------------------------ the loop

    def run_to_end(self) -> TrainResult:
        """Train until the last step; Ctrl-C and SIGTERM take effect after a checkpoint."""
        loss = self.processes.loss(self.model)
        done, held_out = self.progress.step, self.held_out
        self.report.on_start(outline(self.config, self.model, self.training, held_out, done))
        with deferred_signals(launched=self.processes.size > 1) as pending:
            stream = self._stream()
            try:
                self._steps(stream, loss, pending)
                self.processes.written()
            finally:
                stream.close()  # type: ignore[attr-defined]
                self.log.close()
        return self._result()

    def _stream(self) -> Iterator[Batch]:
        return training_batches(
            self.training,
            self.config,
            self.tokenizer.eos_id,
            self.progress.position,
            rank=self.processes.dp_rank,
            world_size=self.processes.dp_size,
        )

    def _steps(self, stream: Iterator[Batch], loss: LossFunction, pending: PendingSignal) -> None:
        config, progress = self.config, self.progress
        last = progress.step >= config.steps or self.clock.is_up()
        while not last:
            started = time.perf_counter()
            with repeatable(config.deterministic):
                metrics = self._one_step(stream, loss)
            self.seconds += time.perf_counter() - started
            self.timed_tokens += config.tokens_per_step
            last = progress.step == config.steps or self.clock.is_up()
            self._record(metrics, write=last or progress.step % config.log_every == 0)
            if last or progress.step % config.eval_every == 0:
                self._evaluate()
            if number := int(self.processes.largest(pending.number or 0)):
                pending.number = number
            stop = bool(number)  # a signal that arrives from here on is seen by all ranks after the next step
            if last or stop or progress.step % config.checkpoint_every == 0:
                self._checkpoint()
            self.processes.poll()
            if stop:
                return

    def _one_step(self, stream: Iterator[Batch], loss: LossFunction) -> dict[str, Any]:
        """One optimizer step over `accumulation` batches; a non-finite one changes only the counters."""
        config, model, progress, processes = self.config, self.model, self.progress, self.processes
        rate = learning_rate(config.optimizer, progress.step + 1, self.clock.affordable(config.steps))
        with record_function("batches"):  # names of the parts of a step in a trace
            batches = [self._batch(stream, i) for i in range(config.accumulation)]
        [labels] = processes.sums(sum(int((batch.labels != -100).sum()) for batch in batches))
        count = max(1, labels / processes.cp_size)  # each rank of a sequence has counted all its labels
        carried, nats = self.carried, 0.0
        device_type = model.embedding.weight.device.type
        for batch in batches:
            autocast = torch.autocast(device_type, torch.bfloat16, enabled=config.precision == "bfloat16")
            with record_function("forward"), autocast, states_of_batches(config.carries_state):
                batch_nats, _, state = batch_loss(model, loss, batch, carried)
            processes.reduce_gradients(model, batch is batches[-1])
            with record_function("backward"):
                (batch_nats / count).backward()
            nats += batch_nats.item()
            carried = state if config.carries_state else None
        [nats] = processes.sums(nats)
        norm = processes.clip(model, config.optimizer.clip_norm)
        finite = math.isfinite(nats) and math.isfinite(norm)
        if finite:
            set_learning_rate(self.optimizer, rate)
            with record_function("optimizer"):
                self.optimizer.step()
        self.optimizer.zero_grad()
        self.carried = carried if finite else None
        progress.step += 1
        progress.position = batches[-1].position
        progress.tokens += config.tokens_per_step
        progress.skipped += not finite
        progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
        if progress.skipped_in_a_row >= config.max_nonfinite:
            raise RuntimeError(
                f"the loss or the gradient was not finite in {progress.skipped_in_a_row} steps in a row, the last is "
                f"step {progress.step}; resuming from the last checkpoint in {self.run} would end the same way: start "
                "a new run with a lower learning rate or a longer warm-up"
            )
        return {"nats_per_token": nats / count if finite else None, "learning_rate": rate, "gradient_norm": norm}

    def _batch(self, stream: Iterator[Batch], index: int) -> Batch:
        """The next batch, the one of this index in its step."""
        batch = next(stream)
        if self.masking is None:
            return batch
        rows = (self.processes.dp_rank, self.processes.dp_size)
        return self.masking.apply(batch, 1, self.progress.step, index, rows=rows)

    def _record(self, metrics: dict[str, Any], *, write: bool) -> None:
        nats, progress, steps = metrics["nats_per_token"], self.progress, self.clock.affordable(self.config.steps)
        if nats is not None:
            progress.bits_per_byte = self._bits_per_byte(nats)
        speed = self.timed_tokens / max(self.seconds, 1e-9)
        left = (steps - progress.step) * self.config.tokens_per_step / speed
        shown = {"step": progress.step, "steps": steps, "bits_per_byte": progress.bits_per_byte}
        self.report.on_step({**shown, "tokens_per_second": speed, "seconds_left": left, "skipped": progress.skipped})
        if write:
            norm = metrics["gradient_norm"]
            self.log.append(
                {
                    "step": progress.step,
                    "kind": "train",
                    "bits_per_byte": progress.bits_per_byte,
                    "nats_per_token": nats,
                    "learning_rate": metrics["learning_rate"],
                    "gradient_norm": norm if math.isfinite(norm) else None,
                    "tokens": progress.tokens,
                    "skipped": progress.skipped,
                    "tokens_per_second": speed,
                }
            )

    def _bits_per_byte(self, nats_per_token: float) -> float:
        return nats_per_token / math.log(2) * self.labels_per_byte

    def _evaluate(self) -> None:
        """Measure the held-out loss, keep the model if it is the best so far, and show what it writes."""
        if self.held_out is not None and self.config.eval_tokens:
            self._measure(self.held_out)
        if self.sample is not None and self.config.sample_tokens and self.masking is None:
            model = self.processes.whole(self.model)
            if self.processes.is_first:
                self.report.on_sample(self.progress.step, self.sample(model, self.tokenizer, self.config))

    def _measure(self, held_out: TrainingData) -> None:
        config, progress = self.config, self.progress
        nats = held_out_nats(
            self.model,
            held_out_batches(held_out, config, self.tokenizer.eos_id),
            carry_state=config.carries_state,
            masking=self.masking,
            processes=self.processes,
        )
        bits = progress.held_out_bits_per_byte = self._bits_per_byte(nats)
        line = {"step": progress.step, "kind": "eval", "bits_per_byte": bits, "nats_per_token": nats}
        self.log.append(line)
        self.report.on_evaluation(line)
        if math.isfinite(bits) and (progress.best_bits_per_byte is None or bits < progress.best_bits_per_byte):
            progress.best_step, progress.best_bits_per_byte = progress.step, bits
            if config.keep_best:
                self._save_model(self.run / BEST)

    def require_more_to_do(self) -> None:
        """Raise ValueError if the run is at its end."""
        done, steps, minutes = self.progress.step, self.config.steps, self.config.max_minutes
        if done < steps and not self.clock.is_up():
            return
        self.log.close()
        if done >= steps:
            raise ValueError(f"{self.run} has done {done:,} steps; give more than that with --steps, got {steps:,}")
        raise ValueError(f"{self.run} has used its {minutes:g} minutes; give more than that with --max-minutes")

    def _result(self) -> TrainResult:
        progress = self.progress
        genomes = self.training if isinstance(self.training, GenomeData) else None
        held_out = self.held_out if isinstance(self.held_out, GenomeData) else None
        return TrainResult(
            run=str(self.run),
            steps=progress.step,
            tokens=progress.tokens,
            tokens_per_second=self.timed_tokens / self.seconds if self.seconds else 0.0,
            bits_per_byte=progress.bits_per_byte,
            held_out_bits_per_byte=progress.held_out_bits_per_byte,
            skipped=progress.skipped,
            n_parameters=self.model.n_parameters(),
            best_step=progress.best_step,
            best_held_out_bits_per_byte=progress.best_bits_per_byte,
            unit=unit_of(self.training),
            dropped_windows=None if progress.position is None else progress.position.get("dropped"),
            dropped_held_out_windows=None if held_out is None else held_out.n_dropped,
            notes=() if genomes is None else genomes.reading_notes(held_out),
        )

    # ------------------------------------------------------------------------------------------ saving

    def _checkpoint(self) -> None:
        self.log.flush()
        step = self.progress.step
        tensors, values = snapshot(self.model, self.optimizer, self.carried, self.progress)
        values |= {"data": self.data, "base": self.base}
        keep = self.config.keep_checkpoints
        self.processes.save(self.run, step, tensors, values, keep, lambda to: self.report.on_checkpoint(step, to))
        self._save_model()

    def _save_model(self, folder: Path | None = None) -> None:
        """Replace the model in a folder, that of the run by default, whose plot is then drawn, too."""
        model, with_plot = self.processes.whole(self.model), folder is None and self.progress.step > 0

        def save() -> None:
            lora.save_model(model, folder or self.run, self.tokenizer)
            if with_plot:
                plot_loss(self.run)

        if self.processes.is_first:
            self.processes.write(save)

    def _restore(self, folder: Path) -> None:
        self.processes.from_first(lambda: check_files(folder))
        try:
            tensors, values = load_checkpoint(folder, self.processes.empty(self.model), checked=True)
        except CheckpointError:
            raise
        except RuntimeError as error:
            raise CheckpointError(f"{folder} does not fit the model in {TRAIN_CONFIG}: {error}") from error
        had, now = values["data"], self.data
        if any(now[name] != value for name, value in had.items() if name in now):
            raise CheckpointError(
                f"the training data has changed since {folder}: it had {had}, now {now}; "
                f"restore it, or fine-tune from the run's weights (--from {self.run})"
            )
        if values.get("base") != self.base:
            raise CheckpointError(
                f"{self.config.start_from} has changed since {folder} was written, whose adapters belong to it; "
                "restore it"
            )
        try:
            tensors = self.processes.incoming(tensors)
            self.carried, self.progress = restore(tensors, values, self.model, self.optimizer)
        except RuntimeError as error:
            raise CheckpointError(f"{folder} does not fit the model in {TRAIN_CONFIG}: {error}") from error
