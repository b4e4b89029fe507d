"""Batches for training: each row reads documents one after another, from the first token to the last."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from anymamba.base.sizes import require_at_least, require_sizes

from .table import TokenTable


class Batch(NamedTuple):
    """The data of one training step."""

    input_ids: Int[Tensor, "batch length"]
    labels: Int[Tensor, "batch length"]
    """The token after each input; -100 is not counted (`BatchStream` makes none)."""
    cu_seqlens: Int[Tensor, " n_sequences_and_1"]
    """int32 offsets in the flattened (batch * length) tokens: the starts of all rows and documents, and the end."""
    carried: Bool[Tensor, " batch"]
    """True where a row continues the document in which the same row of the previous batch ended."""
    position: dict[str, Any]
    """The position in the stream after this batch, as JSON values; a new stream can continue from it."""


class _Plan(NamedTuple):
    """Spans of a batch's rows, in order: positions [start, stop) of a document's inputs and labels."""

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    carried: NDArray[np.bool_]
    position: dict[str, Any]


class BatchStream:
    """Endless batches over a table's documents. Each epoch has every document once, in a new shuffled order.

    A document of n tokens t gives, with an end-of-document id, the inputs [eos, t[0], ..., t[n-1]] and the labels
    [t[0], ..., t[n-1], eos]; without one, the inputs t[:-1] and the labels t[1:]. Each row of the batch (a lane) reads
    a document to its end and then the next one of the epoch, so rows are always full and no token is dropped. With
    `piece` the lanes get pieces of documents in place of whole ones: a short run then reads from many documents.

    The main process plans the spans and the workers only read them. So batches do not depend on `workers`, and a stream
    made with the `position` of a batch continues exactly after it.

    Args:
        table: the documents. Those without a label (empty ones, and without eos_id those of one token) are skipped.
        batch_size: number of lanes, of all processes together.
        context: tokens per row.
        eos_id: the id before and after every document, or None.
        seed: seed of the shuffles; epoch e is shuffled with (seed, e).
        workers: processes that read tokens ahead; 0 reads in this process. They end with the iterator.
        position: the position of a batch to continue from, made by a stream over the same table with the same
            batch_size and piece.
        piece: the largest number of positions of a document that a lane reads in a row; defaults to all.
        rank, world_size: this process gets the rows [rank, rank + 1) * batch_size / world_size of each batch.
    """

    def __init__(
        self,
        table: TokenTable,
        *,
        batch_size: int,
        context: int,
        eos_id: int | None,
        seed: int,
        workers: int = 0,
        position: dict[str, Any] | None = None,
        piece: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        require_sizes(batch_size=batch_size, context=context)
        if piece is not None:
            require_at_least("piece", piece, 1)
        require_at_least("workers", workers, 0)
        if not 0 <= rank < world_size or batch_size % world_size:
            raise ValueError(
                f"batch_size must be a multiple of world_size and rank below it, got {batch_size}, {world_size} and "
                f"{rank}; change batch_size"
            )
        if batch_size // world_size * context >= 2**31:
            raise ValueError(f"batch_size * context must stay below 2**31 tokens, got {batch_size} * {context}")
        self.table, self.batch_size, self.context, self.eos_id, self.seed = table, batch_size, context, eos_id, seed
        self.workers, self.rank, self.world_size = workers, rank, world_size
        self.piece = piece
        sizes = table.lengths + 1 if eos_id is not None else table.lengths - 1  # number of positions in each document
        eligible = np.flatnonzero((table.lengths > 0) & (sizes > 0))
        self.epoch_size = int(sizes[eligible].sum())
        """Number of labels in an epoch."""
        self._units = _units(sizes, eligible, piece)
        if not len(eligible):
            raise ValueError(f"none of the {table.n_documents} documents is long enough to train on; give more text")
        self.position = self._first_position() if position is None else self._checked(position)

    def __iter__(self) -> Iterator[Batch]:
        reader = _Reader(self.table, self.eos_id, self.context)
        if not self.workers:
            yield from map(reader.__getitem__, self._plans())
            return
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=self._plans(),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            worker_init_fn=partial(_serve_the_main_process, os.getpid()),
            # the loader draws a seed for its workers; this keeps it from using the generator of the model's dropout
            generator=torch.Generator(),
        )
        yield from loader

    def _first_position(self) -> dict[str, Any]:
        position = {
            "epoch": 0,
            "next": 0,
            "lanes": [[-1, 0]] * self.batch_size,
            "n_documents": self.table.n_documents,
            "n_tokens": self.table.n_tokens,
        }
        return position if self.piece is None else {**position, "piece": self.piece}

    def _checked(self, position: dict[str, Any]) -> dict[str, Any]:
        """The position, checked against this table and batch size."""
        fresh = self._first_position()
        if set(position) != set(fresh):
            raise ValueError(
                f"position must have the keys {sorted(fresh)}, got {sorted(position)}; take it from a batch"
            )
        for key in ("n_documents", "n_tokens"):
            if position[key] != fresh[key]:
                raise ValueError(
                    f"the position is of other data: {key} was {position[key]}, now it is {fresh[key]}; "
                    f"continue with the data that the run began with"
                )
        if position.get("piece") != self.piece:
            raise ValueError(f"the position is of piece {position['piece']}, got {self.piece}; keep piece")
        if len(position["lanes"]) != self.batch_size:
            raise ValueError(
                f"the position is of batch_size {len(position['lanes'])}, got {self.batch_size}; keep batch_size"
            )
        return position

    def _plans(self) -> Iterator[_Plan]:
        """Yield this process's rows of all further batches."""
        planner = _Planner(self.position, self._units, self.seed)
        mine = self.batch_size // self.world_size
        while True:
            yield planner.plan(self.context, slice(self.rank * mine, (self.rank + 1) * mine))


