"""Learning a task of tokens whose batches are made on the fly: a stream to train on, a fixed set to be judged by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from anymamba.experiments.experiment import Context
from anymamba.experiments.optimizing import Batch, Optimization, train
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel

MakeBatch = Callable[[torch.Generator, int], Batch]
"""Makes that many rows: token ids (rows, length) and labels (rows, length), -100 where none counts."""

VALIDATION_SEED = (1 << 32) - 1
"""Far from every training seed (torch takes 32 bits of it), and the same for all: one set for all arms and seeds."""


@dataclass(frozen=True)
class Score:
    """How well a model answers at the labelled positions of a set."""

    tokens: float
    """Share of the labelled positions that are right."""
    sequences: float
    """Share of the sequences with labels that are right at every one of them."""
    loss: float
    """Mean over labelled positions of -log p, in nats."""
    n_tokens: int
    n_sequences: int


def build_model(config: ModelConfig, context: Context) -> LanguageModel:
    """A model drawn on the CPU, so that every device starts from the same weights."""
    return LanguageModel(config).to(context.device)


def validation_set(make: MakeBatch, rows: int, device: torch.device) -> Batch:
    """The same rows on every call."""
    ids, labels = make(torch.Generator().manual_seed(VALIDATION_SEED), rows)
    return ids.to(device), labels.to(device)


def training_generator(context: Context) -> torch.Generator:
    """What decides the rows of training, by the seed alone: every arm sees the same."""
    return torch.Generator().manual_seed(context.seed)


def training_stream(
    make: MakeBatch, rows: int, context: Context, generator: torch.Generator | None = None
) -> Callable[[int], Batch]:
    """Fresh rows on every call, decided by the generator, which is that of the context where none is given."""
    generator = generator or training_generator(context)

    def next_batch(_: int) -> Batch:
        ids, labels = make(generator, rows)
        return ids.to(context.device), labels.to(context.device)

    return next_batch


@torch.no_grad()
def evaluate(model: LanguageModel, batch: Batch, rows: int = 64) -> Score:
    """Judge a model on a set, `rows` sequences at a time.

    Raises ValueError where the set has no label.
    """
    ids, labels = batch
    counted = labels != -100
    if not counted.any():
        raise ValueError("no position has a label: all labels are -100; label those whose answers count")
    was_training = model.training
    model.eval()
    right, loss = torch.zeros_like(counted), 0.0
    for part in torch.arange(len(ids), device=ids.device).split(rows):
        where = counted[part]
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


def learn(
    model: LanguageModel,
    optimization: Optimization,
    make: MakeBatch,
    validation: Batch,
    context: Context,
    *,
    every: int,
    enough: Callable[[Score], bool] = lambda score: False,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """Train a model on a task and judge it now and then.

    Args:
        make: makes batches.
        validation: the fixed set that the model is judged by.
        every: steps between two judgements; the last step is judged, too.
        enough: asked at each judgement whether to stop before the last step.
        generator: decides the batches; given by the caller where one training is a continuation of another and must
            see fresh rows, else made from the context's seed.
    Returns a JSON-able dictionary: `accuracy` (tokens), `sequence_accuracy` and `validation_loss` at the end, `steps`
    and `training_seconds` (judgements included), `parameters`, and `curve`, a list of [step, training loss since the
    one before, token accuracy]. A loss that is not finite is None.
    """
    curve: list[list[float | None]] = []
    since: list[float] = []
    scores: list[Score] = []

    def after_step(step: int, loss: float) -> None:
        since.append(loss)
        words = f"loss {loss:.3f}" + (f", accuracy {100 * scores[-1].tokens:.1f} %" if scores else "")
        context.progress(step, optimization.steps, words)

    def judge(step: int) -> bool:
        if step % every and step != optimization.steps:
            return False
        scores.append(evaluate(model, validation))
        curve.append([step, finite(sum(since) / len(since)), scores[-1].tokens])
        since.clear()
        return enough(scores[-1])

    stream = training_stream(make, optimization.batch_size, context, generator)
    steps, seconds, _ = train(model, optimization, stream, stop=judge, progress=after_step)
    return {
        "accuracy": scores[-1].tokens,
        "sequence_accuracy": scores[-1].sequences,
        "validation_loss": finite(scores[-1].loss),
        "steps": steps,
        "training_seconds": round(seconds, 1),
        "parameters": model.n_parameters(),
        "curve": curve,
    }


def finite(value: float) -> float | None:
    """The value, or None for infinities and NaN, which JSON has no words for."""
    return value if math.isfinite(value) else None
