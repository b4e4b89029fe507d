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
from anymamba.base.files import contents, own_folder, require_utf8, sweep
from anymamba.data.batches import Batch
from anymamba.data.tokenizer import FILE_NAME, Tokenizer
from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.training import lora
from anymamba.training.checkpoint import FOLDER, checkpoints, load_checkpoint, save_checkpoint
from anymamba.training.clock import Clock
from anymamba.training.config import TrainConfig
from anymamba.training.data import TrainingData, held_out_batches, open_data, run_tokenizer, training_batches
from anymamba.training.interrupts import PendingSignal, deferred_signals
from anymamba.training.masking import Masking
from anymamba.training.metrics import MetricsLog, plot_loss
from anymamba.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from anymamba.training.outline import outline, unit_of
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
from anymamba.training.steps import LossFunction, batch_loss, held_out_nats

BEST = "best"
"""The folder, in that of a run, of its best model."""

Sample = Callable[[LanguageModel, Tokenizer, TrainConfig], str]
"""Generates a text with the model of a run; it must leave the model and the random state as they are."""


def train(
    config: TrainConfig, run: str | Path, report: Report | None = None, sample: Sample | None = None
) -> TrainResult:
    """Train from the beginning into a new run folder.

    Args:
        sample: generates the text that is reported at each evaluation; None reports none.
    Raises FileExistsError if the folder is not empty, InUseError if another process is writing it, ValueError if the
    carried state would grow from batch to batch. An error before the first checkpoint leaves nothing; after any later
    one the last good checkpoint remains.
    """
    run, exists = Path(run), f"{run} exists; resume it (--resume {run}) or choose another folder (--out)"
    require_utf8(run)
    require_possible(config)
    if run.exists() and not run.is_dir():
        raise FileExistsError(exists)
    with own_folder(run, wait=0):
        if contents(run):
            raise FileExistsError(exists)
        try:
            trainer = _start(config, run, report or Silent(), sample)
        except BaseException:
            if not checkpoints(run):
                _delete_contents(run)
            raise
        return trainer.run_to_end()


def _start(config: TrainConfig, run: Path, report: Report, sample: Sample | None) -> _Trainer:
    """A new run with its first checkpoint."""
    tokenizer = run_tokenizer(config)
    config = complete(config, tokenizer)
    training, held_out = open_data(config, tokenizer, report.on_tables)
    write_config(run, config)
    return _Trainer(config, run, tokenizer, training, held_out, report, sample)


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
) -> TrainResult:
    """Resume a run from its newest checkpoint, or from its beginning if it has none yet.

    The result is bit-identical to that of a run without interruption.

    Args:
        sample: as in `train`.
        steps: a new number of steps in all, with which also a finished run goes on. The learning rate follows the
            schedule of a run of that length from here on. Defaults to the run's own.
        max_minutes: a new limit of the time in all; defaults to the run's own.
    Raises ValueError if the run has done that many steps or has used that time, FileNotFoundError if the folder is not
    a run, InUseError if another process is writing it, CheckpointError if the checkpoint is broken or the data has
    changed.
    """
    run = Path(run)
    require_utf8(run)
    config_path(run)
    with own_folder(run, wait=0):
        stored = read_config(run)
        config = dataclasses.replace(
            stored,
            steps=stored.steps if steps is None else steps,
            max_minutes=stored.max_minutes if max_minutes is None else max_minutes,
        )
        require_possible(config)
        report = report or Silent()
        tokenizer = run_tokenizer(config, run if (run / FILE_NAME).is_file() else None)  # since the first checkpoint
        training, held_out = open_data(config, tokenizer, report.on_tables)
        trainer = _Trainer(config, run, tokenizer, training, held_out, report, sample)
        if steps is not None or max_minutes is not None:
            trainer.require_more_to_do()
            write_config(run, config)
        return trainer.run_to_end()


