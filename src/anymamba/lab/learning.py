"""Trains a model on a task whose batches are made on the fly, and evaluates it on a fixed validation set."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.lab.classifiers import Classifier
from anymamba.lab.experiment import Context
from anymamba.lab.optimization import Batch, Optimization, TrainingStep, autocast
from anymamba.lab.saving import OutOfTime
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.parts.state import without_last_states

MakeBatch = Callable[[torch.Generator, int], Batch]
"""Makes a batch with the given number of rows, on the device of the generator or of the data."""


@dataclass(frozen=True)
class Source:
    """Batches of one shape."""

    make: MakeBatch
    rows: int
    labels_a_row: int | None = None
    """The most labels of a row, if that is known; see `TrainingStep`."""


VALIDATION_SEED = (1 << 32) - 1
"""Far from every training seed (torch uses 32 bits of it). All arms and seeds have the same validation set."""
READ_EVERY = 20
"""Steps after which a GPU is asked for the loss; asking at each step would make it wait."""
EVALUATED_AT_ONCE = 1 << 19
"""Tokens of long sequences that an evaluation reads at once: more would fill the memory of a GPU."""
UNTIMED = 10
"""Steps of each shape at the beginning that the speed is not measured on: the first ones compile, and one is
recorded."""


@dataclass(frozen=True)
class Score:
    """How many labelled positions of a set a model predicts correctly."""

    tokens: float
    """Share of the labelled positions that are correct."""
    sequences: float
    """Share of the sequences with labels in which every labelled position is correct."""
    loss: float
    """Mean over labelled positions of -log p, in nats."""
    n_tokens: int
    n_sequences: int


@dataclass
class Course:
    """What changes during a training, besides the model, the optimiser and the generator; JSON can hold it."""

    step: int = 0
    curve: list[list[float | None]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Losses since the last evaluation."""
    seconds: float = 0.0
    """Evaluations included."""
    timed_tokens: int = 0
    timed_seconds: float = 0.0
    """Tokens and seconds that the speed is computed from, without evaluations."""
    perfect: int = 0
    """Evaluations in a row, up to the last one, in which every sequence was right."""
    ended: bool = False
    """Whether the training ended: with its last step, or with an evaluation that was good enough."""


def build_model(config: ModelConfig, context: Context) -> LanguageModel:
    """A model whose weights are drawn on the CPU, so that every device starts from the same weights."""
    return LanguageModel(config).to(context.device)


def fixed_set(make: MakeBatch, rows: int, device: torch.device, seed: int = VALIDATION_SEED) -> Batch:
    """A set with the same rows on every call; by default the validation set."""
    ids, labels = make(torch.Generator().manual_seed(seed), rows)
    return ids.to(device), labels.to(device)


def batch_generator(context: Context) -> torch.Generator:
    """The source of an arm's batches. On an NVIDIA GPU it draws there, so that batches are made there."""
    device = context.device if context.device.type == "cuda" else "cpu"
    return torch.Generator(device).manual_seed(context.seed)


def learn(
    model: LanguageModel | Classifier,
    how: Optimization,
    make: MakeBatch | Sequence[Source],
    validation: Batch,
    context: Context,
    *,
    every: int,
    enough: Callable[[Score], bool] = lambda score: False,
    perfect_in_a_row: int | None = None,
    generator: torch.Generator | None = None,
    resumable: bool = False,
) -> dict[str, Any]:
    """Train a model on a task and evaluate it at intervals.

    Args:
        make: makes batches of `batch_size` rows; or several sources, which take turns.
        validation: the fixed set that the model is evaluated on.
        every: steps between two evaluations; the model is also evaluated after the last step.
        enough: called with the score of each evaluation; True stops the training.
        perfect_in_a_row: so many evaluations in a row without a mistake stop it, too; None means they do not.
        generator: source of the batches. Pass one if this training continues another and needs fresh rows. By default
            it is made from the context's seed, so that all arms get the same batches.
        resumable: save the state where the context says, also the last one, and go on from a saved one. Only for an
            arm's only training, or with a part of the arm's saving for each.
    Returns a dictionary that JSON can hold: `accuracy` (tokens), `sequence_accuracy` and `validation_loss` at the end,
    `steps` and `training_seconds` (evaluations included), `parameters`, `curve`, a list of [step, mean training
    loss since the previous evaluation, token accuracy], `tokens_per_second` without evaluations (None if there were too
    few steps), `recorded`, whether the steps ran as a CUDA graph, and `peak_gib`, the most memory on a GPU. A loss that
    is not finite is None.
    Raises OutOfTime when a saved training reaches the context's deadline.
    """
    generator = generator or batch_generator(context)
    sources = (Source(make, how.batch_size),) if callable(make) else make
    take_step, saving = TrainingStep(model, how), context.saving if resumable else None
    found = saving.read(model, take_step.optimizer, generator) if saving else None
    course = restored_course(found, saving.path) if saving and found is not None else Course()
    had_ended, losses, score = course.ended, list[Tensor](), None
    watch = Stopwatch(context.device, course, UNTIMED * len(sources))
    model.train()
    while not course.ended:
        source = sources[course.step % len(sources)]
        ids, labels = source.make(generator, source.rows)
        course.step += 1
        batch = ids.to(context.device), labels.to(context.device)
        losses.append(take_step(batch, course.step, source.labels_a_row))
        watch.step(ids.numel())
        reads = context.device.type == "cpu" or course.step % READ_EVERY == 0
        if reads:
            judged = f", accuracy {100 * score.tokens:.1f} %" if score else ""
            loss = torch.stack(losses[-len(sources) :]).mean().item()
            context.progress(course.step, how.steps, f"loss {loss:.3f}{judged}")
        if course.step % every == 0 or course.step == how.steps:
            course.losses += read(losses)
            watch.pause()
            score = evaluate(model, validation, how=how)
            course.curve.append([course.step, finite(sum(course.losses) / len(course.losses)), score.tokens])
            course.losses.clear()
            course.perfect = course.perfect + 1 if score.sequences == 1 else 0
            course.ended = course.step == how.steps or enough(score) or course.perfect == perfect_in_a_row
            watch.go_on()
        if saving and not course.ended and reads and saving.is_due():
            course.losses += read(losses)
            watch.pause()
            saving.write(model, take_step.optimizer, generator, vars(course))
            if saving.is_late():
                raise OutOfTime
            watch.go_on()
    if saving and not had_ended:
        saving.write(model, take_step.optimizer, generator, vars(course))
    score = score or evaluate(model, validation, how=how)  # of a training that had ended when it was saved
    return {
        "accuracy": score.tokens,
        "sequence_accuracy": score.sequences,
        "validation_loss": finite(score.loss),
        "steps": course.step,
        "training_seconds": round(course.seconds, 1),
        "parameters": model.n_parameters(),
        "curve": course.curve,
        "tokens_per_second": course.timed_tokens / course.timed_seconds if course.timed_tokens else None,
        "recorded": take_step.not_recorded is None,
        "peak_gib": torch.cuda.max_memory_allocated(context.device) / 2**30 if context.device.type == "cuda" else None,
    }


