"""How OpenMP's threads wait for each other beside other busy processes.

GNU's OpenMP lets a thread that waits spin for milliseconds before it sleeps, which is fastest on a quiet machine.
Beside another busy process, the threads that wait use up the time of the one that has work.
`python -m benchmarks.busy` measures it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Variables by which a user has already chosen."""

PERIOD = 0.25
"""Seconds between two looks at the load."""
BUSY, QUIET = 0.4, 0.2
"""Cores that other processes use, above and below which the machine counts as busy and as quiet."""


def watch_load() -> None:
    """From now on, have threads that wait sleep at once while other processes need the cores, unless the environment
    says how they wait."""
    if STAT.exists() and not any(name in os.environ for name in CHOICES):
        threading.Thread(target=watch, name="load", daemon=True).start()


# ------------------------------------------------------------------------------------------ the load

STAT = Path("/proc/stat")


class Ticks(NamedTuple):
    """Seconds since the start, of all cores that this process may use together."""

    busy: float
    """Not idle; this includes time that another virtual machine used."""
    own: float
    """Used by this process."""
    total: float


def ticks() -> Ticks:
    """Read the counters of the kernel."""
    allowed = {f"cpu{i}" for i in os.sched_getaffinity(0)}
    busy = total = 0
    for line in STAT.read_text().splitlines():
        name, *fields = line.split()
        if name in allowed:
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields[:8])
            busy += user + nice + system + irq + softirq + steal
            total += user + nice + system + irq + softirq + steal + idle + iowait
    per_second = os.sysconf("SC_CLK_TCK")
    times = os.times()
    return Ticks(busy / per_second, times.user + times.system, total / per_second)


def cores_of_others(before: Ticks, after: Ticks) -> float:
    """How many cores other processes kept busy between two readings."""
    seconds = (after.total - before.total) / len(os.sched_getaffinity(0))
    return max(0.0, after.busy - before.busy - (after.own - before.own)) / seconds if seconds else 0.0


def watch(sleep: Callable[[float], Any] = time.sleep) -> None:
    """Crowd OpenMP whenever its threads and the other processes need more cores than there are.

    Returns only where the load cannot be read, as in some sandboxes.
    """
    crowd: Crowd | None = None
    try:
        before = ticks()
    except (OSError, ValueError):
        return
    while True:
        sleep(PERIOD)
        after = ticks()
        others, before = cores_of_others(before, after), after
        imported = hasattr(sys.modules.get("torch"), "get_num_threads")  # it is there before its import has ended
        if crowd is None and others >= BUSY and imported:
            crowd = Crowd.start()
        elif crowd is not None and others < QUIET:
            crowd.stop()
            crowd = None


# ------------------------------------------------------------------------------------------ OpenMP


class Crowd:
    """A team of idle threads that makes GNU's OpenMP spin for 100 rounds only.

    It does so while its teams together have more threads than there are cores. The number of threads that compute does
    not change, and so neither do the results.
    """

    def __init__(self, size: int) -> None:
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._stay, args=(size,), name="crowd", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls) -> Crowd | None:
        """None where torch has another OpenMP, or so few threads that it leaves cores free."""
        threads, cores = sys.modules["torch"].get_num_threads(), len(os.sched_getaffinity(0))
        import ctypes

        has_gnu = hasattr(ctypes.CDLL(None), "GOMP_parallel")
        return cls(cores - threads + 2) if has_gnu and 1 < threads >= cores else None

    def _stay(self, size: int) -> None:
        """Make a team that does nothing (free(NULL)). It is dissolved when the thread that made it ends."""
        import ctypes

        process = ctypes.CDLL(None)
        process.GOMP_parallel(process.free, None, ctypes.c_uint(size), ctypes.c_uint(0))
        self._leave.wait()

    def stop(self) -> None:
        self._leave.set()
        self._thread.join()
