"""Trains a model on a task whose batches are made on the fly, and evaluates it on a fixed validation set."""

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
"""Token ids (rows, length) and labels (rows, length); labels of -100 are not counted."""
MakeBatch = Callable[[torch.Generator, int], Batch]
"""Makes a batch with the given number of rows."""

VALIDATION_SEED = (1 << 32) - 1
"""Far from every training seed (torch uses 32 bits of it). All arms and seeds have the same validation set."""


@dataclass(frozen=True)
class Optimization:
    """AdamW with warm-up, then a constant rate or half a cosine down to 0."""

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
    """Added to the root of the second moment. Gradients far below it have almost no effect. If the solution should keep
    improving after the loss is near 0, a smaller epsilon is needed."""


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


def build_model(config: ModelConfig, context: Context) -> LanguageModel:
    """A model whose weights are drawn on the CPU, so that every device starts from the same weights."""
    return LanguageModel(config).to(context.device)


def fixed_set(make: MakeBatch, rows: int, device: torch.device, seed: int = VALIDATION_SEED) -> Batch:
    """A set with the same rows on every call; by default the validation set."""
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
    """Train a model on a task and evaluate it at intervals.

    Args:
        make: makes batches.
        validation: the fixed set that the model is evaluated on.
        every: steps between two evaluations; the model is also evaluated after the last step.
        enough: called with the score of each evaluation; True stops the training.
        generator: source of the batches. Pass one if this training continues another and needs fresh rows. By default
            it is made from the context's seed, so that all arms get the same batches.
    Returns a dictionary that JSON can hold: `accuracy` (tokens), `sequence_accuracy` and `validation_loss` at the end,
    `steps` and `training_seconds` (evaluations included), `parameters`, and `curve`, a list of [step, mean training
    loss since the previous evaluation, token accuracy]. A loss that is not finite is None.
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
    """Take one step on a batch. Returns the loss before the step, in nats per label."""
    out = model.loss(*batch)
    loss = out.loss / out.n_tokens
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return loss.item()


def build_optimizer(model: LanguageModel, how: Optimization) -> torch.optim.AdamW:
    """AdamW with the same parameter groups as in training."""
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
    """Set the learning rates of a step; steps count from 1."""
    share = min(1.0, step / how.warmup_steps) if how.warmup_steps else 1.0
    if how.cosine and step > how.warmup_steps:
        done = (step - how.warmup_steps) / max(1, how.steps - how.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        peak = how.learning_rate if group["rate"] == 1.0 else how.kernel_learning_rate
        group["lr"] = peak * share


@torch.no_grad()
def evaluate(model: LanguageModel, batch: Batch, rows: int = 64) -> Score:
    """Evaluate a model on a set, `rows` sequences at a time.

    Raises ValueError if the set has no label.
    """
    ids, labels = batch
    counted = labels != -100
    if not counted.any():
        raise ValueError("at least one position must have a label, but all labels are -100; label the answers")
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
    """The value, or None for infinities and NaN, which JSON cannot hold."""
    return value if math.isfinite(value) else None
