"""Who is served next."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from anymamba.generation.scheduling.jobs import Job


class Turns:
    """Equal shares for owners: the one with the fewest tokens is next, and of equals the one that waits longest."""

    def __init__(self) -> None:
        self._served: defaultdict[str, float] = defaultdict(float)
        self._turn = 0

    def order(self, jobs: Iterable[Job]) -> list[Job]:
        """Jobs in the order in which they are served; those of one owner take turns."""
        return sorted(jobs, key=lambda job: (self._served[job.request.owner], job.turn, job.id))

    def serve(self, job: Job, n_tokens: int) -> None:
        """Count tokens that were read for a job."""
        self._turn += 1
        job.turn = self._turn
        self.count(job, n_tokens)

    def count(self, job: Job, n_tokens: int) -> None:
        """Count tokens that its owner was given."""
        self._served[job.request.owner] += n_tokens

    def join(self, job: Job, others: Iterable[Job]) -> None:
        """A new job: an owner who comes back does not catch up on the time away."""
        served = [self._served[other.request.owner] for other in others]
        job.turn = self._turn - 1  # before whoever was served last
        if not served:
            self._served.clear()  # nobody waits, so nobody is owed anything
        else:
            self._served[job.request.owner] = max(self._served[job.request.owner], min(served))
