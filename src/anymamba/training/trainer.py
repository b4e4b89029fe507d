"""Training a language model: a run folder that can be killed at any moment and resumed bit for bit.

runs/x/config.json model.safetensors tokenizer.json     the model, replaced after each checkpoint
runs/x/train_config.json metrics.jsonl loss.png tensorboard/
runs/x/checkpoints/step-00001000/                       weights, optimizer, random state, data position
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from anymamba.base.errors import CheckpointError
from anymamba.base.files import write_json
from anymamba.base.schema import config_from_dict
from anymamba.data.batches import Batch, BatchStream
from anymamba.data.table import TokenTable
from anymamba.data.tokenizer import FILE_NAME, ByteTokenizer, Tokenizer
from anymamba.models.checkpoints import find_tokenizer
from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.models.mixers import growing_mixers
from anymamba.parts.state import map_state, state_tensors
from anymamba.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    refuse_pickles,
    remove_leftovers,
    save_checkpoint,
)
from anymamba.training.config import TrainConfig, config_values, file_values
from anymamba.training.interrupts import PendingSignal, deferred_signals
from anymamba.training.metrics import MetricsLog, plot_loss
from anymamba.training.optimizer import (
    build_optimizer,
    learning_rate,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
)
from anymamba.training.steps import LossFunction, batch_loss, held_out_nats
from anymamba.training.tables import open_tables

TRAIN_CONFIG = "train_config.json"


class Report(Protocol):
    """Receives what happens during a run."""

    def on_tables(self, done: int, total: int | None) -> None:
        """Bytes of the data read so far."""

    def on_step(self, metrics: dict[str, Any]) -> None:
        """After every step: step, steps, bits_per_byte, tokens_per_second, seconds_left, skipped."""

    def on_evaluation(self, metrics: dict[str, Any]) -> None:
        """After an evaluation on held-out documents."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """After a checkpoint."""


class Silent:
    """A report that says nothing."""

    def on_tables(self, done: int, total: int | None) -> None: ...

    def on_step(self, metrics: dict[str, Any]) -> None: ...

    def on_evaluation(self, metrics: dict[str, Any]) -> None: ...

    def on_checkpoint(self, step: int, folder: Path) -> None: ...


@dataclass(frozen=True)
class TrainResult:
    """The result of a run."""

    run: str
    steps: int
    tokens: int
    """Tokens read since the first step of the run."""
    tokens_per_second: float
    """Speed of this process, without evaluations and checkpoints."""
    bits_per_byte: float | None
    """Training loss of the last recorded step."""
    held_out_bits_per_byte: float | None
    skipped: int
    """Steps skipped for a non-finite loss or gradient."""
    n_parameters: int


def train(config: TrainConfig, run: str | Path, report: Report | None = None) -> TrainResult:
    """Train from the beginning into a new run folder.

    Raises FileExistsError if the folder is not empty, ValueError if the carried state would grow from batch to batch.
        After any other error the last good checkpoint remains.
    """
    run = Path(run)
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise FileExistsError(f"{run} exists; resume it (--resume {run}) or choose another folder (--out)")
    _require_bounded_state(config)
    report = report or Silent()
    tokenizer = find_tokenizer(config.start_from, config.data.tokenizer)
    training, held_out = open_tables(config.data, tokenizer, report.on_tables)
    config = _complete(config, tokenizer)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / TRAIN_CONFIG, file_values(config))
    return _Trainer(config, run, tokenizer, training, held_out, report).run_to_end()


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
    run, CheckpointError if the checkpoint is broken or the data has changed.
    """
    run = Path(run)
    config = read_config(run)
    report = report or Silent()
    own = run if (run / FILE_NAME).is_file() else config.data.tokenizer  # the run has one since its first checkpoint
    tokenizer = find_tokenizer(config.start_from, own)
    training, held_out = open_tables(config.data, tokenizer, report.on_tables)
    return _Trainer(config, run, tokenizer, training, held_out, report).run_to_end()


