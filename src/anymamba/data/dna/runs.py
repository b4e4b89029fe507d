"""Runs of letters: where a sequence has N, an ambiguity code, or lower case."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .letters import ODD, U, translated

_AT_ONCE = 1 << 20  # letters read at once


def find_runs(marks: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The runs of equal marks other than 0.

    Args:
        marks: (n,) numbers.
    Returns (n_runs, 3): start, end (after the last) and mark.
    """
    if not marks.any():
        return np.zeros((0, 3), np.int64)
    starts = np.concatenate([[0], np.flatnonzero(marks[1:] != marks[:-1]) + 1])
    runs = np.stack([starts, np.append(starts[1:], len(marks)), marks[starts]], axis=1)
    return runs[runs[:, 2] != 0]


class RunList:
    """Collects the runs of a sequence that comes in pieces; a run that goes on in the next piece stays one."""

    def __init__(self) -> None:
        self._pieces: list[NDArray[np.int64]] = []

    def add(self, runs: NDArray[np.int64], offset: int) -> None:
        """Add the runs of a piece that begins at `offset`."""
        if not len(runs):
            return
        runs = runs + np.array([offset, offset, 0])
        last = self._pieces[-1][-1] if self._pieces else None
        if last is not None and last[1] == runs[0, 0] and last[2] == runs[0, 2]:
            last[1] = runs[0, 1]
            runs = runs[1:]
        if len(runs):
            self._pieces.append(runs)

    def take(self) -> NDArray[np.int64]:
        """All runs, (n_runs, 3), and begin a new sequence."""
        pieces, self._pieces = self._pieces, []
        return np.concatenate(pieces) if pieces else np.zeros((0, 3), np.int64)


def overlapping(starts: NDArray, ends: NDArray, start: int, end: int) -> slice:
    """Which of some sorted runs, which do not overlap each other, have letters in [start, end)."""
    return slice(int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(starts, end, side="left")))


def scan_unknown(read: Callable[[int, int], NDArray[np.uint8]], length: int) -> NDArray[np.int64]:
    """The runs of N and ambiguity codes of a sequence, which is read to its end: (n_runs, 2), start and end.

    Args:
        read: gives its letters [start, end).
        length: of the sequence.
    """
    found = RunList()
    for start in range(0, length, _AT_ONCE):
        letters = read(start, min(length, start + _AT_ONCE))
        found.add(find_runs(is_unknown(letters).view(np.uint8)), start)
    return found.take()[:, :2]


def is_unknown(letters: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which letters are N or an ambiguity code; U is not."""
    odd = translated(letters, ODD)
    return (odd != 0) & (odd != U)


def n_before(runs: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many letters of some runs are before each position.

    Args:
        runs: (n_runs, 2) sorted starts and ends, which do not overlap.
        positions: (n,) offsets in the sequence.
    """
    starts, ends = runs[:, 0], runs[:, 1]
    total = np.concatenate([[0], np.cumsum(ends - starts)])
    k = np.searchsorted(starts, positions, side="right")
    last_end = np.concatenate([[0], ends])[k]
    return total[k] - np.maximum(last_end - positions, 0)
