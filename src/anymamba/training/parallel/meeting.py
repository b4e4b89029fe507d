"""Lets the ranks of a run find one another, also after torchrun has started them again.

torchrun's store outlives the processes and has what those before have written. Its count of restarts belongs to a
machine's agent and differs between machines. So every rank says a word that nobody has said before, and rank 0 answers
to the word.
"""

from __future__ import annotations

import secrets
import time

import torch.distributed as dist

LIMIT = 300.0
"""Seconds that rank 0 waits for the others, and they for it: they may be on machines that start slowly."""
PAUSE = 0.05
"""Seconds between two looks."""

_begun: set[str] = set()
"""Names that this process has given to a job."""


def meet(store: dist.Store, rank: int, world_size: int, limit: float = LIMIT) -> str:
    """The name of this meeting of all ranks, which no earlier one has had.

    Raises RuntimeError if a rank has not come within `limit` seconds.
    """
    deadline = time.monotonic() + limit
    return _host(store, world_size, deadline) if rank == 0 else _join(store, rank, deadline)


def _host(store: dist.Store, world_size: int, deadline: float) -> str:
    name, missing = secrets.token_hex(8), list(range(1, world_size))
    while missing:
        for rank in missing:
            if store.check([f"here/{rank}"]):  # a word may be that of a rank that has died, and is said anew
                store.set(f"answer/{store.get(f'here/{rank}').decode()}", name)
        missing = [rank for rank in missing if not store.check([f"met/{name}/{rank}"])]
        _pause(deadline, bool(missing), f"rank {missing[0] if missing else 0} has not come; see what its machine says")
    store.set(f"all/{name}", "")
    return name


def _join(store: dist.Store, rank: int, deadline: float) -> str:
    word, name = secrets.token_hex(8), ""
    store.set(f"here/{rank}", word)
    while not (name and store.check([f"all/{name}"])):
        if store.check([f"answer/{word}"]):  # a rank 0 that has died may have answered before the one that lives
            name = store.get(f"answer/{word}").decode()
            store.set(f"met/{name}/{rank}", "")
        _pause(deadline, True, "rank 0 has not come, or another rank has not; see what their machines say")
    return name


def _pause(deadline: float, waits: bool, words: str) -> None:
    if waits and time.monotonic() > deadline:
        raise RuntimeError(f"the processes of this run have not met: {words}, and start all of them again")
    time.sleep(PAUSE if waits else 0.0)


def job(store: dist.Store) -> tuple[str, bool]:
    """The name of the job that the store belongs to, and whether processes before this one have begun it."""
    own = secrets.token_hex(8)
    name = store.compare_set("job", "", own).decode()
    if name == own:
        _begun.add(own)
    return name, name not in _begun
