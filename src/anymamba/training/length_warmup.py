"""Sequence-length warm-up: training begins with short windows, which double; the batch halves, so steps cost the same.

Source: Mamba (arXiv:2312.00752), appendix E.3.2, and HyenaDNA (arXiv:2306.15794), section 3.2: two epochs at each power
of two from 2^10 on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from anymamba.training.config import TrainConfig


class Stage(NamedTuple):
    """Steps with windows of one length."""

    context: int
    """Tokens per row."""
    batch_size: int
    """Rows per batch."""
    start: int
    """Steps before this stage."""
    stop: int
    """Steps after it."""


def stages(config: TrainConfig, n_windows: Callable[[int], int]) -> tuple[Stage, ...]:
    """The stages of a run: one for each length from the first to the context, which takes all steps that are left.

    Args:
        n_windows: the number of windows in an epoch for a length.
    Raises ValueError if the stages before the last one take all steps.
    """
    if not config.length_warmup:
        return (Stage(config.context, config.batch_size, 0, config.steps),)
    found: list[Stage] = []
    context, start = config.length_warmup_start, 0
    while context < config.context:
        batch_size = config.batch_size * (config.context // context)
        windows = config.length_warmup_epochs * n_windows(context)
        stop = start + max(1, math.ceil(windows / (batch_size * config.accumulation)))
        found.append(Stage(context, batch_size, start, stop))
        context, start = 2 * context, stop
    if start >= config.steps:
        raise ValueError(
            f"the length warm-up takes {start:,} steps before it reaches {config.context:,} tokens: "
            f"{config.length_warmup_epochs:g} epochs at each of {len(found)} lengths; got steps {config.steps:,}; "
            "raise them (--steps), or take fewer epochs (--length-warmup-epochs)"
        )
    return (*found, Stage(config.context, config.batch_size, start, config.steps))


def stage_of(found: tuple[Stage, ...], step: int) -> Stage:
    """The stage of a step, counted from 0; the last one goes on for ever."""
    return next((stage for stage in found if step < stage.stop), found[-1])


def described(found: tuple[Stage, ...]) -> str:
    """The stages in one line."""
    parts = [f"{s.batch_size:,} x {s.context:,} for {s.stop - s.start:,} steps" for s in found[:-1]]
    last = found[-1]
    return ", ".join([*parts, f"then {last.batch_size:,} x {last.context:,}"])
