"""Caches of attention: tensors that grow with the sequence, as values that are cheap to append to.

A cache is tensors (batch, ..., length, width) whose row r holds entries 0 .. filled[r] - 1, oldest first; what stands
behind them has no meaning. Appending gives a new cache and leaves the old one as it is, so that a state can be stepped
from twice. Copying everything for each token would cost as much as reading it, so a cache that was appended to without
gradients is a view of buffers with room behind it. The room is written in place by whoever holds the newest view; any
other cache, one that was forked from or rolled back to, copies. Where derivatives are wanted everything is copied, for
they hold views of what was there; and in transforms and tracers, which must not see a memory from outside them change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from anymamba.ops.observers import has_tangent, plain

LEAST_ROOM = 32
"""Entries of room behind a new buffer, or half its length where that is more: appending n copies about 3 n."""


class Buffers:
    """Tensors with room behind what is filled. `n_writes` tells whether somebody wrote since a view was made."""

    def __init__(self, tensors: Sequence[Tensor], n_new: int) -> None:
        length = tensors[0].shape[-2]
        self.capacity = length + n_new + max(LEAST_ROOM, length // 2)
        self.n_writes = 0
        self.tensors = []
        for tensor in tensors:
            buffer = tensor.new_empty(*tensor.shape[:-2], self.capacity, tensor.shape[-1])
            buffer.narrow(-2, 0, length).copy_(tensor)
            # Entries that a row never filled are masked out by a weight of 0, which NaN in fresh memory would survive.
            buffer.narrow(-2, length, self.capacity - length).zero_()
            self.tensors.append(buffer)


class Cache:
    """Tensors that grow together.

    Args:
        tensors: (batch, ..., length, width) each.
        filled: (batch,) int64: entries of each row.
        is_even: whether every row is filled to the length; None: not known yet, and looked up when asked for.
    """

    def __init__(self, tensors: Sequence[Tensor], filled: Int[Tensor, " batch"], is_even: bool | None = None) -> None:
        self.tensors, self.filled = tuple(tensors), filled
        self._is_even = is_even
        self._buffers: Buffers | None = None
        self._start = 0  # where the view begins in its buffers
        self._n_writes = 0  # of the buffers, when this view was made

    @property
    def length(self) -> int:
        length = self.tensors[0].shape[-2]
        return int(length) if torch.jit.is_tracing() else length  # there it is a tensor

    @property
    def is_even(self) -> bool:
        """Whether every row is filled to the length. Where values cannot be looked at, the general way is taken."""
        if self._is_even is None:
            if not plain(self.filled):
                return self.length == 0
            self._is_even = self.length == 0 or bool((self.filled == self.length).all())
        return self._is_even

    def append(self, new: Sequence[Tensor], lengths: Int[Tensor, " batch"] | None = None) -> Cache:
        """This cache and behind each row's entries the new ones (batch, ..., n_new, width).

        Args:
            new: as many tensors, in the dtype that the cache then has.
            lengths: how many of the new entries are real, from the first; defaults to all.
        """
        n_new = new[0].shape[-2]
        after = self.filled + (n_new if lengths is None else lengths)
        old = [tensor.to(entries.dtype) for tensor, entries in zip(self.tensors, new, strict=True)]
        in_place = self.length > 0 and _writable(*old, *new)
        grown = self._written(old, new) if in_place else Cache(self._copied(old, new), after)
        grown.filled = after
        grown._is_even = self.is_even if lengths is None else None
        return grown

    def keep_last(self, most: int) -> Cache:
        """The last `most` entries of each row."""
        if self.length <= most:
            return self
        kept = self.filled.clamp(max=most)
        if self.is_even:
            dropped = self.length - most
            result = Cache([tensor.narrow(-2, dropped, most) for tensor in self.tensors], kept, True)
            result._buffers, result._n_writes = self._buffers, self._n_writes
            result._start = self._start + dropped
            return result
        place = (self.filled - kept)[:, None] + torch.arange(most, device=kept.device)
        place = place.clamp(max=self.length - 1)
        return Cache([tensor.gather(-2, _expanded(place, tensor)) for tensor in self.tensors], kept)

    def trimmed(self) -> Cache:
        """Without the places at the end that no row has filled."""
        if self.is_even or not plain(self.filled):
            return self
        most = int(self.filled.max())
        result = Cache([tensor.narrow(-2, 0, most) for tensor in self.tensors], self.filled)
        result._buffers, result._n_writes, result._start = self._buffers, self._n_writes, self._start
        return result

    def _places(self, n_new: int) -> Int[Tensor, "batch n_new"]:
        """Where each row's new entries go."""
        return self.filled[:, None] + torch.arange(n_new, device=self.filled.device)

    def _copied(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
        """Old and new entries in new tensors."""
        if self.is_even:
            return [torch.cat([tensor, entries], -2) for tensor, entries in zip(old, new, strict=True)]
        n_new = new[0].shape[-2]
        longer = [F.pad(tensor, (0, 0, 0, n_new)) for tensor in old]
        place = self._places(n_new)
        return [a.scatter(-2, _expanded(place, b), b) for a, b in zip(longer, new, strict=True)]

    def _written(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> Cache:
        """Old entries where they are, if there is room behind them, and the new ones written there."""
        n_new = new[0].shape[-2]
        buffers, start = self._buffers, self._start
        if buffers is None or not self._may_write(buffers, old, n_new):
            buffers, start = Buffers(old, n_new), 0
        views = [tensor.narrow(-2, start, self.length + n_new) for tensor in buffers.tensors]
        for view, entries in zip(views, new, strict=True):
            if self.is_even:
                view.narrow(-2, self.length, n_new).copy_(entries)
            else:
                view.scatter_(-2, _expanded(self._places(n_new), entries), entries)
        buffers.n_writes += 1
        result = Cache(views, self.filled)
        result._buffers, result._start, result._n_writes = buffers, start, buffers.n_writes
        return result

    def _may_write(self, buffers: Buffers, old: Sequence[Tensor], n_new: int) -> bool:
        """Whether this is the newest view of its buffers, there is room, and torch lets them be written now."""
        if self._n_writes != buffers.n_writes or self._start + self.length + n_new > buffers.capacity:
            return False
        if buffers.tensors[0].is_inference() and not torch.is_inference_mode_enabled():
            return False
        return all(a.dtype == b.dtype for a, b in zip(old, buffers.tensors, strict=True))


class GrowingState:
    """For NamedTuples that hold a cache's tensors: the cache they came from, with its room.

    What `anymamba.parts.state` makes of a state is a new tuple without it, which copies when it is appended to.
    """

    cache: Cache | None = None

    def remember(self, cache: Cache) -> None:
        """Keep the cache that this state's tensors are."""
        if not torch.compiler.is_compiling():
            self.cache = cache


def _writable(*tensors: Tensor) -> bool:
    """Whether these may be written into memory that others hold: there is nobody but the caller to see it."""
    return not torch.is_grad_enabled() and plain(*tensors) and not has_tangent(*tensors)


def _expanded(place: Int[Tensor, "batch n"], like: Tensor) -> Tensor:
    """Places in a tensor's length as an index of `gather` and `scatter`, (batch, ..., n, width)."""
    index = place.reshape(place.shape[0], *[1] * (like.ndim - 3), place.shape[1], 1)
    return index.expand(-1, *like.shape[1:-2], -1, like.shape[-1])
