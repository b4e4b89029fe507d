"""Measures several arms of an experiment at a time, each in a process of its own; GPUs are shared in turn.

The processes share a folder of results, as several commands may: `running` has the rules. Small models leave most of a
GPU idle, so two or three arms at a time take little longer than one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from anymamba.base.errors import one_line
from anymamba.lab.experiment import Experiment, Results, Scale
from anymamba.lab.running import Failures, Progress, run_experiment


def run_in_jobs(
    load: Callable[[], Experiment],
    scale: Scale,
    folder: Path,
    n_jobs: int,
    *,
    only: Sequence[str] = (),
    device: torch.device | str = "cpu",
    threads: int | None = None,
    progress: Progress = lambda arm, done, total, text: None,
    **options: Any,
) -> Results:
    """`run_experiment` with up to `n_jobs` arms at a time.

    Args:
        load: makes the experiment in each process; it must be picklable.
        device: "cuda" without a number means all GPUs, job by job in turn.
        threads: CPU threads of each process; defaults to an equal part of the cores, or on a GPU to torch's choice.
        only, options: of `run_experiment`.
    Raises what `run_experiment` raises before anything is measured. An arm that fails does not keep the others from
    being measured, and one whose process is killed is tried by another process; then RuntimeError says which and why.
    """
    device = torch.device(device)
    report = partial(run_experiment, load(), scale, folder, **{**options, "only": only, "max_seconds": 0.0})
    results, failures = report(), Failures(folder)
    finished = {record.key for record in results.records}
    missing = [key for key in results.planned if key not in finished]
    todo = [key for key in missing if not only or key.rpartition("-seed")[0] in only]
    if not todo:
        return results
    n_jobs = min(n_jobs, len(todo))
    if threads is None and device.type == "cpu":
        threads = max(1, n_cores() // n_jobs)
    failures.forget()
    try:
        options = {**options, "only": only, "failures": failures}
        devices = [device_of(i, device) for i in range(n_jobs)]
        errors = _run(partial(_measure, load, scale, folder, threads, options), devices, progress)
        errors += [f"{key}: {why}" for key, why in failures.found().items()]
    finally:
        failures.forget()
    results = report()
    if errors:
        found = f"those that were are in {folder}, and the same command goes on from there"
        raise RuntimeError(f"not all arms were measured; {found}: {'; '.join(errors)}")
    return results


def n_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_of(job: int, device: torch.device) -> str:
    """The device of a job by its number."""
    if device.type != "cuda" or device.index is not None:
        return str(device)
    return f"cuda:{job % max(1, torch.cuda.device_count())}"


def _measure(
    load: Callable[[], Experiment],
    scale: Scale,
    folder: Path,
    threads: int | None,
    options: dict[str, Any],
    device: str,
    progress: Progress,
) -> None:
    """What a job does."""
    if threads is not None:
        torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    run_experiment(load(), scale, folder, device=device, progress=progress, **options)


# ------------------------------------------------------------------------------------------ processes


def _run(work: Callable[[str, Progress], None], devices: Sequence[str], progress: Progress) -> list[str]:
    """Do the work in a process for each device, and return what has gone wrong. All end with this one."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    jobs, readers = list[BaseProcess](), dict[Connection, int]()
    try:
        with _without_ctrl_c():
            for i, device in enumerate(devices):
                reader, writer = context.Pipe(duplex=False)
                readers[reader] = i
                jobs.append(context.Process(target=_job, args=(work, device, writer), name=f"job {i + 1}", daemon=True))
                jobs[-1].start()
                writer.close()
        return _follow(jobs, readers, progress)
    finally:
        started = [job for job in jobs if job.pid is not None]
        for job in started:
            job.terminate()
        for job in started:
            job.join()


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes that start meanwhile never get SIGINT, which a terminal sends to all: the first one ends the others."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # the first process starts it, which would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow(jobs: Sequence[BaseProcess], readers: dict[Connection, int], progress: Progress) -> list[str]:
    """Pass on what the processes say until all have ended."""
    errors = dict[int, str]()
    while readers:
        for reader in wait(list(readers)):
            assert isinstance(reader, Connection)
            try:
                said = reader.recv()
            except EOFError:
                i = readers.pop(reader)
                jobs[i].join()
                if jobs[i].exitcode:
                    errors.setdefault(i, f"its process has died with exit code {jobs[i].exitcode}")
                continue
            if isinstance(said, tuple):
                progress(*said)
            else:
                errors[readers[reader]] = said
    return [f"job {i + 1}: {why}" for i, why in sorted(errors.items())]


def _job(work: Callable[[str, Progress], None], device: str, writer: Connection) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    try:
        work(device, lambda *what: writer.send(what))
    except Exception as error:
        if os.environ.get("ANYMAMBA_DEBUG") == "1":
            traceback.print_exception(error)
        writer.send(f"{type(error).__name__}: {one_line(error)}")


def _end_with(sentinel: Any) -> None:
    """End this process when another one ends, however it does."""
    wait([sentinel])
    os._exit(1)
