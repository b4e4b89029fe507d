"""Every experiment at toy size through the command line: files, charts, resumption (`make experiments-smoke`)."""

from __future__ import annotations

import json

import pytest

from anymamba.cli import main
from anymamba.experiments import EXPERIMENTS, load_experiment
from anymamba.experiments.experiment import SCALES
from anymamba.experiments.results import as_json


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_at_toy_size(name, tmp_path, capsys, monkeypatch):
    command = ["experiment", name, "--scale", "toy", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert main([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    files_are_whole(name, tmp_path, results)
    resumption(name, tmp_path, command, monkeypatch)


def files_are_whole(name, folder, results) -> None:
    """results.json, a file for each arm and seed, the report, its charts as PNG and SVG."""
    assert json.loads((folder / "results.json").read_text()) == results
    keys = [f"{record['arm']}-seed{record['seed']}" for record in results["records"]]
    assert keys == results["planned"] and len(set(keys)) == len(keys)
    assert {path.stem for path in (folder / "arms").iterdir()} == set(keys)
    report = (folder / "report.md").read_text()
    assert report.startswith(f"# {load_experiment(name).title}\n") and "## How it was run" in report
    assert "Not measured yet" not in report
    charts = sorted(path.stem for path in folder.glob("*.png"))
    assert charts and charts == sorted(path.stem for path in folder.glob("*.svg"))
    for chart in charts:
        assert f"![{chart}]({chart}.png)" in report
        assert (folder / f"{chart}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (folder / f"{chart}.svg").read_text()


def resumption(name, folder, command, monkeypatch) -> None:
    """A second run measures nothing; a lost arm is measured again, alone."""
    experiment, measured = load_experiment(name), []
    whole = type(experiment).measure

    def measure(self, arm, context):
        measured.append(arm.name)
        return whole(self, arm, context)

    monkeypatch.setattr(type(experiment), "measure", measure)
    report = (folder / "report.md").read_text()
    assert main(command) == 0 and measured == []
    assert (folder / "report.md").read_text() == report
    lost = experiment.arms("toy")[0].name
    (folder / "arms" / f"{lost}-seed0.json").unlink()
    assert main(command) == 0 and measured == [lost]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_arms_at_every_scale(name, scale):
    arms = load_experiment(name).arms(scale)
    names = [arm.name for arm in arms]
    assert names and len(set(names)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") for name in names)
    assert all(arm.seeds >= 1 and as_json(arm.settings) for arm in arms)
