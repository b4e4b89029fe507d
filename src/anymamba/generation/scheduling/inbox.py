"""Requests and cancellations on their way from other threads to the engine's."""

from __future__ import annotations

import threading
from collections import deque

from anymamba.generation.scheduling.jobs import Job


class Inbox:
    """What has come since the engine looked last. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock, self._work = threading.Lock(), threading.Event()
        self._jobs: deque[Job] = deque()
        self._cancelled: set[int] = set()

    def __len__(self) -> int:
        """Number of requests that were not taken yet."""
        return len(self._jobs)

    def submit(self, job: Job) -> None:
        """Put a request in."""
        with self._lock:
            self._jobs.append(job)
            self._work.set()

    def cancel(self, job_id: int) -> None:
        """Ask for the end of a request."""
        with self._lock:
            self._cancelled.add(job_id)
            self._work.set()

    def take(self) -> tuple[list[Job], set[int]]:
        """The new requests, and the ids of those that were cancelled."""
        with self._lock:
            jobs, self._jobs = list(self._jobs), deque()
            cancelled, self._cancelled = self._cancelled, set()
        return jobs, cancelled

    def rest(self) -> None:
        """Let `wait` wait, unless something has come."""
        with self._lock:
            if not self._jobs and not self._cancelled:
                self._work.clear()

    def wait(self, timeout: float | None) -> bool:
        """Wait until something comes, at most so many seconds. Returns whether there is something to do."""
        return self._work.wait(timeout)
