"""Measures time: candidates take turns, and those that would take too long or too much memory are skipped.

On an NVIDIA GPU calls are recorded in CUDA graphs where that is possible: the time of Python, which is most of that of
short ones, is left out.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from anymamba.experiments.speed.arms import Limits
from anymamba.lab.experiment import Context

Call = Callable[[], object]
SHORTER = 4
"""Estimates are made at lengths that are shorter by this factor."""
LEAST_LENGTH = 16
"""The shortest length that an estimate starts at."""
FULL = "out of memory"


@dataclass(frozen=True)
class Candidate:
    """Something that is timed at a length."""

    prepare: Callable[[int], Call]
    """Makes the inputs for a length; returns the function that is timed."""
    n_bytes: Callable[[int], int]
    """Estimates the peak memory at a length, inputs included."""
    exponent: float
    """Its time grows at most with this power of the length."""


@dataclass(frozen=True)
class Timing:
    """The result of one candidate."""

    seconds: float | None
    """Seconds per call in the fastest turn; None if it did not run."""
    turns: int
    missing: str | None = None
    """Why it did not run."""
    estimated_seconds: float | None = None
    estimated_bytes: int | None = None
    recorded: bool = False
    """Whether the calls were replays of a CUDA graph."""


def compare(
    candidates: dict[str, Candidate], length: int, limits: Limits, context: Context
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Time candidates at a length against each other. Returns the times, and the calls of those that ran."""
    found: dict[str, Timing] = {}
    calls: dict[str, Call] = {}
    for name, candidate in candidates.items():
        context.progress(0, 1, f"{name}: estimating")
        found[name] = estimated(candidate, length, limits, context.device)
        if found[name].missing is None:
            call = in_memory(partial(candidate.prepare, length))
            if call is None:
                found[name] = replace(found[name], missing=FULL)
            else:
                calls[name] = call
    turns: dict[str, Callable[[], float]] = {}
    for name, call in calls.items():
        replay = recorded(call, context.device)
        found[name] = replace(found[name], recorded=replay is not None)
        n_calls = max(1, int(limits.turn_seconds / max(found[name].estimated_seconds or 0.0, 1e-7)))
        turns[name] = partial(seconds_of, replay or call, n_calls, context.device)
    for name, timing in take_turns(turns, limits, context).items():
        found[name] = replace(found[name], seconds=timing.seconds, turns=timing.turns, missing=timing.missing)
    return found, {name: call for name, call in calls.items() if found[name].seconds is not None}


def recorded(call: Callable[..., object], device: torch.device, begin: Callable[[], Any] | None = None) -> Call | None:
    """Replays of the call from a CUDA graph; None where it cannot be recorded, or memory is too full for it.

    Args:
        begin: makes an argument of the call, anew each time, and is not recorded.
    """
    if device.type != "cuda":
        return None
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))

    def given() -> tuple[Any, ...]:
        return () if begin is None else (begin(),)

    try:
        with torch.cuda.stream(stream):
            for _ in range(2):
                call(*given())
            last = given()
        synchronize(device)
        torch.cuda.empty_cache()  # a graph has memory of its own
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call(*last)
    except RuntimeError:
        synchronize(device)
        return None

    def replay(kept: Any = last) -> None:  # the graph reads and writes it
        graph.replay()

    return replay


def estimated(candidate: Candidate, length: int, limits: Limits, device: torch.device) -> Timing:
    """Estimate the memory of a candidate at a length, then its time from runs at shorter lengths, up to a quarter.

    Returns the estimates, and in `missing` the reason if the candidate must not run.
    """
    guess = Timing(None, 0, estimated_bytes=candidate.n_bytes(length))
    if candidate.n_bytes(length) > min(limits.memory_bytes, memory_of(device)):
        return replace(guess, missing="over the memory cap")
    at = length // SHORTER
    while at // SHORTER >= LEAST_LENGTH:
        at //= SHORTER
    at = max(1, at)
    while at < length:
        once = in_memory(partial(time_twice, candidate, at, device))
        if once is None:
            return replace(guess, missing=FULL)
        guess = replace(guess, estimated_seconds=once * (length / at) ** candidate.exponent)
        next_one = once * (min(length, at * SHORTER) / at) ** candidate.exponent
        if next_one > limits.call_seconds:
            return replace(guess, missing="over the time cap")
        at *= SHORTER
    return guess


def time_twice(candidate: Candidate, length: int, device: torch.device) -> float:
    """The faster of two calls, because the first may compile."""
    call = candidate.prepare(length)
    return min(seconds_of(call, 1, device) for _ in range(2))


T = TypeVar("T")


def in_memory(call: Callable[[], T]) -> T | None:
    """The result of the call, which must not be None; None if the memory of the device or the CPU is full."""
    try:
        return call()
    except (torch.OutOfMemoryError, MemoryError):
        return None
    except RuntimeError as error:  # torch's CPU allocator raises this type
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        return None


def memory_of(device: torch.device) -> int:
    """The bytes of memory of the device; sys.maxsize if they are unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def take_turns(turns: dict[str, Callable[[], float]], limits: Limits, context: Context) -> dict[str, Timing]:
    """Let the candidates take turns until their limits are reached; returns the smallest time of each.

    Each candidate is warmed up first.
    """
    times: dict[str, list[float]] = {name: [] for name in turns}
    spent = dict.fromkeys(turns, 0.0)
    full: set[str] = set()

    def goes_on(name: str) -> bool:
        n = len(times[name])
        enough = n >= limits.least_turns and spent[name] >= limits.candidate_seconds
        return name not in full and n < limits.most_turns and not enough

    gc.collect()
    for turn in turns.values():
        warm_up(turn, limits.seconds_before)
    while going := list(filter(goes_on, turns)):
        for name in going:
            context.progress(0, 1, f"{name}: turn {len(times[name]) + 1}")
            start = time.perf_counter()
            took = in_memory(turns[name])
            spent[name] += time.perf_counter() - start
            if took is None:
                full.add(name)
            else:
                times[name].append(took)
    return {
        name: Timing(None, 0, FULL) if name in full else Timing(min(several), len(several))
        for name, several in times.items()
    }


def warm_up(turn: Callable[[], float], seconds: float) -> None:
    """Run a candidate for some seconds, at least once unless seconds is 0."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and in_memory(turn) is not None:
        pass  # if memory is full, the first turn reports it


def seconds_of(call: Call, n_calls: int, device: torch.device) -> float:
    """Seconds per call, the mean of several calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(n_calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / n_calls


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).synchronize()


def as_values(found: dict[str, Timing]) -> dict[str, dict[str, Any]]:
    """Times as plain values for a record."""
    return {name: dict(vars(timing)) for name, timing in found.items()}
