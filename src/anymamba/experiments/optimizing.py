"""Trains a model on batches that are made on the fly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anymamba.layers.parameters import parameter_groups
from anymamba.models.language_model import LanguageModel


@dataclass(frozen=True)
class Optimization:
    """Adam or AdamW with warm-up and a constant rate, or half a cosine down to none."""

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


Batch = tuple[Tensor, Tensor]
"""Token ids (batch, length) and labels (batch, length), -100 where none counts."""


def train(
    model: LanguageModel,
    config: Optimization,
    next_batch: Callable[[int], Batch],
    *,
    stop: Callable[[int], bool] = lambda step: False,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[int, float, list[float]]:
    """Train a model.

    Args:
        next_batch: makes the batch of step 1, 2, ...
        stop: asked after each step whether that is enough.
        progress: told the step and its loss in nats a label.
    Returns the steps taken, the seconds they took, and the loss of each.
    """
    optimizer = build_optimizer(model, config)
    start, losses, step = time.perf_counter(), [], 0
    model.train()
    for step in range(1, config.steps + 1):
        set_rates(optimizer, config, step)
        ids, labels = next_batch(step)
        out = model.loss(ids, labels)
        loss = out.loss / out.n_tokens
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        losses.append(loss.item())
        progress(step, losses[-1])
        if stop(step):
            break
    return step, time.perf_counter() - start, losses


def build_optimizer(model: LanguageModel, config: Optimization) -> torch.optim.AdamW:
    """AdamW in three groups: matrices that decay, those that do not, and kernels at a rate of their own."""
    decayed, plain, kernels = parameter_groups(model)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "peak": config.learning_rate},
        {"params": plain, "weight_decay": 0.0, "peak": config.learning_rate},
        {
            "params": kernels,
            "weight_decay": 0.0,
            "peak": min(config.learning_rate, config.kernel_learning_rate),
        },
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
    )


def set_rates(optimizer: torch.optim.Optimizer, config: Optimization, step: int) -> None:
    """The rates of step 1, 2, ..."""
    share = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    if config.cosine and step > config.warmup_steps:
        done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
