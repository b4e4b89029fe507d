"""Several arms at a time, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from anymamba.base.files import own_file
from anymamba.cli import main
from anymamba.experiments import load_experiment
from anymamba.lab import jobs
from anymamba.lab.experiment import Arm, Context, Experiment
from anymamba.lab.jobs import run_in_jobs
from anymamba.lab.results import read_results
from anymamba.lab.running import run_experiment


@dataclass(frozen=True)
class Settings:
    rate_of: tuple[str, ...] = ()
    how: str = ""


NEEDS = {"bad": (), "last": ("first-1", "first-2"), "first-1": (), "first-2": (), "other": ()}
GOOD = [name for name in NEEDS if name != "bad"]


def arms(scale: str, how: str) -> list[Arm]:
    return [Arm(name, Settings(needs, how if name == "bad" else "")) for name, needs in NEEDS.items()]


def measure(settings: Settings, context: Context) -> dict[str, Any]:
    assert context.saving is not None and context.finished is not None
    folder = context.saving.path.parent
    context.progress(0, 1, "waiting")
    if settings.how == "raises":
        raise FloatingPointError("the loss is nan")
    if settings.how == "dies once" and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if settings.how == "waits":
        (folder / "waits").write_text(str(os.getpid()))
        time.sleep(60)
    known = [record.arm for record in context.finished().records]
    time.sleep(0.5)
    threads = torch.get_num_threads()
    return {"pid": os.getpid(), "known": known, "threads": threads, "roll": torch.rand(()).item()}


def load(how: str = "") -> Experiment:
    return Experiment("dice", "Dice", "None.", partial(arms, how=how), measure, lambda r: (), lambda r: {}, {})


def in_folder(folder: Path) -> list[str]:
    found = read_results(folder)
    return [] if found is None else found.arms


def test_every_arm_once_and_after_those_that_it_needs(tmp_path):
    told = []
    results = run_in_jobs(load, "toy", tmp_path, 2, progress=lambda *what: told.append(what))
    values = {record.arm: record.values for record in results.records}
    assert list(values) == list(NEEDS) and {len(results.of(arm)) for arm in values} == {1}
    assert os.getpid() not in {v["pid"] for v in values.values()}
    assert {"first-1", "first-2"} <= set(values["last"]["known"])
    assert {v["threads"] for v in values.values()} == {max(1, jobs.n_cores() // 2)}
    assert len({v["roll"] for v in values.values()}) == 1, "the seed alone decides the numbers"
    assert {what[0].split(",")[0] for what in told} == set(values)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md"}


def test_an_arm_that_fails_is_left_alone_by_the_others(tmp_path):
    with pytest.raises(RuntimeError, match=r": bad-seed0: FloatingPointError: the loss is nan$"):
        run_in_jobs(partial(load, "raises"), "toy", tmp_path, 2)
    assert in_folder(tmp_path) == GOOD
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md"}


def test_an_arm_whose_process_is_killed_is_tried_by_another(tmp_path):
    with pytest.raises(RuntimeError, match=rf": job \d: its process has died with exit code {-signal.SIGKILL}$"):
        run_in_jobs(partial(load, "dies once"), "toy", tmp_path, 2)
    assert in_folder(tmp_path) == list(NEEDS)


def test_as_many_processes_as_there_are_arms(tmp_path, monkeypatch):
    results = run_in_jobs(load, "toy", tmp_path, 4, only=("other",))
    assert [record.values["threads"] for record in results.records] == [jobs.n_cores()]
    monkeypatch.setattr(jobs.multiprocessing, "get_context", lambda how: pytest.fail("a process was started"))
    assert run_in_jobs(load, "toy", tmp_path, 4, only=("other",)).arms == ["other"]
    with pytest.raises(ValueError, match="unknown arm 'none'"):
        run_in_jobs(load, "toy", tmp_path, 2, only=("none",))


def test_what_others_measure_is_not_waited_for_after_the_time(tmp_path):
    with own_file(tmp_path / "other-seed0"), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(run_experiment, load(), "toy", tmp_path, only=("other",), max_seconds=0.2)
        assert waiting.result(timeout=10).arms == [] == in_folder(tmp_path)


def test_an_arm_does_not_wait_for_what_nobody_measures(tmp_path):
    """A measurement that needs it says so."""
    assert run_experiment(load(), "toy", tmp_path, only=("last",)).arms == ["last"]


def test_gpus_take_turns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [jobs.device_of(i, torch.device("cuda")) for i in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {jobs.device_of(i, torch.device(d)) for i in range(3) for d in ("cuda:1", "cpu")} == {"cuda:1", "cpu"}


MAIN = """
import sys
from functools import partial
from pathlib import Path
import test_jobs
from anymamba.lab.jobs import run_in_jobs
if __name__ == "__main__":
    run_in_jobs(partial(test_jobs.load, "waits"), "toy", Path(sys.argv[1]), 2)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_jobs_end_with_the_command(tmp_path, number):
    (tmp_path / "main.py").write_text(MAIN)
    out = tmp_path / "out"
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py"), str(out)],
        env={**os.environ, "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 60
    while not (out / "waits").exists() or not (out / "waits").read_text():
        assert time.monotonic() < end and command.poll() is None
        time.sleep(0.05)
    pid = int((out / "waits").read_text())
    os.killpg(command.pid, number) if number == signal.SIGINT else command.kill()
    said = command.communicate(timeout=30)[1]
    assert command.returncode != 0 and said.count("Traceback") <= 1, "only the first process is interrupted"
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < end
        time.sleep(0.05)


CHILD = """
import multiprocessing, signal
from anymamba.lab.jobs import _without_ctrl_c

def blocked(writer):
    writer.send(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    with _without_ctrl_c():
        process = context.Process(target=blocked, args=(writer,))
        process.start()
    print(reader.recv())
    process.join()
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="this system has no masks of signals")
def test_the_first_process_that_starts_never_gets_ctrl_c(tmp_path):
    """Starting it also starts multiprocessing's own process, which unblocks the signal."""
    (tmp_path / "main.py").write_text(CHILD)
    done = subprocess.run([sys.executable, str(tmp_path / "main.py")], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


def test_the_verb(tmp_path: Path, capsys):
    words = ["experiment", "selective-copying", "--scale", "toy", "--out", str(tmp_path), "--device", "cpu"]
    words += ["--arms", *(arm.name for arm in load_experiment("selective-copying").arms("toy")[:2])]
    assert main([*words, "--jobs", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == (tmp_path / "report.md").read_text() and err.splitlines()[-1].startswith("wrote ")
    assert main([*words, "--jobs", "0"]) == 2
    assert "jobs must be" in capsys.readouterr().err
