"""Experiments in tests are so small that a second thread only costs time."""

from __future__ import annotations

from itertools import dropwhile, takewhile
from typing import Any

import pytest
import torch

from anymamba.lab.experiment import Experiment, Record, Results, Scale
from anymamba.lab.results import as_json


@pytest.fixture(autouse=True)
def one_thread():
    """One thread for each test, whatever number the last one set."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made_up(experiment: Experiment, scale: Scale, values: dict[str, list[dict[str, Any]]]) -> Results:
    """Results with these values, one dictionary for each seed of an arm; the other arms are planned and missing."""
    arms = experiment.arms(scale)
    records = [
        Record(arm.name, seed, as_json(arm.settings), own, 60.0, "abacus", "2026-01-01")
        for arm in arms
        for seed, own in enumerate(values.get(arm.name, []))
    ]
    planned = tuple(f"{arm.name}-seed{seed}" for arm in arms for seed in range(arm.seeds))
    return Results(experiment.name, scale, tuple(records), planned)


def verdicts(experiment: Experiment, results: Results) -> list[str]:
    """Those of all thresholds, in their order."""
    return [threshold.verdict for threshold in experiment.thresholds(results)]


def measured(experiment: Experiment, results: Results) -> list[list[float]]:
    """The numbers of all thresholds, in their order."""
    return [threshold.measured for threshold in experiment.thresholds(results)]


def rows(table: str) -> list[list[str]]:
    """The cells of the first Markdown table of a text, without its header."""
    lines = dropwhile(lambda line: not line.startswith("|"), table.splitlines())
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in takewhile(lambda line: line, lines)]
    return cells[2:]
