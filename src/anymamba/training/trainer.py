"""Training a language model: a run folder that can be killed at any moment and resumed bit for bit.

runs/x/config.json model.safetensors tokenizer.json     the model, replaced after each checkpoint
runs/x/train_config.json metrics.jsonl loss.png tensorboard/
runs/x/checkpoints/step-00001000/                       weights, optimizer, random state, data position
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from anymamba.base.errors import CheckpointError
from anymamba.base.files import contents, own_folder, require_utf8, sweep, write_json
from anymamba.base.schema import config_from_dict
from anymamba.data.batches import Batch, BatchStream
from anymamba.data.table import TokenTable
from anymamba.data.tokenizer import FILE_NAME, ByteTokenizer, Tokenizer
from anymamba.models.checkpoints import find_tokenizer
from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.models.mixers import growing_mixers
from anymamba.training.checkpoint import FOLDER, checkpoints, load_checkpoint, refuse_pickles, save_checkpoint
from anymamba.training.clock import Clock
from anymamba.training.config import TrainConfig, config_values, file_values
from anymamba.training.interrupts import PendingSignal, deferred_signals
from anymamba.training.metrics import MetricsLog, plot_loss
from anymamba.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from anymamba.training.report import Report, Silent, TrainResult
from anymamba.training.snapshot import Progress, restore, snapshot
from anymamba.training.steps import LossFunction, batch_loss, held_out_nats
from anymamba.training.tables import open_tables

TRAIN_CONFIG = "train_config.json"


def train(config: TrainConfig, run: str | Path, report: Report | None = None) -> TrainResult:
    """Train from the beginning into a new run folder.

    Raises FileExistsError if the folder is not empty, InUseError if another process is writing it, ValueError if the
    carried state would grow from batch to batch. An error before the first checkpoint leaves nothing; after any later
    one the last good checkpoint remains.
    """
    run, exists = Path(run), f"{run} exists; resume it (--resume {run}) or choose another folder (--out)"
    require_utf8(run)
    _require_bounded_state(config)
    if run.exists() and not run.is_dir():
        raise FileExistsError(exists)
    with own_folder(run, wait=0):
        if contents(run):
            raise FileExistsError(exists)
        try:
            trainer = _start(config, run, report or Silent())
        except BaseException:
            if not checkpoints(run):
                _delete_contents(run)
            raise
        return trainer.run_to_end()


def _start(config: TrainConfig, run: Path, report: Report) -> _Trainer:
    """A new run with its first checkpoint."""
    tokenizer = find_tokenizer(config.start_from, config.data.tokenizer)
    config = _complete(config, tokenizer)
    training, held_out = open_tables(config.data, tokenizer, report.on_tables)
    write_json(run / TRAIN_CONFIG, file_values(config))
    return _Trainer(config, run, tokenizer, training, held_out, report)


def _delete_contents(run: Path) -> None:
    for path in contents(run):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # Windows does not delete an open file
                path.unlink()


def _require_bounded_state(config: TrainConfig) -> None:
    growing = growing_mixers(config.model) if config.carry_state else ()
    if growing:
        raise ValueError(
            f"carry_state would let the caches of {', '.join(growing)} grow from batch to batch; set carry_state to "
            "false (--no-carry-state), or give attention a window (--model.attention.window)"
        )


def resume(run: str | Path, report: Report | None = None) -> TrainResult:
    """Resume a run from its newest checkpoint, or from its beginning if it has none yet.

    The result is bit-identical to that of a run without interruption. Raises FileNotFoundError if the folder is not a
    run, InUseError if another process is writing it, CheckpointError if the checkpoint is broken or the data has
    changed.
    """
    run = Path(run)
    require_utf8(run)
    _config_path(run)
    with own_folder(run, wait=0):
        config = read_config(run)
        report = report or Silent()
        own = run if (run / FILE_NAME).is_file() else config.data.tokenizer  # there since the first checkpoint
        tokenizer = find_tokenizer(config.start_from, own)
        training, held_out = open_tables(config.data, tokenizer, report.on_tables)
        return _Trainer(config, run, tokenizer, training, held_out, report).run_to_end()


def read_config(run: Path) -> TrainConfig:
    """The resolved config of a run folder."""
    path = _config_path(run)
    refuse_pickles(run)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return config_from_dict(TrainConfig, config_values(values, path) if isinstance(values, dict) else values)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _config_path(run: Path) -> Path:
    path = run / TRAIN_CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{run} is not a run folder: it has no {TRAIN_CONFIG}; start one with --out {run}")
    return path


def _complete(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """The config with the values that the tokenizer and the given weights decide."""
    if config.start_from is None:
        model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
        return dataclasses.replace(config, model=model)
    model = LanguageModel.from_pretrained(config.start_from, device="meta", verify=config.verify).config
    if tokenizer.vocab_size > model.padded_vocab_size:
        raise ValueError(
            f"{config.start_from} has a vocabulary of {model.vocab_size}, the tokenizer of {tokenizer.vocab_size}; "
            "give the model's own tokenizer (--tokenizer)"
        )
    data = config.data
    if data.tokenizer is None and not isinstance(tokenizer, ByteTokenizer):
        data = dataclasses.replace(data, tokenizer=config.start_from)
    return dataclasses.replace(config, model=model, data=data)


class _Trainer:
    """A run in progress: what changes at each step, and how to save and restore it."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        tokenizer: Tokenizer,
        training: TokenTable,
        held_out: TokenTable | None,
        report: Report,
    ) -> None:
        self.config, self.run, self.tokenizer, self.report = config, run, tokenizer, report
        self.training, self.held_out = training, held_out
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.model = self._build_model()
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.progress = Progress()
        self.carried: LanguageModelState | None = None
        self.labels_per_byte = training.n_tokens / max(1, training.n_bytes)
        sweep(run / FOLDER)
        found = checkpoints(run)
        if found:
            self._restore(found[-1])
        self.log = MetricsLog(run, self.progress.step)
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
        model.activation_checkpointing = config.activation_checkpointing
        return model.train()

    # ------------------------------------------------------------------------------------------ the loop

    def run_to_end(self) -> TrainResult:
        """Train until the last step; Ctrl-C and SIGTERM take effect after a checkpoint."""
        loss: LossFunction = self.model.loss
        if self.config.compile:
            loss = torch.compile(loss)
        with deferred_signals() as pending:
            stream = self._stream()
            try:
                self._steps(stream, loss, pending)
            finally:
                stream.close()  # type: ignore[attr-defined]
                self.log.close()
        return self._result()

    def _stream(self) -> Iterator[Batch]:
        config = self.config
        stream = BatchStream(
            self.training,
            batch_size=config.batch_size,
            context=config.context,
            eos_id=self.tokenizer.eos_id,
            seed=config.seed,
            workers=config.data.workers,
            piece=config.data.piece,
            position=self.progress.position,
        )
        return iter(stream)

    def _steps(self, stream: Iterator[Batch], loss: LossFunction, pending: PendingSignal) -> None:
        config, progress = self.config, self.progress
        while progress.step < config.steps and not self.clock.is_up():
            started = time.perf_counter()
            metrics = self._one_step(stream, loss)
            self.seconds += time.perf_counter() - started
            self.timed_tokens += config.tokens_per_step
            last = progress.step == config.steps or self.clock.is_up()
            self._record(metrics, write=last or progress.step % config.log_every == 0)
            if self.held_out is not None and (last or progress.step % config.eval_every == 0):
                self._evaluate(self.held_out)
            if last or pending.number is not None or progress.step % config.checkpoint_every == 0:
                self._checkpoint()
            if pending.number is not None:
                return

    def _one_step(self, stream: Iterator[Batch], loss: LossFunction) -> dict[str, Any]:
        """One optimizer step over `accumulation` batches; a non-finite one changes only the counters."""
        config, model, progress = self.config, self.model, self.progress
        rate = learning_rate(config.optimizer, progress.step + 1, self.clock.affordable(config.steps))
        with record_function("batches"):  # names of the parts of a step in a trace
            batches = [next(stream) for _ in range(config.accumulation)]
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
            carried = state if config.carry_state else None
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

    def _evaluate(self, table: TokenTable) -> None:
        config = self.config
        if config.eval_tokens == 0:
            return
        nats = held_out_nats(
            self.model,
            table,
            self.tokenizer.eos_id,
            batch_size=config.batch_size,
            context=config.context,
            max_tokens=config.eval_tokens,
            carry_state=config.carry_state,
        )
        self.progress.held_out_bits_per_byte = self._bits_per_byte(nats)
        line = {
            "step": self.progress.step,
            "kind": "eval",
            "bits_per_byte": self.progress.held_out_bits_per_byte,
            "nats_per_token": nats,
        }
        self.log.append(line)
        self.report.on_evaluation(line)

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
        )

    # ------------------------------------------------------------------------------------------ saving

    def _checkpoint(self) -> None:
        self.log.flush()
        step = self.progress.step
        tensors, values = snapshot(self.model, self.optimizer, self.carried, self.progress)
        values["data"] = self._data_identity()
        folder = save_checkpoint(self.run, step, tensors, values, self.config.keep_checkpoints)
        self._save_model()
        self.report.on_checkpoint(step, folder)

    def _save_model(self) -> None:
        """Replace the model in the run folder, and the plot."""
        self.model.save_pretrained(self.run, self.tokenizer)
        if self.progress.step:
            plot_loss(self.run)

    def _restore(self, folder: Path) -> None:
        tensors, values = load_checkpoint(folder)
        if values["data"] != self._data_identity():
            raise CheckpointError(
                f"the training data has changed since {folder}: it had {values['data']}, now {self._data_identity()}; "
                f"restore it, or fine-tune from the run's weights (--from {self.run})"
            )
        try:
            self.carried, self.progress = restore(tensors, values, self.model, self.optimizer)
        except RuntimeError as error:
            raise CheckpointError(f"{folder} does not fit the model in {TRAIN_CONFIG}: {error}") from error

    def _data_identity(self) -> dict[str, int]:
        return {"documents": self.training.n_documents, "tokens": self.training.n_tokens}
