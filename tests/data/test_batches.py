"""Batches: each document complete and separate, once per epoch, for any workers, ranks and interruptions."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anymamba.data import batches
from anymamba.data.batches import Batch, BatchStream
from anymamba.data.table import TokenTable, build_token_table
from anymamba.data.tokenizer import ByteTokenizer

EOS = 256


def numbered(lengths: list[int]) -> TokenTable:
    """Documents whose tokens say where they are from: document * 1000 + position."""
    return TokenTable.from_arrays([1000 * (i + 1) + np.arange(n) for i, n in enumerate(lengths)])


def stream(table, **options) -> BatchStream:
    return BatchStream(table, **{"batch_size": 3, "context": 7, "eos_id": EOS, "seed": 0, **options})


def take(batches: BatchStream, count: int) -> list[Batch]:
    iterator = iter(batches)
    taken = list(itertools.islice(iterator, count))
    iterator.close()
    return taken


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        all(map(torch.equal, x[:4], y[:4])) and x.position == y.position for x, y in zip(a, b, strict=True)
    )


def documents(batches: list[Batch]) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) of the documents that have ended, recovered from the offsets and `carried` only."""
    lanes: list[list | None] = [None] * len(batches[0].carried)
    found = []
    for batch in batches:
        length = batch.input_ids.shape[1]
        offsets = batch.cu_seqlens.tolist()
        assert offsets[0] == 0 and offsets[-1] == batch.input_ids.numel() and offsets == sorted(set(offsets))
        assert set(range(0, offsets[-1], length)) <= set(offsets), "every row start is an offset"
        inputs, labels = batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist()
        for a, b in itertools.pairwise(offsets):
            row, at_start = divmod(a, length)
            if at_start == 0 and batch.carried[row]:
                lanes[row][0].extend(inputs[a:b])
                lanes[row][1].extend(labels[a:b])
            else:
                found += [lanes[row]] if lanes[row] else []
                lanes[row] = [inputs[a:b], labels[a:b]]
    over = [lane for lane, (document, _) in zip(lanes, batches[-1].position["lanes"], strict=True) if document < 0]
    return [tuple(document) for document in found + over]


@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda x: max(x) > 1),
    batch_size=st.integers(1, 4),
    context=st.sampled_from([1, 2, 7, 16, 61]),
    eos=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_document_is_read_whole_and_alone_once_an_epoch(lengths, batch_size, context, eos, seed):
    table = numbered(lengths)
    batches = stream(table, batch_size=batch_size, context=context, eos_id=EOS if eos else None, seed=seed)
    taken = take(batches, 3 * batches.epoch_size // context + 3)
    expected = []
    for i in range(table.n_documents):
        tokens = table.read(i, 0, int(table.lengths[i])).tolist()
        expected.append(([EOS, *tokens], [*tokens, EOS]) if eos else (tokens[:-1], tokens[1:]))
    found, end = documents(taken), taken[-1].position
    assert all(document in expected for document in found), "nothing but whole documents"
    trained = [i for i, (inputs, _) in enumerate(expected) if inputs]
    order = np.random.default_rng([seed, end["epoch"]]).permutation(trained)[: end["next"]].tolist()
    under_way = [document for document, _ in end["lanes"]]
    for i in trained:
        assert found.count(expected[i]) + under_way.count(i) == end["epoch"] + order.count(i), "once an epoch"
    assert end["epoch"] >= 2 or batch_size == 1


def test_a_long_document_is_carried_through_its_rows():
    batches = take(stream(numbered([20]), batch_size=1, context=8), 3)
    assert [batch.carried.tolist() for batch in batches] == [[False], [True], [True]]
    assert batches[0].input_ids.tolist() == [[256, *range(1000, 1007)]]
    assert batches[0].labels.tolist() == [[*range(1000, 1008)]]
    assert batches[1].input_ids.tolist() == [[*range(1007, 1015)]]
    assert batches[2].labels.tolist() == [[*range(1016, 1020), 256, 1000, 1001, 1002]]
    assert [batch.cu_seqlens.tolist() for batch in batches] == [[0, 8], [0, 8], [0, 5, 8]]
    assert [b.dtype for b in batches[0][:4]] == [torch.int64, torch.int64, torch.int32, torch.bool]


def test_a_document_that_ends_with_its_row_is_not_carried():
    batches = take(stream(numbered([7]), batch_size=1, context=8), 2)
    assert [batch.carried.tolist() for batch in batches] == [[False], [False]]
    assert batches[1].input_ids[0, 0] == EOS


def test_without_an_end_id_documents_of_one_token_are_skipped():
    batches = take(stream(numbered([1, 3]), batch_size=1, context=4, eos_id=None), 2)
    assert batches[0].input_ids.tolist() == [[2000, 2001, 2000, 2001]]
    assert batches[0].labels.tolist() == [[2001, 2002, 2001, 2002]]
    with pytest.raises(ValueError, match="none of the 1 documents is long enough"):
        stream(numbered([1]), eos_id=None)


def test_each_epoch_has_its_own_order_and_seeds_differ():
    def order(seed):
        ends = documents(take(stream(numbered([3] * 50), batch_size=1, context=4, seed=seed), 101))
        return [inputs[1] // 1000 for inputs, _ in ends]

    first, second = order(0)[:50], order(0)[50:100]
    assert sorted(first) == sorted(second) == list(range(1, 51))
    assert first != second and first != order(1)[:50] and first != sorted(first)


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9), stop=st.integers(0, 12), more=st.integers(1, 8))
def test_going_on_from_a_position_is_going_on(lengths, stop, more):
    table = numbered(lengths)
    straight = take(stream(table), stop + more)
    position = straight[stop - 1].position if stop else None
    again = take(stream(table, position=json.loads(json.dumps(position))), more)
    assert same(again, straight[stop:])


