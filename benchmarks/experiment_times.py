"""How long the two longest experiments take at scale cpu: the seconds per step of each arm times its number of steps.

The times in their reports were measured while other work was running. The numbers of steps come from the committed
results, summed over all learning rates.

python -m benchmarks.experiment_times [--steps 40]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from anymamba.experiments import load_experiment
from anymamba.lab.experiment import Arm, Context, Experiment, Record
from anymamba.lab.results import read_results
from benchmarks.timing import machine, table

NAMES = ("selective-copying", "associative-recall")
FOLDER = Path(__file__).parents[1] / "docs" / "experiments"
LIMIT = 60
"""Minutes for one seed of all arms."""


def seconds_per_step(experiment: Experiment, arm: Arm, steps: int) -> float:
    """The better of two short trainings. Each includes one evaluation, a larger share than in a long training, so this
    is an upper bound."""
    settings: Any = arm.settings
    short = replace(settings, optimization=replace(settings.optimization, steps=steps))
    if hasattr(settings, "more_learning_rates"):
        short = replace(short, more_learning_rates=())
    context = Context(torch.device("cpu"), 0, lambda done, total, words: None)
    trained = min(experiment.measure(short, context)["training_seconds"] for _ in range(2))
    return trained / steps


def steps_taken(arm: Arm, record: Record) -> int:
    """The steps of all learning rates that were tried. At most one of them ended early; the others took all steps."""
    settings: Any = arm.settings
    n_rates = len(record.values.get("sweep", [None]))
    return (n_rates - 1) * settings.optimization.steps + record.values["steps"]


def measured(name: str, steps: int) -> list[list[str]]:
    """Rows of the table: each arm, and their sum."""
    experiment = load_experiment(name)
    results = read_results(FOLDER / name)
    assert results is not None, f"{FOLDER / name} has no results"
    rows, total = [], 0.0
    for arm in experiment.arms("cpu"):
        taken = mean(steps_taken(arm, record) for record in results.of(arm.name))
        seconds = seconds_per_step(experiment, arm, steps)
        total += seconds * taken / 60
        rows.append([name, arm.name, f"{1000 * seconds:.0f}", f"{taken:,.0f}", f"{seconds * taken / 60:.1f}"])
    return [*rows, [name, "all", "", "", f"**{total:.1f}** (limit {LIMIT})"]]


def run(steps: int = 40) -> str:
    """Measure and return the Markdown of the results."""
    header = ["experiment", "arm", "ms a step", "steps of a seed", "minutes"]
    return table(header, [row for name in NAMES for row in measured(name, steps)]) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    print(machine(), "\n")
    print(run(parser.parse_args().steps))
