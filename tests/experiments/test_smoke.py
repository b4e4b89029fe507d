"""Every experiment at toy size through the command line: files, charts, resumption (`make experiments-smoke`)."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
import torch

from anymamba.cli import main
from anymamba.experiments import EXPERIMENTS, load_experiment
from anymamba.lab.experiment import SCALES, Context, Results
from anymamba.lab.report import report
from anymamba.lab.results import as_json, read_results
from anymamba.lab.running import measure


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_at_toy_size(name, tmp_path, capsys, monkeypatch):
    command = ["experiment", name, "--scale", "toy", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert main([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    files_are_whole(name, tmp_path, results)
    a_report_of_each_arm_alone(name, tmp_path)
    resumption(name, tmp_path, command, monkeypatch)


def files_are_whole(name, folder, results) -> None:
    """results.json, the report, and its charts as SVG: nothing else."""
    assert json.loads((folder / "results.json").read_text()) == results
    keys = [f"{record['arm']}-seed{record['seed']}" for record in results["records"]]
    assert keys == results["planned"] and len(set(keys)) == len(keys)
    report = (folder / "report.md").read_text()
    assert report.startswith(f"# {load_experiment(name).title}\n") and "## How it was run" in report
    assert "Not measured yet" not in report
    charts = list(load_experiment(name).figures)
    assert {p.name for p in folder.iterdir()} == {"results.json", "report.md", *(f"{chart}.svg" for chart in charts)}
    for chart in charts:
        assert f"![{chart}]({chart}.svg)" in report
        assert "</svg>" in (folder / f"{chart}.svg").read_text()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_report_before_anything_is_measured(name, tmp_path, capsys):
    command = ["experiment", name, "--scale", "toy", "--device", "cpu", "--max-minutes", "0", "--out", str(tmp_path)]
    assert main(command) == 0
    text, first = (tmp_path / "report.md").read_text(), load_experiment(name).arms("toy")[0].name
    assert f"Not measured yet: {first}-seed0" in text and "## Thresholds" in text
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md"}
    assert [t.verdict for t in load_experiment(name).thresholds(results_in(tmp_path))].count("not judged") > 0


def a_report_of_each_arm_alone(name, folder) -> None:
    """Tables and thresholds of one record, and the charts of the last one."""
    experiment, results = load_experiment(name), results_in(folder)
    for record in results.records:
        alone = replace(results, records=(record,))
        assert "Not measured yet" in report(experiment, alone)
    for draw in experiment.figures.values():
        draw(alone)


def results_in(folder) -> Results:
    found = read_results(folder)
    assert found is not None
    return found


def resumption(name, folder, command, monkeypatch) -> None:
    """A second run measures nothing; a lost record is measured again, alone."""
    experiment, measured = load_experiment(name), []

    def counted(settings, context):
        measured.append(settings)
        return experiment.measure(settings, context)

    module = importlib.import_module(f"anymamba.experiments.{name.replace('-', '_')}")
    monkeypatch.setattr(module, "EXPERIMENT", replace(experiment, measure=counted))
    report = (folder / "report.md").read_text()
    assert main(command) == 0 and measured == []
    assert (folder / "report.md").read_text() == report
    values = json.loads((folder / "results.json").read_text())
    del values["records"][0]
    (folder / "results.json").write_text(json.dumps(values))
    assert main(command) == 0 and measured == [experiment.arms("toy")[0].settings]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_arms_at_every_scale(name, scale):
    arms = load_experiment(name).arms(scale)
    names = [arm.name for arm in arms]
    assert names and len(set(names)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") for name in names)
    assert all(arm.seeds >= 1 and as_json(arm.settings) for arm in arms)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in ("speed", "zero-shot")])
def test_the_same_settings_and_seed_give_the_same_numbers(name):
    experiment = load_experiment(name)
    arm = experiment.arms("toy")[1]

    def numbers(seed: int) -> dict:
        values = measure(experiment, arm, Context(torch.device("cpu"), seed, lambda *told: None)).values
        tests = [{key: v for key, v in test.items() if key != "seconds"} for test in values.get("tests", [])]
        return {**values, "training_seconds": 0, "tokens_per_second": 0, "tests": tests}

    assert numbers(0) == numbers(0) != numbers(1)