def restored_course(found: dict[str, Any], path: Path) -> Course:
    """The course of a saved training. Raises ValueError if another version of this package has saved it."""
    if set(found) != {field.name for field in fields(Course)}:
        raise ValueError(f"{path} was written by another version; delete it to measure the arm from its beginning")
    return Course(**found)


class Stopwatch:
    """Adds the time of a training to its course, and that of its steps alone."""

    def __init__(self, device: torch.device, course: Course, untimed: int = UNTIMED) -> None:
        self.device, self.course, self.untimed = device, course, untimed
        self.start = time.perf_counter()
        self.mark: float | None = None
        """When the steps that are timed began."""
        self.steps = 0

    def step(self, tokens: int) -> None:
        """Count a step."""
        self.steps += 1
        if self.mark is None and self.steps == self.untimed:
            self._mark()
        elif self.mark is not None:
            self.course.timed_tokens += tokens

    def pause(self) -> None:
        """Add the time so far."""
        now = self._now()
        if self.mark is not None:
            self.course.timed_seconds += now - self.mark
        self.course.seconds += now - self.start
        self.start = now

    def go_on(self) -> None:
        """Begin to measure again."""
        if self.mark is not None:
            self._mark()

    def _mark(self) -> None:
        self.mark = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def read(losses: list[Tensor]) -> list[float]:
    """The values of losses on the device, which are then forgotten."""
    values = torch.stack(losses).tolist() if losses else []
    losses.clear()
    return values


@torch.no_grad()
def evaluate(
    model: LanguageModel | Classifier, batch: Batch, rows: int | None = None, how: Optimization | None = None
) -> Score:
    """Evaluate a model on a set, `rows` sequences at a time, in the precision that it is trained in.

    By default it reads 64 sequences at a time, or fewer long ones: EVALUATED_AT_ONCE tokens.
    Raises ValueError if the set has no label.
    """
    ids, labels = batch
    counted = labels != -100
    if not counted.any():
        raise ValueError("at least one position must have a label, but all labels are -100; label the answers")
    precision = autocast(how, ids.device) if how else nullcontext()
    was_training = model.training
    model.eval()
    right, loss = torch.zeros_like(counted), 0.0
    rows = rows or max(1, min(64, EVALUATED_AT_ONCE // ids.shape[1]))
    for part in torch.arange(len(ids), device=ids.device).split(rows):
        where = counted[part]
        with precision, without_last_states():
            logits = model.logits(model.hidden(ids[part])[0][where])[:, : model.config.vocab_size].float()
        wanted = labels[part][where]
        loss += F.cross_entropy(logits, wanted, reduction="sum").item()
        right[part] = right[part].masked_scatter(where, logits.argmax(-1) == wanted)
    model.train(was_training)
    asked = counted.any(1)
    whole = (right | ~counted).all(1) & asked
    n_tokens, n_sequences = int(counted.sum()), int(asked.sum())
    return Score(
        right.sum().item() / n_tokens, whole.sum().item() / n_sequences, loss / n_tokens, n_tokens, n_sequences
    )


def finite(value: float) -> float | None:
    """The value, or None for infinities and NaN, which JSON cannot hold."""
    return value if math.isfinite(value) else None
