"""The committed results: a run resumes from them, and the report is what the code makes of them."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from anymamba.cli import main
from anymamba.experiments import load_experiment
from anymamba.lab.results import read_results

DOCS = Path(__file__).parents[2] / "docs" / "experiments"
HOLDING = {
    "selective-copying": (4, 5),
    "selective-copying-gpu": (9, 10),
    "induction-heads": (7, 8),
    "induction-heads-gpu": (13, 18),
    "induction-heads-paper": (4, 18),
    "associative-recall": (8, 8),
    "associative-recall-gpu": (22, 24),
    "selection-ablation": (2, 2),
    "speed": (6, 6),
    "speed-gpu": (5, 8),
    "scaling": (4, 4),
    "language-ablations": (3, 8),
    "zero-shot": (1, 2),
    "dna-size": (1, 2),
    "dna-length": (1, 2),
    "great-apes": (0, 2),
    "promoters": (3, 4),
    "promoters-gpu": (4, 4),
}
"""Thresholds that hold, of all."""


@pytest.fixture
def copied(tmp_path, monkeypatch, request):
    """A copy of what a run needs, the command that resumes it, and the settings that it measures."""
    source, folder, measured = DOCS / request.param, tmp_path / request.param, []
    folder.mkdir()
    for name in ("results.json", "notes.md"):
        shutil.copy(source / name, folder)
    published = read_results(source)
    experiment = load_experiment(published.experiment)
    lost = published.records[0]

    def measure(settings, context):
        measured.append((settings, context.seed))
        return lost.values

    module = importlib.import_module(f"anymamba.experiments.{experiment.name.replace('-', '_')}")
    monkeypatch.setattr(module, "EXPERIMENT", replace(experiment, measure=measure))
    command = ["experiment", experiment.name, "--scale", published.scale, "--out", str(folder), "--device", "cpu"]
    return source, folder, [*command, "--seeds", "1", "--arms", *published.arms], measured


each_folder = pytest.mark.parametrize("copied", HOLDING, indirect=True)


def test_every_committed_folder_is_known():
    assert {path.name for path in DOCS.iterdir() if path.is_dir()} == set(HOLDING)


@each_folder
def test_nothing_that_is_published_is_measured_again_and_the_report_is_what_it_was(copied):
    source, folder, command, measured = copied
    assert main(command) == 0 and measured == []
    assert (folder / "results.json").read_bytes() == (source / "results.json").read_bytes()
    assert (folder / "report.md").read_text(encoding="utf-8") == (source / "report.md").read_text(encoding="utf-8")
    assert {path.name for path in folder.iterdir()} == {path.name for path in source.iterdir()}


@each_folder
def test_a_record_that_is_missing_is_measured_alone(copied):
    source, folder, command, measured = copied
    values = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    lost = values["records"].pop(0)
    (folder / "results.json").write_text(json.dumps(values), encoding="utf-8")
    assert main(command) == 0 and [seed for _, seed in measured] == [lost["seed"]]
    again, published = read_results(folder), read_results(source)
    assert [(r.key, r.settings, r.values) for r in again.records] == [
        (r.key, r.settings, r.values) for r in published.records
    ]


@pytest.mark.parametrize("name", HOLDING)
def test_what_was_published_holds_as_it_did(name):
    published = read_results(DOCS / name)
    thresholds = load_experiment(published.experiment).thresholds(published)
    assert (sum(t.verdict == "holds" for t in thresholds), len(thresholds)) == HOLDING[name]
