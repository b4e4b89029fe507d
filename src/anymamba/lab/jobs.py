"""Measures several arms of an experiment at a time, each in a process of its own; GPUs are shared in turn.

The processes share a folder of results, as several commands may: `running` has the rules. Small models leave most of a
GPU idle, so two or three arms at a time take little longer than one.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from anymamba.lab.experiment import Experiment, Results, Scale
from anymamba.lab.running import Progress, run_experiment

LOOK = 0.5
"""Seconds between two looks at whether a process has died."""


def run_in_jobs(
    load: Callable[[], Experiment],
    scale: Scale,
    folder: Path,
    n_jobs: int,
    *,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    progress: Progress = lambda arm, done, total, text: None,
    **options: Any,
) -> Results:
    """`run_experiment` with `n_jobs` arms at a time.

    Args:
        load: makes the experiment in each process; it must be picklable.
        device: "cuda" without a number means all GPUs, job by job in turn.
        threads: CPU threads of each process; defaults to an equal part of the cores, or on a GPU to torch's choice.
        options: of `run_experiment`.
    Raises what `run_experiment` raises before anything is measured, and RuntimeError if a process fails. Another one
    has tried its arm by then, and what is measured is kept.
    """
    device, nothing = torch.device(device), {**options, "max_seconds": 0.0}
    before = run_experiment(load(), scale, folder, **nothing)
    n_jobs = min(n_jobs, max(1, len(before.planned) - len(before.records)))
    if threads is None and device.type == "cpu":
        threads = max(1, (os.cpu_count() or 1) // n_jobs)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    said: Any = context.Queue()
    jobs = [
        context.Process(
            target=_job,
            args=(i, said, load, scale, folder, str(_device_of(i, device)), threads, options),
            name=f"job {i + 1}",
            daemon=True,
        )
        for i in range(n_jobs)
    ]
    try:
        for job in jobs:
            job.start()
        errors = _follow(jobs, said, progress)
    finally:
        for job in jobs:
            if job.is_alive():
                job.terminate()
        for job in jobs:
            if job.pid is not None:
                job.join()
    if errors:
        raise RuntimeError("; ".join(errors))
    return run_experiment(load(), scale, folder, **nothing)


def _device_of(job: int, device: torch.device) -> torch.device:
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", job % max(1, torch.cuda.device_count()))


def _follow(jobs: Sequence[BaseProcess], said: Any, progress: Progress) -> list[str]:
    """Pass on what the processes say until all have ended; returns why some have failed."""
    errors, ended = dict[int, str](), set[int]()
    while len(ended) < len(jobs):
        died = {i for i, job in enumerate(jobs) if i not in ended and not job.is_alive()}
        try:
            i, what = said.get(timeout=LOOK)
        except queue.Empty:  # what a process said before it died has been read
            errors |= {i: f"exit code {jobs[i].exitcode}" for i in died if jobs[i].exitcode}
            ended |= died
            continue
        if isinstance(what, tuple):
            progress(*what)
            continue
        ended.add(i)
        if what is not None:
            errors[i] = what
    first = {why: i for i, why in sorted(errors.items(), reverse=True)}
    return [f"job {i + 1} failed: {why}" for why, i in first.items()]


def _job(
    i: int,
    said: Any,
    load: Callable[[], Experiment],
    scale: Scale,
    folder: Path,
    device: str,
    threads: int | None,
    options: dict[str, Any],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the first one ends the others
    if threads is not None:
        torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)

    def progress(*what: Any) -> None:
        said.put((i, what))

    try:
        run_experiment(load(), scale, folder, device=device, progress=progress, **options)
    except Exception as error:
        said.put((i, " ".join(f"{type(error).__name__}: {error}".split())))
    else:
        said.put((i, None))
