"""`--profile FOLDER`: a trace of some steps, which TensorBoard and Perfetto open, and a table of where a step went."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from anymamba.base.files import atomic_file
from anymamba.console.output import ShowProgress, TrainingReport, say

if TYPE_CHECKING:
    from torch.profiler import profile

WARM_UP, RECORDED = 3, 5
"""Training steps that are left out at the start, and that are recorded after them."""
MOST_ROWS = 12
"""Rows of the table of operations."""


class TimeSpent(NamedTuple):
    """A row of a table: something that happened in the recorded steps."""

    name: str
    calls: int
    cpu: float
    """Milliseconds on the CPU in all recorded steps; for an operation without those that it called."""
    device: float
    """Milliseconds on the GPU; 0 without one."""
    is_region: bool
    """Whether it is a named region of code rather than an operation."""


class StepProfile:
    """Records some steps, then writes the trace and prints the tables. Only one can run at a time.

    Args:
        folder: where the trace is written; it is made if it does not exist.
        verb: begins the name of the trace.
        phases: names of the regions in which the code runs (`torch.profiler.record_function`), in the table's order.
    Raises OSError at once if the folder cannot be written.
    """

    def __init__(self, folder: Path, verb: str, phases: Sequence[str]) -> None:
        _require_writable(folder)
        self.folder, self.verb, self.phases = folder, verb, phases
        self._profile: profile | None = None
        self._started = 0.0

    @property
    def is_recording(self) -> bool:
        """Whether it has been started and not stopped."""
        return self._profile is not None

    def start(self) -> None:
        """Begin to record."""
        import torch
        from torch.profiler import profile

        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # lower levels print lines to stderr
        self._profile = profile(activities=torch.profiler.supported_activities(), acc_events=True)
        self._profile.start()
        self._started = time.perf_counter()

    def stop(self, what: str, n_steps: int = 1) -> None:
        """Write the trace and print the tables, unless nothing is being recorded.

        Args:
            what: heads the first table: what the times are of.
            n_steps: divides the times.
        """
        if self._profile is None:
            return
        import torch

        total = (time.perf_counter() - self._started) * 1000
        recorded, self._profile = self._profile, None
        recorded.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.verb}.{time.time_ns() // 1_000_000}.pt.trace.json.gz"
        with atomic_file(path) as temporary:
            recorded.export_chrome_trace(str(temporary))
        cpu = torch.autograd.DeviceType.CPU  # the others are kernels, whose time their operations have, too
        rows = [_time_spent(event) for event in recorded.key_averages() if event.device_type == cpu]
        for line in table(what, rows, self.phases, total, n_steps):
            say(line)
        say(f"wrote {path}; open it in https://ui.perfetto.dev, or in TensorBoard with torch-tb-profiler")


class ProfiledReport(TrainingReport):
    """Shows the progress of a run, and profiles a few of its steps after the first ones."""

    def __init__(self, show: ShowProgress, folder: Path) -> None:
        super().__init__(show)
        self.profile = StepProfile(folder, "train", ("batches", "forward", "backward", "optimizer"))
        self.step = self.first = (
            0  # number of steps of this process, and how many of them came before the recorded ones
        )
        self.done = False

    def on_step(self, metrics: dict[str, Any]) -> None:
        """After every step."""
        super().on_step(metrics)
        if self.done:
            return
        self.step += 1
        left = metrics["steps"] - metrics["step"]
        if self.profile.is_recording:
            if self.step == self.first + RECORDED or left == 0:
                self.close()
        elif self.step >= WARM_UP or left <= RECORDED:
            self.first = self.step
            if left:
                self.profile.start()
            else:
                say("warning: nothing was profiled; --profile needs a run with at least two steps left")

    def close(self) -> None:
        """Write what was recorded; also when a run ends early."""
        self.done = True
        n_steps = max(1, self.step - self.first)
        self.profile.stop(f"one step of {n_steps}", n_steps)


def phase(name: str) -> AbstractContextManager[Any]:
    """A context that gives a region of code its name in a trace."""
    from torch.profiler import record_function

    return record_function(name)


def table(what: str, rows: Sequence[TimeSpent], phases: Sequence[str], total: float, n_steps: int) -> Iterator[str]:
    """The lines of both tables: the phases of a step, and the operations that took most of it.

    Args:
        what: heads the first table.
        rows: phases and operations, in any order.
        phases: which rows are phases, in order.
        total: milliseconds of all steps together.
        n_steps: number of steps.
    """
    with_device = any(row.device for row in rows)
    found = {row.name: row for row in rows}
    parts = [found[name] for name in phases if name in found]
    other = TimeSpent("other", n_steps, max(0.0, total - sum(row.cpu for row in parts)), 0.0, True)
    yield from _lines(what, [*parts, other], total, n_steps, with_device)
    operations = sorted(
        (row for row in rows if not row.is_region), key=lambda row: -(row.device if with_device else row.cpu)
    )
    yield ""
    yield from _lines("operation", operations[:MOST_ROWS], total, n_steps, with_device)


def _lines(head: str, rows: Sequence[TimeSpent], total: float, n_steps: int, with_device: bool) -> Iterator[str]:
    width = 40
    gpu = f" {'GPU ms':>9}" if with_device else ""
    yield f"{head:<{width}} {'calls':>8} {'CPU ms':>9} {'CPU %':>6}{gpu}"
    for row in rows:
        name = row.name if len(row.name) <= width else row.name[: width - 3] + "..."
        gpu = f" {row.device / n_steps:>9.2f}" if with_device else ""
        share = 100 * row.cpu / max(total, 1e-9)
        yield f"{name:<{width}} {row.calls / n_steps:>8.1f} {row.cpu / n_steps:>9.2f} {share:>6.1f}{gpu}"


def _time_spent(event: Any) -> TimeSpent:
    """A row of torch's averages: for regions with names the whole time, for operations without those they called."""
    name, region = event.key.removeprefix("autograd::engine::evaluate_function: "), event.is_user_annotation
    cpu = event.cpu_time_total if region else event.self_cpu_time_total
    device = event.device_time_total if region else event.self_device_time_total
    return TimeSpent(name, event.count, cpu / 1000, device / 1000, region)


def _require_writable(folder: Path) -> None:
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is not a folder; choose another one with --profile", str(place))
    if not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, "cannot be written; choose another folder with --profile", str(place))
