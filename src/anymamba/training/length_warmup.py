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
        n_windows: the number of windows in an epoch for a length, without those that are dropped.
    Raises ValueError if the stages before the last one take all steps.
    """
    if not config.length_warmup:
        return (Stage(config.context, config.batch_size, 0, config.steps),)
    found = _short_stages(config, n_windows)
    start = found[-1].stop
    if start >= config.steps:
        raise ValueError(
            f"the length warm-up takes {start:,} steps before it reaches {config.context:,} tokens: "
            f"{config.length_warmup_epochs:g} epochs at each of {len(found)} lengths; got steps {config.steps:,}; "
            "raise them (--steps), or take fewer epochs (--length-warmup-epochs)"
        )
    return (*found, Stage(config.context, config.batch_size, start, config.steps))


def steps_of_epochs(config: TrainConfig, n_windows: Callable[[int], int]) -> int:
    """The steps of a length warm-up with as many epochs at the context as at each length before it."""
    return _short_stages(config, n_windows)[-1].stop + _steps_at(config.context, config, n_windows)


def _short_stages(config: TrainConfig, n_windows: Callable[[int], int]) -> list[Stage]:
    """The stages of a length warm-up before the one with the context."""
    found: list[Stage] = []
    context, start = config.length_warmup_start, 0
    while context < config.context:
        stop = start + _steps_at(context, config, n_windows)
        found.append(Stage(context, _batch_size_at(context, config), start, stop))
        context, start = 2 * context, stop
    return found


def _steps_at(context: int, config: TrainConfig, n_windows: Callable[[int], int]) -> int:
    """The steps of the epochs at one length."""
    windows = config.length_warmup_epochs * n_windows(context)
    return max(1, math.ceil(windows / (_batch_size_at(context, config) * config.accumulation)))


def _batch_size_at(context: int, config: TrainConfig) -> int:
    return config.batch_size * (config.context // context)


def stage_of(found: tuple[Stage, ...], step: int) -> Stage:
    """The stage of a step, counted from 0; the last one goes on for ever."""
    return next((stage for stage in found if step < stage.stop), found[-1])


def described(found: tuple[Stage, ...]) -> str:
    """The stages in one line."""
    parts = [f"{s.batch_size:,} x {s.context:,} for {s.stop - s.start:,} steps" for s in found[:-1]]
    last = found[-1]
    return ", ".join([*parts, f"then {last.batch_size:,} x {last.context:,}"])
