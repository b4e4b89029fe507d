"""The time that a run may take, and the steps that fit into it."""

from __future__ import annotations

import time
from collections.abc import Callable

from anymamba.training.snapshot import Progress


class Clock:
    """Says when a run's time is up; where there is a limit it keeps `progress.seconds`.

    Args:
        max_minutes: the time of the run over all its processes; None for no limit.
        progress: the run's numbers; steps and seconds of earlier processes are in it.
        from_first: gives all ranks what the clock of rank 0 says.
    """

    def __init__(
        self,
        max_minutes: float | None,
        progress: Progress,
        from_first: Callable[[Callable[[], float]], float] = lambda compute: compute(),
    ) -> None:
        self._from_first = from_first
        self._limit = None if max_minutes is None else 60 * max_minutes
        self._progress = progress
        self._start = time.perf_counter() - progress.seconds
        self._first_step, self._first_second = progress.step, progress.seconds

    def is_up(self) -> bool:
        """Whether the run has used its time."""
        if self._limit is None:
            return False
        self._progress.seconds = self._from_first(lambda: time.perf_counter() - self._start)
        return self._progress.seconds >= self._limit

    def affordable(self, steps: int) -> int:
        """How many of the run's `steps` fit into its time at the mean speed of this process, evaluations included."""
        done = self._progress.step - self._first_step
        if self._limit is None or not done:
            return steps
        a_step = (self._progress.seconds - self._first_second) / done
        return min(steps, self._progress.step + int(max(0.0, self._limit - self._progress.seconds) / a_step))
