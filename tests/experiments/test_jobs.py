"""Several arms at a time, each in a process of its own."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from anymamba.cli import main
from anymamba.lab import jobs
from anymamba.lab.experiment import Arm, Context, Experiment
from anymamba.lab.jobs import run_in_jobs
from anymamba.lab.results import read_results


@dataclass(frozen=True)
class Settings:
    rate_of: tuple[str, ...] = ()
    how: str = ""


def arms(scale: str, bad: str = "") -> list[Arm]:
    names = {"last": ("first-1", "first-2"), "first-1": (), "first-2": (), "other": ()}
    return [Arm(name, Settings(rates, bad if name == "other" else "")) for name, rates in names.items()]


def measure(settings: Settings, context: Context) -> dict[str, Any]:
    if settings.how == "raises":
        raise FloatingPointError("the loss is nan")
    assert context.saving is not None
    mark = context.saving.path.with_name("died")
    if settings.how == "dies once" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    context.progress(0, 1, "waiting")
    known = [record.arm for record in context.finished().records] if context.finished else []
    time.sleep(1)
    threads = torch.get_num_threads()
    return {"pid": os.getpid(), "known": known, "threads": threads, "roll": torch.rand(()).item()}


def load(bad: str = "") -> Experiment:
    return Experiment("dice", "Dice", "None.", partial(arms, bad=bad), measure, lambda r: (), lambda r: {}, {})


def test_every_arm_once_and_after_those_that_it_needs(tmp_path):
    told = []
    results = run_in_jobs(load, "toy", tmp_path, 2, progress=lambda *what: told.append(what))
    values = {record.arm: record.values for record in results.records}
    assert list(values) == ["last", "first-1", "first-2", "other"] and {len(results.of(arm)) for arm in values} == {1}
    assert len({v["pid"] for v in values.values()} - {os.getpid()}) == 2
    assert {"first-1", "first-2"} <= set(values["last"]["known"])
    assert {v["threads"] for v in values.values()} == {max(1, (os.cpu_count() or 1) // 2)}
    assert len({v["roll"] for v in values.values()}) == 1, "the seed alone decides the numbers"
    assert {what[0].split(",")[0] for what in told} == set(values)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md"}


def test_an_arm_that_fails_for_all(tmp_path):
    with pytest.raises(RuntimeError, match=r"^job 1 failed: FloatingPointError: the loss is nan$"):
        run_in_jobs(partial(load, "raises"), "toy", tmp_path, 2)
    found = read_results(tmp_path)
    assert found is not None and {"first-1", "first-2"} <= set(found.arms) and "other" not in found.arms


def test_another_process_does_what_a_dead_one_has_left(tmp_path):
    with pytest.raises(RuntimeError, match=rf"^job \d failed: exit code {-signal.SIGKILL}$"):
        run_in_jobs(partial(load, "dies once"), "toy", tmp_path, 2)
    found = read_results(tmp_path)
    assert found is not None and found.arms == ["last", "first-1", "first-2", "other"]


def test_nothing_starts_where_nothing_can_run(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.multiprocessing, "get_context", lambda how: pytest.fail("a process was started"))
    with pytest.raises(ValueError, match="unknown arm 'none'"):
        run_in_jobs(load, "toy", tmp_path, 2, only=("none",))


def test_gpus_take_turns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(jobs._device_of(i, torch.device("cuda"))) for i in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {str(jobs._device_of(i, torch.device(d))) for i in range(3) for d in ("cuda:1", "cpu")} == {"cuda:1", "cpu"}


def test_the_verb(tmp_path: Path, capsys):
    words = ["experiment", "selective-copying", "--scale", "toy", "--out", str(tmp_path), "--device", "cpu"]
    assert main([*words, "--jobs", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == (tmp_path / "report.md").read_text() and err.splitlines()[-1].startswith("wrote ")
    assert main([*words, "--jobs", "0"]) == 2
    assert "jobs must be" in capsys.readouterr().err