class _Trainer:
    """A run in progress: what changes at each step, and how to save and restore it."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        tokenizer: Tokenizer,
        training: TrainingData,
        held_out: TrainingData | None,
        report: Report,
        sample: Sample | None,
    ) -> None:
        self.config, self.run, self.tokenizer, self.report, self.sample = config, run, tokenizer, report, sample
        self.training, self.held_out = training, held_out
        self.masking = Masking.of(tokenizer, config.seed) if config.objective == "mlm" else None
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.model = self._build_model()
        self.base = lora.base_digest(self.model) if config.lora is not None else None
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.progress = Progress()
        self.carried: LanguageModelState | None = None
        self.labels_per_byte = training.n_tokens / max(1, training.n_bytes)
        sweep(run / FOLDER)
        found = checkpoints(run)
        if found:
            self._restore(found[-1])
        self.log = MetricsLog(config, run, self.progress.step)
        self.seconds, self.timed_tokens = 0.0, 0
        self.clock = Clock(config.max_minutes, self.progress)
        if not found:
            self._checkpoint()
        elif self.progress.step >= config.steps:
            self._save_model()  # a run that was killed after its last checkpoint does not have it yet

    def _build_model(self) -> LanguageModel:
        config = self.config
        if config.start_from is not None:
            model = LanguageModel.from_pretrained(  # verified when the run was started
                config.start_from, device=config.device, dtype=torch.float32, verify=False
            )
        else:
            model = LanguageModel(config.model, device=config.device)
        if config.lora is not None:
            lora.add_adapters(model, config)
        model.activation_checkpointing = config.activation_checkpointing
        return model.train()

    # ------------------------------------------------------------------------------------------ the loop

    def run_to_end(self) -> TrainResult:
        """Train until the last step; Ctrl-C and SIGTERM take effect after a checkpoint."""
        loss: LossFunction = self.model.loss
        if self.config.compile:
            loss = torch.compile(loss)
        done, held_out = self.progress.step, self.held_out
        self.report.on_start(outline(self.config, self.model, self.training, held_out, done))
        with deferred_signals() as pending:
            stream = self._stream()
            try:
                self._steps(stream, loss, pending)
            finally:
                stream.close()  # type: ignore[attr-defined]
                self.log.close()
        return self._result()

    def _stream(self) -> Iterator[Batch]:
        return training_batches(self.training, self.config, self.tokenizer.eos_id, self.progress.position)

    def _steps(self, stream: Iterator[Batch], loss: LossFunction, pending: PendingSignal) -> None:
        config, progress = self.config, self.progress
        last = progress.step >= config.steps or self.clock.is_up()
        while not last:
            started = time.perf_counter()
            metrics = self._one_step(stream, loss)
            self.seconds += time.perf_counter() - started
            self.timed_tokens += config.tokens_per_step
            last = progress.step == config.steps or self.clock.is_up()
            self._record(metrics, write=last or progress.step % config.log_every == 0)
            if last or progress.step % config.eval_every == 0:
                self._evaluate()
            if last or pending.number is not None or progress.step % config.checkpoint_every == 0:
                self._checkpoint()
            if pending.number is not None:
                return

    def _one_step(self, stream: Iterator[Batch], loss: LossFunction) -> dict[str, Any]:
        """One optimizer step over `accumulation` batches; a non-finite one changes only the counters."""
        config, model, progress = self.config, self.model, self.progress
        rate = learning_rate(config.optimizer, progress.step + 1, self.clock.affordable(config.steps))
        with record_function("batches"):  # names of the parts of a step in a trace
            batches = [self._batch(stream, i) for i in range(config.accumulation)]
        count = max(1, sum(int((batch.labels != -100).sum()) for batch in batches))
        carried, nats = self.carried, 0.0
        device_type = model.embedding.weight.device.type
        for batch in batches:
            autocast = torch.autocast(device_type, torch.bfloat16, enabled=config.precision == "bfloat16")
            with record_function("forward"), autocast:
                batch_nats, _, state = batch_loss(model, loss, batch, carried)
            with record_function("backward"):
                (batch_nats / count).backward()
            nats += batch_nats.item()
            carried = state if config.carries_state else None
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm).item()
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
        return batch if self.masking is None else self.masking.apply(batch, 1, self.progress.step, index)

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
            self.report.on_sample(self.progress.step, self.sample(self.model, self.tokenizer, self.config))

    def _measure(self, held_out: TrainingData) -> None:
        config, progress = self.config, self.progress
        nats = held_out_nats(
            self.model,
            held_out_batches(held_out, config, self.tokenizer.eos_id),
            carry_state=config.carries_state,
            masking=self.masking,
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
        )

    # ------------------------------------------------------------------------------------------ saving

    def _checkpoint(self) -> None:
        self.log.flush()
        step = self.progress.step
        tensors, values = snapshot(self.model, self.optimizer, self.carried, self.progress)
        values |= {"data": self._data_identity(), "base": self.base}
        folder = save_checkpoint(self.run, step, tensors, values, self.config.keep_checkpoints)
        self._save_model()
        self.report.on_checkpoint(step, folder)

    def _save_model(self, folder: Path | None = None) -> None:
        """Replace the model in a folder, that of the run by default, whose plot is then drawn, too."""
        lora.save_model(self.model, folder or self.run, self.tokenizer)
        if folder is None and self.progress.step:
            plot_loss(self.run)

    def _restore(self, folder: Path) -> None:
        tensors, values = load_checkpoint(folder)
        if values["data"] != self._data_identity():
            raise CheckpointError(
                f"the training data has changed since {folder}: it had {values['data']}, now {self._data_identity()}; "
                f"restore it, or fine-tune from the run's weights (--from {self.run})"
            )
        if values.get("base") != self.base:
            raise CheckpointError(
                f"{self.config.start_from} has changed since {folder} was written, whose adapters belong to it; "
                "restore it"
            )
        try:
            self.carried, self.progress = restore(tensors, values, self.model, self.optimizer)
        except RuntimeError as error:
            raise CheckpointError(f"{folder} does not fit the model in {TRAIN_CONFIG}: {error}") from error

    def _data_identity(self) -> dict[str, int]:
        return {"documents": self.training.n_documents, "tokens": self.training.n_tokens}
