"""How OpenMP waits under the command line, alone and beside busy processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from types import ModuleType

import pytest

from anymamba.console import openmp
from anymamba.console.openmp import CHOICES, Ticks, cores_of_others, watch_load

needs_linux = pytest.mark.skipif(not openmp.STAT.exists(), reason="the load is read from /proc/stat")


@pytest.fixture
def started(monkeypatch):
    """Whether the watch was started."""
    begun = threading.Event()
    monkeypatch.setattr(openmp, "watch", begun.set)
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    return begun


@needs_linux
def test_the_load_is_watched(started):
    watch_load()
    assert started.wait(10)


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "infinity")])
def test_the_users_choice_stays(started, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    watch_load()
    assert not started.wait(0.2)


@needs_linux
def test_cores_of_others_leaves_out_our_own():
    n = len(os.sched_getaffinity(0))
    before = Ticks(busy=10.0, own=4.0, total=100.0)
    after = Ticks(busy=11.5, own=4.75, total=100.0 + n)  # one second
    assert cores_of_others(before, after) == pytest.approx(0.75)
    assert cores_of_others(before, before) == 0


@needs_linux
def test_a_process_that_starts_to_work_is_seen():
    def others() -> float:
        before = openmp.ticks()
        time.sleep(0.3)
        return cores_of_others(before, openmp.ticks())

    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert max(others() for _ in range(20)) > openmp.BUSY
    finally:
        busy.kill()
        busy.wait()


def watched(monkeypatch, loads: list[float]) -> list[str]:
    """What `watch` does about these loads, one a period."""
    done: list[str] = []

    class Crowd:
        @classmethod
        def start(cls):
            done.append("crowd")
            return cls()

        def stop(self):
            done.append("alone")

    left = iter(loads)
    monkeypatch.setattr(openmp, "Crowd", Crowd)
    monkeypatch.setattr(openmp, "ticks", lambda: Ticks(0, 0, 0))
    monkeypatch.setattr(openmp, "cores_of_others", lambda before, after: next(left))
    rounds = iter(loads)
    with pytest.raises(StopIteration):
        openmp.watch(sleep=lambda seconds: next(rounds))
    return done


@needs_linux
def test_threads_sleep_at_once_only_while_others_are_busy(monkeypatch):
    assert watched(monkeypatch, [0.0, 0.1, 0.3]) == []
    assert watched(monkeypatch, [0.0, 0.9, 1.0, 0.3, 0.1, 0.0, 1.0]) == ["crowd", "alone", "crowd"]


@needs_linux
def test_nothing_happens_while_torch_is_being_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))  # without any of its names
    assert watched(monkeypatch, [1.0, 1.0, 1.0]) == []


@needs_linux
@pytest.mark.parametrize("text", [None, "cpu0 1 2 3\n"])
def test_a_load_that_cannot_be_read_is_not_watched(monkeypatch, tmp_path, text):
    monkeypatch.setattr(openmp, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    if text is not None:
        openmp.STAT.write_text(text)
    openmp.watch(sleep=lambda seconds: pytest.fail("it watches"))


CROWD = """
import os, time, torch
from anymamba.console.openmp import Crowd
a = torch.ones(512, 512)
a @ a
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
crowd = Crowd.start()
if crowd is None:
    print("none")
else:
    time.sleep(0.2)
    print(threads() > before)
    crowd.stop()
    print((a @ a)[0, 0].item() == 512)
"""


@needs_linux
def test_a_crowd_comes_and_goes():
    done = subprocess.run([sys.executable, "-c", CROWD], capture_output=True, text=True, check=True)
    assert done.stdout.split() in (["True", "True"], ["none"])
