"""Ranks that meet through a store, which has words of ranks that are gone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from anymamba.training.parallel import meeting


def met(store: dist.Store, size: int, limit: float = 20.0) -> set[str]:
    with ThreadPoolExecutor(size) as ranks:
        return set(ranks.map(lambda rank: meeting.meet(store, rank, size, limit), range(size)))


def test_each_meeting_has_a_name_of_its_own() -> None:
    store = dist.HashStore()
    first, second = met(store, 4), met(store, 4)
    assert len(first) == len(second) == 1 and first != second


def test_ranks_that_are_gone_do_not_count() -> None:
    """Rank 2 of an earlier start has said a word, and rank 0 of it has answered rank 1 of this one."""
    store = dist.HashStore()
    store.set("here/2", "gone")
    with ThreadPoolExecutor(3) as ranks:
        one = ranks.submit(meeting.meet, store, 1, 3, 20.0)
        while not store.check(["here/1"]):
            pass
        store.set(f"answer/{store.get('here/1').decode()}", "old")
        while not store.check(["met/old/1"]):
            pass
        others = [ranks.submit(meeting.meet, store, rank, 3, 20.0) for rank in (0, 2)]
        names = {one.result(), *(other.result() for other in others)}
    assert len(names) == 1 and "old" not in names


def test_a_rank_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    with pytest.raises(RuntimeError, match="have not met: rank 1 has not come; see what its machine says, and start"):
        meeting.meet(store, 0, 2, 0.2)
    with pytest.raises(RuntimeError, match="have not met: rank 0 has not come"):
        meeting.meet(dist.HashStore(), 1, 2, 0.2)


def test_a_job_has_been_begun_by_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    name, begun = meeting.job(store)
    assert not begun and meeting.job(store) == (name, False), "this process has begun it"
    monkeypatch.setattr(meeting, "_begun", set())
    assert meeting.job(store) == (name, True)
