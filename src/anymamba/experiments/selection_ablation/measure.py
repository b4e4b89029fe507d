"""Trains one arm on selective copying and evaluates it."""

from __future__ import annotations

from functools import partial
from typing import Any

from anymamba.data.synthetic.copying import copying_batch
from anymamba.experiments.selection_ablation.arms import Settings
from anymamba.lab.experiment import Context
from anymamba.lab.learning import build_model, fixed_set, learn


def measure(settings: Settings, context: Context) -> dict[str, Any]:
    """Train an arm; returns the values of `learn`."""
    make = partial(copying_batch, settings.copying)
    validation = fixed_set(make, settings.validation_rows, context.device)
    model = build_model(settings.model, context)
    return learn(model, settings.optimization, make, validation, context, every=settings.judge_every, resumable=True)
