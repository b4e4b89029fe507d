"""Trains one arm on its task and evaluates it."""

from __future__ import annotations

from functools import partial
from typing import Any

from anymamba.data.synthetic.copying import copying_batch
from anymamba.experiments.selection_ablation.arms import Settings
from anymamba.lab.byte_windows import fixed_windows, random_windows, standard_library_bytes
from anymamba.lab.experiment import Context
from anymamba.lab.learning import MakeBatch, build_model, fixed_set, learn


def measure(settings: Settings, context: Context) -> dict[str, Any]:
    """Train an arm; returns the values of `learn`, and for a language model also the bytes of the corpus."""
    device, rows = context.device, settings.validation_rows
    make: MakeBatch
    sizes: dict[str, int] = {}
    if settings.copying is not None:
        make = partial(copying_batch, settings.copying)
        validation = fixed_set(make, rows, device)
    else:
        training, held_out = standard_library_bytes(False), standard_library_bytes(True)
        make = random_windows(training, settings.window)
        ids, labels = fixed_windows(held_out, settings.window, rows)
        validation = ids.to(device), labels.to(device)
        sizes = {"training_bytes": len(training), "held_out_bytes": len(held_out)}
    model = build_model(settings.model, context)
    return {**learn(model, settings.optimization, make, validation, context, every=settings.judge_every), **sizes}
