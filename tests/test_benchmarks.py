"""The benchmarks start, and measure arms before a run."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anymamba.data.synthetic.recall import Recall
from anymamba.experiments import load_experiment

FOLDER = Path(__file__).parent.parent / "benchmarks"
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("__"))


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_can_be_imported(name):
    try:
        importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        if not error.name or error.name.split(".")[0] in ("anymamba", "benchmarks"):
            raise
        pytest.skip(f"it needs {error.name}, which the extra bench has")


@pytest.mark.parametrize("experiment", ["selective-copying", "induction-heads", "associative-recall", "scaling"])
def test_the_speed_of_an_arm_before_a_run(experiment):
    from benchmarks.experiment_speed import different, measured

    arm, runs = next(different(load_experiment(experiment).arms("toy")))
    values = measured(arm, torch.device("cpu"), 1, shares=True)
    assert runs >= 1 and values["bytes_per_second"] > 0 and values["minutes"] > 0 and values["shares"] is None


def test_the_speed_of_an_arm_whose_batches_take_turns(monkeypatch):
    from benchmarks import experiment_speed

    arm = load_experiment("associative-recall").arms("toy")[0]
    tasks = (Recall(1, 16, 16), Recall(2, 32, 16))
    arm = replace(arm, settings=replace(arm.settings, tasks=tasks))
    training = experiment_speed.training_of(arm)
    assert [tuple(shape) for shape in training.shapes] == [(4, 16, 1), (2, 32, 2)]
    monkeypatch.setattr(experiment_speed, "seconds_a_step", lambda take, batch, labels, *rest: batch[0].numel() / 640)
    values = experiment_speed.measured(arm, torch.device("cpu"), 1, shares=False)
    assert values["bytes_per_second"] == pytest.approx(640)
    assert values["minutes"] == pytest.approx(0.1 * arm.settings.optimization.steps / 60)
