"""How fast the arms of an experiment train on this machine, before a budget is fixed.

Prints for each arm the bytes, bases or tokens per second, the share of the card's bfloat16 peak, whether its step is
recorded in a CUDA graph, the minutes that the whole arm takes without evaluations, and on a GPU the share of each group
of kernels in a plain step. Arms that differ in rate and seed alone are measured once, and arms without a language model
not at all. The minutes are those of all steps at one rate: training on a task may end earlier, and associative recall
may try more rates.

python -m benchmarks.experiment_speed scaling --scale gpu [--arms NAME ...] [--steps 40] [--device cuda] [--no-shares]
    [--backend triton]
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import anymamba
from anymamba.experiments import load_experiment
from anymamba.experiments.associative_recall import arms as associative_recall
from anymamba.experiments.associative_recall.measure import flops_per_token, sources
from anymamba.experiments.induction_heads import arms as induction_heads
from anymamba.experiments.selective_copying import arms as selective_copying
from anymamba.experiments.selective_copying.measure import model_config
from anymamba.lab.experiment import SCALES, Arm
from anymamba.lab.language import PEAKS, training_flops
from anymamba.lab.optimization import WARM_UP, Batch, Optimization, TrainingStep
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.ops.devices import usable_device
from benchmarks.gpu_profile import GROUPS, profile
from benchmarks.timing import machine, table

SHARE_LIMIT = 15
"""Percent of a step that anything but products and scans may take."""


class Shape(NamedTuple):
    """Of a batch."""

    rows: int
    window: int
    """Tokens of a row."""
    labels_a_row: int | None = None
    """As in `TrainingStep`."""


class Training(NamedTuple):
    """What the speed of an arm depends on."""

    model: ModelConfig
    how: Optimization
    shapes: tuple[Shape, ...]
    """Batches of these shapes take turns."""
    flops_per_token: float
    checkpointing: bool = False


def training_of(arm: Arm) -> Training | None:
    """The training of an arm; None if it does not train a language model."""
    settings = arm.settings
    if isinstance(settings, associative_recall.Settings):
        pairs = zip(sources(settings), settings.tasks, strict=False)
        shapes = tuple(Shape(source.rows, task.length, source.labels_a_row) for source, task in pairs)
        return Training(settings.model, settings.optimization, shapes, flops_per_token(settings))
    if isinstance(settings, selective_copying.Settings):
        return of_one_shape(model_config(settings), settings.optimization, settings.task.length)
    if isinstance(settings, induction_heads.Settings):
        return of_one_shape(settings.model, settings.optimization, settings.train_length)
    if isinstance(getattr(settings, "model", None), ModelConfig) and hasattr(settings, "window"):
        training = of_one_shape(settings.model, settings.optimization, settings.window)
        return training._replace(checkpointing=getattr(settings, "checkpointing", False))
    return None


def of_one_shape(model: ModelConfig, how: Optimization, window: int) -> Training:
    """A training whose batches have as many rows as its settings say."""
    return Training(model, how, (Shape(how.batch_size, window),), training_flops(model, window))


def different(arms: list[Arm]) -> Iterator[tuple[Arm, int]]:
    """Arms that train and differ in more than rate and seed, and how often each is run."""
    seen: dict[str, list[Any]] = {}
    for arm in arms:
        training = training_of(arm)
        if training is not None:
            key = repr(training._replace(how=replace(training.how, learning_rate=0.0)))
            seen.setdefault(key, [arm, 0])[1] += arm.seeds
    yield from ((arm, runs) for arm, runs in seen.values())


def measured(arm: Arm, device: torch.device, steps: int, shares: bool) -> dict[str, Any]:
    """The speed of an arm on random bytes."""
    training = training_of(arm)
    assert training is not None, "different() has left out the others"
    torch.manual_seed(0)
    model = LanguageModel(training.model).to(device)
    model.activation_checkpointing = training.checkpointing
    take = TrainingStep(model, training.how)
    batches = [batch_of(shape, training.model, device) for shape in training.shapes]
    start = time.perf_counter()
    seconds = [seconds_a_step(take, *batch, steps, device) for batch in batches]
    rate = sum(shape.rows * shape.window for shape in training.shapes) / sum(seconds)
    peak = next(
        (p for name, p in PEAKS.items() if device.type == "cuda" and name in torch.cuda.get_device_name()), None
    )
    return {
        "bytes_per_second": rate,
        "of_peak": rate * training.flops_per_token / peak if peak else None,
        "recorded": take.not_recorded is None or take.not_recorded,
        "minutes": sum(seconds) / len(seconds) * training.how.steps / 60,
        "first_seconds": time.perf_counter() - start - sum(seconds) * steps,
        "gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "shares": shares_of(model, training, batches) if shares and device.type == "cuda" else None,
    }


def batch_of(shape: Shape, model: ModelConfig, device: torch.device) -> tuple[Batch, int | None]:
    """Random bytes, where labels are few at the first positions, and the labels of a row."""
    rows = torch.randint(min(256, model.vocab_size), (shape.rows, shape.window + 1), device=device)
    labels = rows[:, 1:].clone()
    if shape.labels_a_row is not None:
        labels[:, shape.labels_a_row :] = -100
    return (rows[:, :-1].contiguous(), labels), shape.labels_a_row


def seconds_a_step(take: TrainingStep, batch: Batch, labels: int | None, steps: int, device: torch.device) -> float:
    """The mean over steps that are queued one after the other, after those that compile and record."""
    for i in range(WARM_UP + 2):
        take(batch, i + 1, labels)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(steps):
        take(batch, i + 1, labels)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def shares_of(model: LanguageModel, training: Training, batches: list[tuple[Batch, int | None]]) -> dict[str, float]:
    """Percent of the kernels' time of a plain step of each shape in each group."""
    take = TrainingStep(model, training.how)
    take.not_recorded = "it is profiled"
    times = profile(lambda: [take(batch, 1, labels) for batch, labels in batches], 0.0)
    whole = sum(times[group] for group in GROUPS)
    return {group: 100 * times[group] / whole for group in GROUPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", default="scaling", help="defaults to scaling")
    parser.add_argument("--scale", choices=SCALES, default="gpu")
    parser.add_argument("--arms", nargs="+", default=[], help="defaults to all")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-shares", action="store_true", help="do not profile")
    parser.add_argument("--backend", help="of every op that has it; defaults to the one that serves")
    parser.add_argument("--json", help="a file for all numbers")
    options = parser.parse_args()
    device = torch.device(usable_device(options.device))
    arms = [
        arm
        for arm in load_experiment(options.experiment).arms(options.scale)
        if not options.arms or arm.name in options.arms
    ]
    found, rows, total = {}, [], 0.0
    for arm, runs in different(arms):
        try:
            with anymamba.backend(options.backend) if options.backend else nullcontext():
                values = measured(arm, device, options.steps, not options.no_shares)
        except Exception as error:  # the other arms go on
            print(f"{arm.name} failed: {type(error).__name__}: {error}"[:500], file=sys.stderr, flush=True)
            continue
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        found[arm.name] = values
        total += runs * values["minutes"]
        share = "" if values["of_peak"] is None else f"{100 * values['of_peak']:.1f}"
        shares = [f"{values['shares'][g]:.0f}" for g in GROUPS] if values["shares"] else []
        rows.append(
            [
                arm.name,
                f"{values['bytes_per_second']:,.0f}",
                share,
                str(values["recorded"]),
                f"{runs} x {values['minutes']:.2f}",
                *shares,
            ]
        )
        print(rows[-1], f"first steps {values['first_seconds']:.1f} s", file=sys.stderr, flush=True)
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(found, file, indent=1)
    header = [
        "arm",
        "tokens a second",
        "of peak, %",
        "recorded",
        "minutes",
        *(GROUPS if rows and len(rows[0]) > 5 else []),
    ]
    print(f"{machine()}\n\n{table(header, rows)}\n\nAll arms and seeds: {total:.1f} minutes without evaluations.")
    print(f"Anything but products and scans should take at most {SHARE_LIMIT} % of a step.")


if __name__ == "__main__":
    main()