def read_config(run: Path) -> TrainConfig:
    """The resolved config of a run folder."""
    path = run / TRAIN_CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{run} is not a run folder: it has no {TRAIN_CONFIG}; start one with --out {run}")
    refuse_pickles(run)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return config_from_dict(TrainConfig, config_values(values, path) if isinstance(values, dict) else values)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _complete(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """The config with the values that the tokenizer and the given weights decide."""
    if config.start_from is None:
        model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
        return dataclasses.replace(config, model=model)
    model = LanguageModel.from_pretrained(config.start_from, device="meta").config
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
        self.step = self.tokens = self.skipped = self.skipped_in_a_row = 0
        self.carried: LanguageModelState | None = None
        self.position: dict[str, Any] | None = None
        self.labels_per_byte = training.n_tokens / max(1, training.n_bytes)
        self.bits_per_byte: float | None = None
        self.held_out_bits_per_byte: float | None = None
        remove_leftovers(run)
        if found := checkpoints(run):
            self._restore(found[-1])
        self.log = MetricsLog(run, self.step)
        self.seconds, self.timed_tokens = 0.0, 0

    def _build_model(self) -> LanguageModel:
        config = self.config
        if config.start_from is not None:
            model = LanguageModel.from_pretrained(config.start_from, device=config.device, dtype=torch.float32)
        else:
            model = LanguageModel(config.model, device=config.device)
        model.activation_checkpointing = config.activation_checkpointing
        return model.train()

    # ------------------------------------------------------------------------------------------ the loop

    def run_to_end(self) -> TrainResult:
        """Train until the last step; Ctrl-C and SIGTERM take effect after a checkpoint."""
        if not checkpoints(self.run):
            self._checkpoint()
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
            position=self.position,
        )
        return iter(stream)

    def _steps(self, stream: Iterator[Batch], loss: LossFunction, pending: PendingSignal) -> None:
        config = self.config
        while self.step < config.steps:
            started = time.perf_counter()
            metrics = self._one_step(stream, loss)
            self.seconds += time.perf_counter() - started
            self.timed_tokens += config.tokens_per_step
            last = self.step == config.steps
            self._record(metrics, write=last or self.step % config.log_every == 0)
            if self.held_out is not None and (last or self.step % config.eval_every == 0):
                self._evaluate(self.held_out)
            if last or pending.number is not None or self.step % config.checkpoint_every == 0:
                self._checkpoint()
            if pending.number is not None:
                return

    def _one_step(self, stream: Iterator[Batch], loss: LossFunction) -> dict[str, Any]:
        """One optimizer step over `accumulation` batches; a non-finite one changes only the counters."""
        config, model = self.config, self.model
        rate = learning_rate(config.optimizer, self.step + 1, config.steps)
        batches = [next(stream) for _ in range(config.accumulation)]
        count = max(1, sum(int((batch.labels != -100).sum()) for batch in batches))
        carried, nats = self.carried, 0.0
        device_type = model.embedding.weight.device.type
        for batch in batches:
            with torch.autocast(device_type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                batch_nats, _, state = batch_loss(model, loss, batch, carried)
            (batch_nats / count).backward()
            nats += batch_nats.item()
            carried = state if config.carry_state else None
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm).item()
        finite = math.isfinite(nats) and math.isfinite(norm)
        if finite:
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.position = batches[-1].position
        self.tokens += config.tokens_per_step
        self.carried = carried if finite else None
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= config.max_nonfinite:
            raise RuntimeError(
                f"the loss or the gradient was not finite in {self.skipped_in_a_row} steps in a row, the last is step "
                f"{self.step}; resuming from the last checkpoint in {self.run} would end the same way: start a new run "
                "with a lower learning rate or a longer warm-up"
            )
        return {"nats_per_token": nats / count if finite else None, "learning_rate": rate, "gradient_norm": norm}

    def _record(self, metrics: dict[str, Any], *, write: bool) -> None:
        nats = metrics["nats_per_token"]
        if nats is not None:
            self.bits_per_byte = self._bits_per_byte(nats)
        speed = self.timed_tokens / max(self.seconds, 1e-9)
        left = (self.config.steps - self.step) * self.config.tokens_per_step / speed
        shown = {"step": self.step, "steps": self.config.steps, "bits_per_byte": self.bits_per_byte}
        self.report.on_step({**shown, "tokens_per_second": speed, "seconds_left": left, "skipped": self.skipped})
        if write:
            norm = metrics["gradient_norm"]
            self.log.append(
                {
                    "step": self.step,
                    "kind": "train",
                    "bits_per_byte": self.bits_per_byte,
                    "nats_per_token": nats,
                    "learning_rate": metrics["learning_rate"],
                    "gradient_norm": norm if math.isfinite(norm) else None,
                    "tokens": self.tokens,
                    "skipped": self.skipped,
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
        self.held_out_bits_per_byte = self._bits_per_byte(nats)
        line = {
            "step": self.step,
            "kind": "eval",
            "bits_per_byte": self.held_out_bits_per_byte,
            "nats_per_token": nats,
        }
        self.log.append(line)
        self.report.on_evaluation(line)

    def _result(self) -> TrainResult:
        return TrainResult(
            run=str(self.run),
            steps=self.step,
            tokens=self.tokens,
            tokens_per_second=self.timed_tokens / self.seconds if self.seconds else 0.0,
            bits_per_byte=self.bits_per_byte,
            held_out_bits_per_byte=self.held_out_bits_per_byte,
            skipped=self.skipped,
            n_parameters=self.model.n_parameters(),
        )

    # ------------------------------------------------------------------------------------------ saving

    def _checkpoint(self) -> None:
        self.log.flush()
        tensors, values = self._snapshot()
        folder = save_checkpoint(self.run, self.step, tensors, values, self.config.keep_checkpoints)
        self.model.save_pretrained(self.run, self.tokenizer)
        if self.step:
            plot_loss(self.run)
        self.report.on_checkpoint(self.step, folder)

    def _snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on: tensors, and the rest as JSON."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        tensors |= {f"optimizer.{k}": v for k, v in optimizer_tensors(self.model, self.optimizer).items()}
        if self.carried is not None:
            carried = enumerate(state_tensors(self.carried))  # may be views, which safetensors refuses
            tensors |= {f"carried.{i}": t.clone(memory_format=torch.contiguous_format) for i, t in carried}
        tensors["random.torch"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        kind, keys, *rest = np.random.get_state(legacy=True)
        values = {
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "bits_per_byte": self.bits_per_byte,
            "held_out_bits_per_byte": self.held_out_bits_per_byte,
            "position": self.position,
            "data": self._data_identity(),
            "python_random": random.getstate(),
            "numpy_random": [kind, np.asarray(keys).tolist(), *rest],
            "torch": torch.__version__,
            "tensors": sorted(tensors),
        }
        return tensors, values

    def _restore(self, folder: Path) -> None:
        tensors, values = load_checkpoint(folder)
        if values["data"] != self._data_identity():
            raise CheckpointError(
                f"the training data has changed since {folder}: it had {values['data']}, now {self._data_identity()}; "
                f"restore it, or fine-tune from the run's weights (--from {self.run})"
            )
        parts = {prefix: _with_prefix(tensors, prefix) for prefix in ("model", "optimizer", "carried", "random")}
        try:
            self.model.load_state_dict(parts["model"])
        except RuntimeError as error:
            raise CheckpointError(f"{folder} does not fit the model in {TRAIN_CONFIG}: {error}") from error
        restore_optimizer(self.model, self.optimizer, parts["optimizer"])
        if parts["carried"]:
            device = self.model.embedding.weight.device
            self.carried = _as_state(
                self.model, [parts["carried"][str(i)] for i in range(len(parts["carried"]))], device
            )
        torch.set_rng_state(parts["random"]["torch"])
        if "cuda" in parts["random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(parts["random"]["cuda"])
        version, internal, gauss = values["python_random"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = values["numpy_random"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        for name in [
            "step",
            "tokens",
            "skipped",
            "skipped_in_a_row",
            "bits_per_byte",
            "held_out_bits_per_byte",
            "position",
        ]:
            setattr(self, name, values[name])

    def _data_identity(self) -> dict[str, int]:
        return {"documents": self.training.n_documents, "tokens": self.training.n_tokens}


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}."): t for key, t in tensors.items() if key.startswith(f"{prefix}.")}


def _as_state(model: LanguageModel, tensors: list[Tensor], device: torch.device) -> LanguageModelState:
    """A state of the model, made of tensors in the order of `state_tensors`."""
    remaining = iter([t.to(device) for t in tensors])
    return map_state(lambda _: next(remaining), model.init_state(0))