class _Units(NamedTuple):
    """What lanes read from start to end: documents or pieces of them."""

    document: NDArray[np.int64]
    first: NDArray[np.int64]
    """The first position in the document."""
    size: NDArray[np.int64]
    eligible: NDArray[np.int64]
    """Which units have a label."""


def _units(sizes: NDArray[np.int64], eligible: NDArray[np.int64], piece: int | None) -> _Units:
    if piece is None:
        return _Units(np.arange(len(sizes)), np.zeros_like(sizes), sizes, eligible)
    n_pieces = -(-sizes[eligible] // piece)
    document = np.repeat(eligible, n_pieces)
    first = piece * (np.arange(len(document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces))
    return _Units(document, first, np.minimum(piece, sizes[document] - first), np.arange(len(document)))


class _Planner:
    """Assigns an epoch's units to lanes. A lane is [its unit or -1, the next position in it]."""

    def __init__(self, position: dict[str, Any], units: _Units, seed: int) -> None:
        self._position, self._units, self._seed = position, units, seed
        self._epoch, self._next = position["epoch"], position["next"]
        self._lanes = [tuple(lane) for lane in position["lanes"]]
        self._order = self._shuffled()

    def plan(self, context: int, rows: slice) -> _Plan:
        """Advance all lanes by one batch; return the spans of `rows`."""
        carried = np.array([unit >= 0 for unit, _ in self._lanes])
        spans = [self._fill(lane, context) for lane in range(len(self._lanes))]
        document, start, stop = np.array([span for row in spans[rows] for span in row], np.int64).T
        lanes = [list(lane) for lane in self._lanes]
        position = {**self._position, "epoch": self._epoch, "next": self._next, "lanes": lanes}
        return _Plan(document, start, stop, carried[rows], position)

    def _fill(self, lane: int, context: int) -> list[tuple[int, int, int]]:
        """The spans of a lane's next `context` positions."""
        spans = []
        unit, start = self._lanes[lane]
        while context:
            if unit < 0:
                unit, start = self._deal(), 0
            size, first = int(self._units.size[unit]), int(self._units.first[unit])
            stop = min(size, start + context)
            spans.append((int(self._units.document[unit]), first + start, first + stop))
            context -= stop - start
            unit, start = (unit, stop) if stop < size else (-1, 0)
        self._lanes[lane] = unit, start
        return spans

    def _deal(self) -> int:
        """The epoch's next unit, or the first one of the next epoch."""
        if self._next == len(self._order):
            self._epoch, self._next = self._epoch + 1, 0
            self._order = self._shuffled()
        self._next += 1
        return int(self._order[self._next - 1])

    def _shuffled(self) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, self._epoch]).permutation(self._units.eligible)


class _Reader(Dataset[Batch]):
    """Turns a plan into a batch by reading its tokens. Workers run it."""

    def __init__(self, table: TokenTable, eos_id: int | None, context: int) -> None:
        self._store, self._starts, self._lengths = table.store, table.starts, table.lengths
        self._eos_id, self._context = eos_id, context

    def __getitem__(self, plan: _Plan) -> Batch:
        # token t[i] is the label at position i if eos comes before the document, else at position i - 1
        shift = 0 if self._eos_id is not None else 1
        starts, n = self._starts[plan.document], self._lengths[plan.document]
        ends = np.cumsum(plan.stop - plan.start)
        offsets = np.concatenate([[0], ends])
        closed = plan.stop + shift > n  # the last label of the span is eos
        counts = plan.stop - plan.start - closed
        labels = np.empty(offsets[-1], np.int64)
        text = np.ones(len(labels), bool)
        text[ends[closed] - 1] = False
        labels[text] = self._store.gather(starts + plan.start + shift, counts)
        labels[~text] = -1 if self._eos_id is None else self._eos_id
        # an input is the previous label, except at the start of a span
        inputs = np.empty_like(labels)
        inputs[1:] = labels[:-1]
        before = plan.start + shift - 1
        inside = before >= 0
        first = np.full(len(before), -1 if self._eos_id is None else self._eos_id, np.int64)
        first[inside] = self._store.gather((starts + before)[inside], np.ones(int(inside.sum()), np.int64))
        inputs[offsets[:-1]] = first
        return Batch(
            torch.from_numpy(inputs).view(-1, self._context),
            torch.from_numpy(labels).view(-1, self._context),
            torch.from_numpy(offsets.astype(np.int32)),
            torch.from_numpy(plan.carried),
            plan.position,
        )


def _as_it_is(batch: Any) -> Any:
    return batch


def _serve_the_main_process(main: int, worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a worker; exit if the main process is gone already.

    Ctrl-C and a scheduler's SIGTERM reach the whole process group, but the main process needs its workers until it ends
    them. A worker also ends when its parent does: torch watches the process that is the parent from now on. If the main
    process was killed before, the parent is another process by now, and the worker would wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.getppid() != main:
        os._exit(1)
