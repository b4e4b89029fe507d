"""What each logger is told, and that a run that goes on stays the same run there. The trackers are stand-ins."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_trainer import StopAt

from anymamba.training import loggers
from anymamba.training.config import TrainConfig
from anymamba.training.metrics import read_metrics
from anymamba.training.trainer import resume, train

pytestmark = pytest.mark.usefixtures("without_plots")


class Calls(list):
    """Records calls of the functions that it makes."""

    def function(self, name: str, result: Any = None):
        def call(*arguments: Any, **options: Any) -> Any:
            self.append((name, arguments, options))
            return result

        return call

    def of(self, name: str) -> list[dict[str, Any]]:
        return [options | {"arguments": arguments} for called, arguments, options in self if called == name]


def install(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    for name, contents in modules.items():
        module = ModuleType(name.replace("_", "."))
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(loggers, "is_installed", lambda module: True)


@pytest.fixture
def wandb(monkeypatch) -> Calls:
    calls = Calls()
    run = SimpleNamespace(**{name: calls.function(name) for name in ("log", "define_metric", "finish")})
    install(monkeypatch, wandb={"init": calls.function("init", run)})
    return calls


@pytest.fixture
def trackio(monkeypatch) -> Calls:
    calls = Calls()
    run = SimpleNamespace(log=calls.function("log"), finish=calls.function("finish"))
    install(monkeypatch, trackio={"init": calls.function("init", run)})
    return calls


@pytest.fixture
def mlflow(monkeypatch) -> Calls:
    calls = Calls()
    created = SimpleNamespace(info=SimpleNamespace(run_id="abc"))
    results = {"get_experiment_by_name": None, "create_experiment": "7", "create_run": created}
    names = [*results, "log_batch", "update_run", "set_terminated"]
    client = SimpleNamespace(**{name: calls.function(name, results.get(name)) for name in names})
    install(
        monkeypatch,
        mlflow={},
        mlflow_entities={"Metric": lambda *values: values, "Param": lambda *values: values},
        mlflow_tracking={"MlflowClient": lambda: client},
    )
    return calls


def interrupted(config: TrainConfig, run: Path, log: str) -> list[dict[str, Any]]:
    """Train with a crash in the middle, resume, and return the lines of metrics.jsonl."""
    with pytest.raises(RuntimeError, match="crash"):
        train(replace(config, log=(log,)), run, StopAt(7))
    resume(run)
    assert not (run / "tensorboard").exists()
    return read_metrics(run)


def numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {f"{line['kind']}/{k}": v for k, v in line.items() if k not in ("step", "kind") and v is not None}


def timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if not k.endswith("tokens_per_second")}


def test_wandb(config, tmp_path, wandb):
    lines = interrupted(config, tmp_path / "run", "wandb")
    first, second = wandb.of("init")
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert (first["project"], first["name"]) == ("anymamba", "run") and first["config"]["batch_size"] == 3
    told = [timeless(entry["arguments"][0]) for entry in wandb.of("log")]
    wanted = [timeless({"step": line["step"], **numbers(line)}) for line in lines]
    assert told[-len(wanted) + 6 :] == wanted[6:], "the steps after the checkpoint at step 5"
    assert all(entry in told for entry in wanted) and all(entry in wanted for entry in told)
    assert len(wandb.of("finish")) == 2


def test_trackio(config, tmp_path, trackio, monkeypatch):
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    lines = interrupted(config, tmp_path / "run", "trackio")
    first, second = trackio.of("init")
    assert first["name"] == second["name"] and first["project"] == "mine" and second["resume"] == "allow"
    told = [(entry["step"], timeless(entry["arguments"][0])) for entry in trackio.of("log")]
    wanted = [(line["step"], timeless(numbers(line))) for line in lines]
    assert all(entry in told for entry in wanted) and all(entry in wanted for entry in told)
    assert len(trackio.of("finish")) == 2


def test_mlflow(config, tmp_path, mlflow):
    lines = interrupted(config, tmp_path / "run", "mlflow")
    assert len(mlflow.of("create_run")) == 1 and mlflow.of("create_run")[0]["run_name"] == "run"
    assert [entry["arguments"] for entry in mlflow.of("update_run")] == [("abc",)]
    batches = mlflow.of("log_batch")
    params = dict(pair for entry in batches for pair in entry.get("params", ()))
    assert params["model.d_model"] == "16" and max(len(entry.get("params", ())) for entry in batches) <= 100
    told = {
        (name, step, value) for e in batches for name, value, _, step in e.get("metrics", ()) if "second" not in name
    }
    wanted = {(k, line["step"], float(v)) for line in lines for k, v in timeless(numbers(line)).items()}
    assert told == wanted
    assert [entry["arguments"] for entry in mlflow.of("set_terminated")] == [("abc",)] * 2


def test_the_ids_are_kept_in_the_run(config, tmp_path, wandb):
    train(replace(config, steps=1, log=("tensorboard", "wandb")), tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "trackers.json").read_text())
    assert kept == {"wandb": wandb.of("init")[0]["id"]} and list((tmp_path / "run" / "tensorboard").glob("events*"))


@pytest.mark.parametrize("name", loggers.PACKAGES)
def test_a_package_that_is_missing_is_told_before_anything_is_written(config, tmp_path, monkeypatch, name):
    monkeypatch.setattr(loggers, "is_installed", lambda module: False)
    with pytest.raises(ModuleNotFoundError, match=rf"--log {name} needs .*pip install 'anymamba\[\w+\]'"):
        train(replace(config, log=(name,)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_failure_of_the_tracker_at_the_start_leaves_nothing(config, tmp_path, wandb, monkeypatch):
    def refuse(**options):
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(RuntimeError, match="no API key"):
        train(replace(config, log=("wandb",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_does_not_end_the_run(config, tmp_path, mlflow, monkeypatch):
    """metrics.jsonl has everything; the tracker is told of once and left alone."""

    def fail(*arguments, metrics=(), **options):
        if metrics and metrics[0][3] == 3:
            raise ConnectionError("server gone")
        mlflow.append(("sent", arguments, {"metrics": metrics}))

    monkeypatch.setattr(sys.modules["mlflow.tracking"].MlflowClient(), "log_batch", fail)
    with pytest.warns(UserWarning, match=r"mlflow failed \(server gone\).*metrics\.jsonl") as told:
        result = train(replace(config, steps=6, log=("mlflow",)), tmp_path / "run")
    assert result.steps == 6 and len(told) == 1
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert {metric[3] for entry in mlflow.of("sent") for metric in entry["metrics"]} == {1, 2}


def test_what_trackers_print_is_not_a_result(config, tmp_path, trackio, monkeypatch, capsys):
    init = sys.modules["trackio"].init
    monkeypatch.setattr(sys.modules["trackio"], "init", lambda **options: print("a banner") or init(**options))
    train(replace(config, steps=1, log=("trackio",)), tmp_path / "run")
    captured = capsys.readouterr()
    assert captured.out == "" and "a banner" in captured.err
