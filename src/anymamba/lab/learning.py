"""Learning a task of tokens whose batches are made on the fly: a stream to train on, a fixed set to be judged by."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.lab.experiment import Context
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.training import optimizer as adamw
from anymamba.training.config import OptimizerConfig

Batch = tuple[Tensor, Tensor]
"""Token ids (rows, length) and labels (rows, length), -100 where none counts."""
MakeBatch = Callable[[torch.Generator, int], Batch]
"""Makes that many rows."""

VALIDATION_SEED = (1 << 32) - 1
"""Far from every training seed (torch takes 32 bits of it), and the same for all: one set for all arms and seeds."""


@dataclass(frozen=True)
class Optimization:
    """AdamW with warm-up and a constant rate, or half a cosine down to none."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    warmup_steps: int = 0
    cosine: bool = False
    clip_norm: float | None = 1.0
    kernel_learning_rate: float = 1e-3
    """Largest rate of the parameters of time-invariant kernels (S4, S4D, Hyena's filter)."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    """Added to the root of the second moment. Gradients below it teach nothing: a task whose loss goes to nothing, but
    whose solution is to get better still, needs a smaller one."""


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


def fixed_set(make: MakeBatch, rows: int, device: torch.device, seed: int = VALIDATION_SEED) -> Batch:
    """The same rows on every call; by default those that judge a model while it learns."""
    ids, labels = make(torch.Generator().manual_seed(seed), rows)
    return ids.to(device), labels.to(device)


def learn(
    model: LanguageModel,
    how: Optimization,
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
            see fresh rows, else made from the context's seed, so that every arm sees the same.
    Returns a JSON-able dictionary: `accuracy` (tokens), `sequence_accuracy` and `validation_loss` at the end, `steps`
    and `training_seconds` (judgements included), `parameters`, and `curve`, a list of [step, training loss since the
    one before, token accuracy]. A loss that is not finite is None.
    """
    generator = generator or torch.Generator().manual_seed(context.seed)
    optimizer, start = build_optimizer(model, how), time.perf_counter()
    curve: list[list[float | None]] = []
    losses: list[float] = []
    score = None
    model.train()
    for step in range(1, how.steps + 1):
        set_rates(optimizer, how, step)
        ids, labels = make(generator, how.batch_size)
        losses.append(train_step(model, optimizer, (ids.to(context.device), labels.to(context.device)), how.clip_norm))
        judged = f", accuracy {100 * score.tokens:.1f} %" if score else ""
        context.progress(step, how.steps, f"loss {losses[-1]:.3f}{judged}")
        if step % every and step != how.steps:
            continue
        score = evaluate(model, validation)
        curve.append([step, finite(sum(losses) / len(losses)), score.tokens])
        losses.clear()
        if enough(score):
            break
    assert score is not None, "an optimization has at least one step"
    return {
        "accuracy": score.tokens,
        "sequence_accuracy": score.sequences,
        "validation_loss": finite(score.loss),
        "steps": step,
        "training_seconds": round(time.perf_counter() - start, 1),
        "parameters": model.n_parameters(),
        "curve": curve,
    }


def train_step(model: LanguageModel, optimizer: torch.optim.Optimizer, batch: Batch, clip_norm: float | None) -> float:
    """One step on a batch. Returns the loss before it, in nats a label."""
    out = model.loss(*batch)
    loss = out.loss / out.n_tokens
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return loss.item()


def build_optimizer(model: LanguageModel, how: Optimization) -> torch.optim.AdamW:
    """AdamW in the groups of training."""
    config = OptimizerConfig(
        learning_rate=how.learning_rate,
        kernel_learning_rate=how.kernel_learning_rate,
        min_learning_rate=0.0,
        betas=how.betas,
        eps=how.eps,
        weight_decay=how.weight_decay,
    )
    return adamw.build_optimizer(model, config)


def set_rates(optimizer: torch.optim.Optimizer, how: Optimization, step: int) -> None:
    """The rates of step 1, 2, ..."""
    share = min(1.0, step / how.warmup_steps) if how.warmup_steps else 1.0
    if how.cosine and step > how.warmup_steps:
        done = (step - how.warmup_steps) / max(1, how.steps - how.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        peak = how.learning_rate if group["rate"] == 1.0 else how.kernel_learning_rate
        group["lr"] = peak * share


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


def finite(value: float) -> float | None:
    """The value, or None for infinities and NaN, which JSON has no words for."""
    return value if math.isfinite(value) else None