def test_a_stream_may_be_read_twice_from_where_it_began():
    batches = stream(numbered([5, 9, 2]))
    assert same(take(batches, 5), take(batches, 5))


def test_positions_of_something_else_are_refused():
    table = numbered([5, 9])
    position = take(stream(table), 1)[0].position
    with pytest.raises(ValueError, match=r"other data: n_documents was 2, now it is 1; continue with the data"):
        stream(numbered([14]), position=position)
    with pytest.raises(ValueError, match=r"other data: n_tokens was 14, now it is 15"):
        stream(numbered([5, 10]), position=position)
    with pytest.raises(ValueError, match=r"position is of batch_size 3, got 4; keep batch_size"):
        stream(table, position=position, batch_size=4)
    with pytest.raises(ValueError, match=r"position must have the keys .* got \['step'\]"):
        stream(table, position={"step": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "at least 1"),
        ({"context": 0}, "at least 1"),
        ({"workers": -1}, "at least 0"),
        ({"batch_size": 3, "world_size": 2}, "multiple of world_size .*change batch_size"),
        ({"rank": 3, "world_size": 3}, "rank below it"),
        ({"batch_size": 2**20, "context": 2**11}, r"below 2\*\*31"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        stream(numbered([5]), **options)


def test_a_table_without_documents():
    with pytest.raises(ValueError, match="none of the 0 documents"):
        stream(TokenTable.from_arrays([]))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_lanes_of_one_process(world_size):
    table = numbered([5, 40, 1, 9, 3, 17])
    whole = take(stream(table, batch_size=4), 20)
    ranks = [take(stream(table, batch_size=4, rank=r, world_size=world_size), 20) for r in range(world_size)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.input_ids, torch.cat([part.input_ids for part in parts]))
        assert torch.equal(batch.labels, torch.cat([part.labels for part in parts]))
        assert torch.equal(batch.carried, torch.cat([part.carried for part in parts]))
        assert all(part.position == batch.position for part in parts), "any number of ranks can go on from it"
        starts = [part.cu_seqlens[:-1] + i * part.input_ids.numel() for i, part in enumerate(parts)]
        assert torch.equal(batch.cu_seqlens[:-1], torch.cat(starts))


# Workers


@pytest.fixture(scope="module")
def mapped(tmp_path_factory) -> TokenTable:
    folder = tmp_path_factory.mktemp("mapped")
    rng = np.random.default_rng(0)
    (folder / "a.txt").write_bytes(rng.integers(1, 256, 150_000, np.uint8).tobytes())
    lines = ("".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(1, 200, 500))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return build_token_table(folder, ByteTokenizer(), cache_dir=folder / "cache")


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers(mapped, workers):
    straight = take(stream(mapped, context=500), 30)
    assert same(take(stream(mapped, context=500, workers=workers), 30), straight)
    again = take(stream(mapped, context=500, workers=workers, position=straight[12].position), 17)
    assert same(again, straight[13:]), "what workers had read ahead is not lost"


def test_batches_are_the_same_from_started_rather_than_forked_workers(mapped, monkeypatch):
    import torch.utils.data as data

    def spawned(*args, **options):
        return data.DataLoader(*args, multiprocessing_context="spawn", **options)

    straight = take(stream(mapped), 3)
    monkeypatch.setattr("anymamba.data.batches.DataLoader", spawned)
    assert same(take(stream(mapped, workers=1), 3), straight)


def test_workers_leave_the_random_state_alone(mapped):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(stream(mapped, workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def ended(processes) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(process.is_alive() for process in processes):
        time.sleep(0.02)
    return not any(process.is_alive() for process in processes)


@pytest.mark.parametrize("how", ["closed", "collected"])
def test_workers_end_with_the_iterator(mapped, how):
    before = set(multiprocessing.active_children())
    iterator = iter(stream(mapped, workers=2))
    next(iterator)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    start = time.perf_counter()
    if how == "closed":
        iterator.close()
    del iterator
    gc.collect()
    assert ended(workers)
    assert time.perf_counter() - start < 4, "workers must end on request, not after the 5 s in which they look around"


@pytest.mark.skipif(not hasattr(os, "kill") or os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_the_main_process(mapped, number):
    before = set(multiprocessing.active_children())
    straight = take(stream(mapped), 12)
    iterator = iter(stream(mapped, workers=2))
    taken = [next(iterator), next(iterator)]
    workers = set(multiprocessing.active_children()) - before
    for worker in workers:
        os.kill(worker.pid, number)
    taken += itertools.islice(iterator, 10)
    assert same(taken, straight), "both workers go on"
    iterator.close()
    assert ended(workers)


# Cost


def test_a_batch_of_a_thousand_short_documents_is_cheap():
    table = TokenTable.from_arrays([np.arange(15) % 200] * 5000)
    whole = TokenTable.from_arrays([np.arange(80_000) % 200])

    def seconds(table) -> float:
        iterator = iter(stream(table, batch_size=8, context=2048))
        next(iterator)
        times = []
        for _ in range(15):
            start = time.perf_counter()
            next(iterator)
            times.append(time.perf_counter() - start)
        return min(times)

    short, long = seconds(table), seconds(whole)
    print(f"{short * 1e3:.2f} ms for 16,384 tokens in 1,024 documents, {long * 1e3:.2f} ms in long ones")
    assert short < 20e-3


def test_a_million_documents_are_planned_in_no_time():
    lengths = np.random.default_rng(0).integers(1, 100, 1_000_000)
    table = TokenTable.from_arrays([[1]])
    table.lengths, table.starts = lengths, np.zeros_like(lengths)  # only the plan is made here
    start = time.perf_counter()
    plans = stream(table, batch_size=8, context=1024)._plans()
    for _ in range(10):
        next(plans)
    took = time.perf_counter() - start
    print(f"{took:.3f} s")
    assert took < 1.5


def test_a_worker_of_a_main_process_that_is_gone_ends(monkeypatch):
    """If it is killed between the fork and the first batch, the parent of its workers is another process by then."""
    ends = []
    monkeypatch.setattr(batches.os, "_exit", ends.append)
    monkeypatch.setattr(batches.signal, "signal", lambda *_: None)
    batches._serve_the_main_process(os.getppid(), 0)
    assert ends == []
    batches._serve_the_main_process(os.getppid() + 1, 0)
    assert ends == [1]


# ------------------------------------------------------------------------------------------ pieces of documents


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda x: max(x) > 1),
    piece=st.integers(1, 50),
    context=st.sampled_from([1, 3, 16]),
    eos=st.booleans(),
)
def test_every_label_is_read_once_an_epoch_after_its_own_token(lengths, piece, context, eos):
    table, eos_id = numbered(lengths), EOS if eos else None
    pieces = stream(table, eos_id=eos_id, context=context, batch_size=1, piece=piece)
    pairs = []
    for batch in take(pieces, -(-pieces.epoch_size // context)):
        pairs += zip(batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist(), strict=True)
    expected = []
    for i in range(table.n_documents):
        tokens = table.read(i, 0, int(table.lengths[i])).tolist()
        tokens = [EOS, *tokens, EOS] if eos and tokens else tokens
        expected += itertools.pairwise(tokens)
    assert sorted(pairs[: pieces.epoch_size]) == sorted(expected)


def test_a_short_run_sees_many_documents_in_pieces():
    table = numbered([500] * 20)
    seen = {None: set(), 25: set()}
    for piece, found in seen.items():
        for batch in take(stream(table, batch_size=2, context=50, piece=piece), 6):
            found |= {token // 1000 for token in batch.labels.flatten().tolist()}
    assert len(seen[None]) <= 3 and len(seen[25]) >= 8  # 600 labels: 24 pieces


def test_pieces_resume_exactly_and_only_at_their_size():
    table = numbered([40, 7, 90])
    whole = take(stream(table, piece=11), 9)
    assert same(whole[4:], take(stream(table, piece=11, position=whole[3].position), 5))
    with pytest.raises(ValueError, match="piece"):
        stream(table, position=whole[3].position)
