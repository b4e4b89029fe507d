"""Attention caches: tensors that grow with the sequence. They are values, and appending to them is cheap.

A cache holds tensors (batch, ..., length, width). Row r has entries 0 .. filled[r] - 1, oldest first; the values after
them are undefined. Appending returns a new cache and leaves the old one unchanged, so the same state can be continued
twice.

Copying the whole cache for each token would cost as much as reading it. So a cache that was appended to without
gradients is a view of larger buffers. Appending to the newest view writes in place, into the free space after it.
Appending to an older view, after a fork or a rollback, copies. Everything is also copied where gradients are needed,
because autograd has saved the old tensors, and in transforms and tracers, where outside memory must not change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from anymamba.ops.observers import has_tangent, plain

LEAST_ROOM = 32
"""The least free space of a new buffer, in entries; it is half the length if that is more. Appending n entries one by
one then copies about 3 n."""


class Buffers:
    """Tensors with free space at the end. `n_writes` shows whether they were written to after a view was made."""

    def __init__(self, tensors: Sequence[Tensor], n_new: int) -> None:
        length = tensors[0].shape[-2]
        self.capacity = length + n_new + max(LEAST_ROOM, length // 2)
        self.n_writes = 0
        self.tensors = []
        for tensor in tensors:
            buffer = tensor.new_empty(*tensor.shape[:-2], self.capacity, tensor.shape[-1])
            buffer.narrow(-2, 0, length).copy_(tensor)
            # Attention gives unfilled entries a weight of 0, but 0 * NaN is NaN: fresh memory must be cleared.
            buffer.narrow(-2, length, self.capacity - length).zero_()
            self.tensors.append(buffer)


class Cache:
    """Tensors that grow together.

    Args:
        tensors: (batch, ..., length, width) each.
        filled: (batch,) int64: how many entries each row has.
        is_even: whether every row is filled to the length. None means not known yet; it is computed on first use.
    """

    def __init__(self, tensors: Sequence[Tensor], filled: Int[Tensor, " batch"], is_even: bool | None = None) -> None:
        self.tensors, self.filled = tuple(tensors), filled
        self._is_even = is_even
        self._buffers: Buffers | None = None
        self._start = 0  # where this view begins in the buffers
        self._n_writes = 0  # the buffers' n_writes when this view was made

    @property
    def length(self) -> int:
        length = self.tensors[0].shape[-2]
        return int(length) if torch.jit.is_tracing() else length  # under jit.trace a size is a tensor

    @property
    def is_even(self) -> bool:
        """Whether every row is filled to the length. If `filled` cannot be read, as in a trace, only for length 0."""
        if self._is_even is None:
            if not plain(self.filled):
                return self.length == 0
            self._is_even = self.length == 0 or bool((self.filled == self.length).all())
        return self._is_even

    def append(self, new: Sequence[Tensor], lengths: Int[Tensor, " batch"] | None = None) -> Cache:
        """Return a cache with new entries (batch, ..., n_new, width) after those of each row.

        Args:
            new: one tensor for each tensor of the cache; the new cache takes their dtype.
            lengths: how many of the new entries of each row are real; the real ones come first. Defaults to all.
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
        """Keep the last `most` entries of each row."""
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
        """Drop the places at the end that no row has filled."""
        if self.is_even or not plain(self.filled):
            return self
        most = int(self.filled.max())
        result = Cache([tensor.narrow(-2, 0, most) for tensor in self.tensors], self.filled)
        result._buffers, result._n_writes, result._start = self._buffers, self._n_writes, self._start
        return result

    def _places(self, n_new: int) -> Int[Tensor, "batch n_new"]:
        """The indices of each row's new entries."""
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
        """Write the new entries after the old ones in the buffers; make larger buffers if they cannot be used."""
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
        """Whether this is the newest view of its buffers, they have space, and torch allows writing to them now."""
        if self._n_writes != buffers.n_writes or self._start + self.length + n_new > buffers.capacity:
            return False
        if buffers.tensors[0].is_inference() and not torch.is_inference_mode_enabled():
            return False
        return all(a.dtype == b.dtype for a, b in zip(old, buffers.tensors, strict=True))


class GrowingState:
    """Base of states that hold a cache's tensors. It remembers the cache, so that the next append can write in place.

    The functions of `anymamba.parts.state` return new tuples without the cache; the next append to such a state copies.
    """

    cache: Cache | None = None

    def remember(self, cache: Cache) -> None:
        """Keep the cache that holds this state's tensors."""
        if not torch.compiler.is_compiling():
            self.cache = cache


def _writable(*tensors: Tensor) -> bool:
    """Whether these may be written in place: autograd, transforms and tracers are not recording."""
    return not torch.is_grad_enabled() and plain(*tensors) and not has_tangent(*tensors)


def _expanded(place: Int[Tensor, "batch n"], like: Tensor) -> Tensor:
    """Indices along the length, expanded to (batch, ..., n, width) for `gather` and `scatter`."""
    index = place.reshape(place.shape[0], *[1] * (like.ndim - 3), place.shape[1], 1)
    return index.expand(-1, *like.shape[1:-2], -1, like.shape[-1])
