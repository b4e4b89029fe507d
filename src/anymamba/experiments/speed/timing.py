"""Measuring time: candidates take turns, none begins that would take too long or too much memory."""

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

Call = Callable[[], object]
SHORTER = 4
"""Estimates come from lengths so many times shorter."""
LEAST_LENGTH = 16
"""The shortest length that an estimate begins with."""
FULL = "out of memory"


@dataclass(frozen=True)
class Candidate:
    """Something whose time is asked for at a length."""

    prepare: Callable[[int], Call]
    """Makes the inputs for a length; what it returns is timed."""
    n_bytes: Callable[[int], int]
    """About what it holds at most at a length, inputs included."""
    exponent: float
    """Its time grows at most with this power of the length."""


@dataclass(frozen=True)
class Timing:
    """What came out for one candidate."""

    seconds: float | None
    """Of the fastest turn, for a call; None where it did not run."""
    turns: int
    missing: str | None = None
    """Why it did not run."""
    estimated_seconds: float | None = None
    estimated_bytes: int | None = None


def compare(
    candidates: dict[str, Candidate],
    length: int,
    limits: Limits,
    device: torch.device,
    told: Callable[[str], None] = lambda words: None,
) -> tuple[dict[str, Timing], dict[str, Call]]:
    """Time candidates at a length against each other. Returns the times, and the calls of those that ran."""
    found: dict[str, Timing] = {}
    calls: dict[str, Call] = {}
    turns: dict[str, Callable[[], float]] = {}
    for name, candidate in candidates.items():
        told(f"{name}: estimating")
        found[name] = estimated(candidate, length, limits, device)
        call = in_memory(partial(candidate.prepare, length)) if found[name].missing is None else None
        if found[name].missing is None and call is None:
            found[name] = replace(found[name], seconds=None, missing=FULL)
        elif call is not None:
            calls[name] = call
            seconds = max(found[name].estimated_seconds or 0.0, 1e-7)
            turns[name] = partial(seconds_of, calls[name], max(1, int(limits.turn_seconds / seconds)), device)
    for name, timing in take_turns(turns, limits, told).items():
        guess = found[name]
        found[name] = replace(timing, estimated_seconds=guess.estimated_seconds, estimated_bytes=guess.estimated_bytes)
    return found, {name: call for name, call in calls.items() if found[name].seconds is not None}


def estimated(candidate: Candidate, length: int, limits: Limits, device: torch.device) -> Timing:
    """Whether a candidate may run at a length: its memory, then its time from ever longer lengths up to a quarter."""
    n_bytes = candidate.n_bytes(length)
    if n_bytes > min(limits.memory_bytes, memory_of(device)):
        return Timing(None, 0, "over the memory cap", estimated_bytes=n_bytes)
    at = length // SHORTER
    while at // SHORTER >= LEAST_LENGTH:
        at //= SHORTER
    at, seconds = max(1, at), 0.0
    while at < length:
        once = in_memory(partial(time_twice, candidate, at, device))
        if once is None:
            return Timing(None, 0, FULL, estimated_bytes=n_bytes)
        seconds = once * (length / at) ** candidate.exponent
        next_one = seconds / (length / min(length, at * SHORTER)) ** candidate.exponent
        if next_one > limits.call_seconds:
            return Timing(None, 0, "over the time cap", seconds, n_bytes)
        at *= SHORTER
    return Timing(None, 0, None, seconds, n_bytes)


def time_twice(candidate: Candidate, length: int, device: torch.device) -> float:
    """The better one of two calls: the first may compile."""
    call = candidate.prepare(length)
    return min(seconds_of(call, 1, device) for _ in range(2))


T = TypeVar("T")


def in_memory(call: Callable[[], T]) -> T | None:
    """What the call returns, which is never None; None where the device's memory, or the processor's, is full."""
    try:
        return call()
    except (torch.OutOfMemoryError, MemoryError):
        return None
    except RuntimeError as error:  # what torch's allocator for the processor raises
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        return None


def memory_of(device: torch.device) -> int:
    """Bytes of memory that the device has; without bound where it does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def take_turns(
    turns: dict[str, Callable[[], float]], limits: Limits, told: Callable[[str], None] = lambda words: None
) -> dict[str, Timing]:
    """The smallest number that each turn returns; candidates whose turns are spent drop out.

    Each runs a while first, untimed, unless a single turn already takes that long.
    """
    best: dict[str, list[float]] = {name: [] for name in turns}
    spent = dict.fromkeys(turns, 0.0)
    missing: dict[str, str] = {}
    gc.collect()
    for turn in turns.values():
        warm_up(turn, limits.seconds_before)
    while True:
        open_ones = [
            name
            for name in turns
            if name not in missing
            and len(best[name]) < limits.most_turns
            and (len(best[name]) < limits.least_turns or spent[name] < limits.candidate_seconds)
        ]
        if not open_ones:
            break
        for name in open_ones:
            told(f"{name}: turn {len(best[name]) + 1}")
            start = time.perf_counter()
            took = in_memory(turns[name])
            if took is None:
                missing[name] = FULL
            else:
                best[name].append(took)
            spent[name] += time.perf_counter() - start
    return {
        name: Timing(None, 0, missing[name]) if name in missing else Timing(min(seconds), len(seconds))
        for name, seconds in best.items()
    }


def warm_up(turn: Callable[[], float], seconds: float) -> None:
    """Run a candidate for so long, at least once where that is more than nothing."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and in_memory(turn) is not None:
        pass  # where memory is full its first turn says so


def seconds_of(call: Call, n_calls: int, device: torch.device) -> float:
    """Seconds of a call, the mean of some that follow one another."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(n_calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / n_calls


def synchronize(device: torch.device) -> None:
    """Wait for what the device has been given."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).synchronize()


def as_values(found: dict[str, Timing]) -> dict[str, dict[str, Any]]:
    """Times as a record keeps them."""
    return {name: dict(vars(timing)) for name, timing in found.items()}
