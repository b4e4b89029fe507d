"""Trains one cell and evaluates it."""

from __future__ import annotations

from functools import partial
from typing import Any

from anymamba.data.synthetic.copying import copying_batch
from anymamba.experiments.selective_copying.arms import Settings
from anymamba.lab.experiment import Context
from anymamba.lab.learning import build_model, fixed_set, learn
from anymamba.models.config import ModelConfig
from anymamba.parts.options import HyenaOptions


def measure(settings: Settings, context: Context) -> dict[str, Any]:
    """Train an arm; returns the values of `learn`."""
    make = partial(copying_batch, settings.task)
    validation = fixed_set(make, settings.validation_rows, context.device)
    model = build_model(model_config(settings), context)
    return learn(
        model,
        settings.optimization,
        make,
        validation,
        context,
        every=settings.judge_every,
        enough=lambda score: settings.enough is not None and score.tokens >= settings.enough,
        resumable=True,
    )


def model_config(settings: Settings) -> ModelConfig:
    """Blocks of one mixer; Hyena's filter has the positional features that its authors use in synthetic tasks."""
    return ModelConfig(
        d_model=settings.d_model,
        n_layers=settings.n_layers,
        vocab_size=settings.task.alphabet,
        mixers=(settings.mixer,),
        weight_std=settings.weight_std,
        hyena=HyenaOptions(max_length=settings.task.length, emb_dim=5, w=10.0),
    )
