"""Trains one cell and evaluates it."""

from __future__ import annotations

from functools import partial
from typing import Any

from anymamba.data.synthetic.copying import copying_batch
from anymamba.experiments.selective_copying.arms import Settings
from anymamba.lab.experiment import Context
from anymamba.lab.language import training_flops
from anymamba.lab.learning import build_model, fixed_set, learn
from anymamba.models.config import ModelConfig
from anymamba.parts.options import HyenaOptions


def measure(settings: Settings, context: Context) -> dict[str, Any]:
    """Train an arm; returns the values of `learn`, and `flops_per_token`, the operations of a training step."""
    make = partial(copying_batch, settings.task)
    validation = fixed_set(make, settings.validation_rows, context.device)
    config = model_config(settings)
    model = build_model(config, context)
    learned = learn(
        model,
        settings.optimization,
        make,
        validation,
        context,
        every=settings.judge_every,
        enough=lambda score: settings.enough is not None and score.tokens >= settings.enough,
        resumable=True,
    )
    return {**learned, "flops_per_token": training_flops(config, settings.task.length)}


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
