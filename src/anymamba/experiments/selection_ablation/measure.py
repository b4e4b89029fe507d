"""Trains one arm on its task and judges it."""

from __future__ import annotations

from functools import partial
from typing import Any

from anymamba.data.synthetic.copying import copying_batch
from anymamba.experiments.experiment import Context
from anymamba.experiments.selection_ablation.arms import Settings
from anymamba.experiments.selection_ablation.corpus import corpus_bytes, fixed_windows, random_windows
from anymamba.experiments.synthetic_task import build_model, learn, validation_set


def measure(settings: Settings, context: Context) -> dict[str, Any]:
    """What `learn` returns; of a language model the bytes of both sides of the corpus, too."""
    return measure_copying(settings, context) if settings.copying is not None else measure_language(settings, context)


def measure_copying(settings: Settings, context: Context) -> dict[str, Any]:
    """Selective copying, judged by rows that are the same for all arms."""
    assert settings.copying is not None
    make = partial(copying_batch, settings.copying)
    validation = validation_set(make, settings.validation_rows, context.device)
    model = build_model(settings.model, context)
    return learn(model, settings.optimization, make, validation, context, every=settings.judge_every)


def measure_language(settings: Settings, context: Context) -> dict[str, Any]:
    """The bytes of the standard library, judged by windows of the files that are held out."""
    training, held_out = corpus_bytes(False), corpus_bytes(True)
    ids, labels = fixed_windows(held_out, settings.window, settings.validation_rows)
    validation = ids.to(context.device), labels.to(context.device)
    make = random_windows(training, settings.window)
    model = build_model(settings.model, context)
    learned = learn(model, settings.optimization, make, validation, context, every=settings.judge_every)
    return {**learned, "training_bytes": len(training), "held_out_bytes": len(held_out)}
