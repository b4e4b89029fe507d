"""Turn padded and packed batches into rows with the real tokens first and the padding after them.

A layer that runs on such rows supports `attention_mask` (padding anywhere) and `cu_seqlens` (sequences packed along the
length of one row) with the same code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anymamba.ops.checks import n_sequences, require_offsets
from anymamba.ops.observers import plain


class Rows(ABC):
    """Converts a batch to rows of real tokens followed by padding, and back."""

    mask: Bool[Tensor, "rows row_length"]
    """True at the real tokens of the rows."""
    lengths: Int[Tensor, " rows"]
    """Number of real tokens in each row."""

    @abstractmethod
    def align(self, x: Float[Tensor, "batch length channels"]) -> Float[Tensor, "rows row_length channels"]:
        """The rows, real tokens first. Values at the padding are undefined."""

    @abstractmethod
    def restore(self, x: Float[Tensor, "rows row_length channels"]) -> Float[Tensor, "batch length channels"]:
        """The inverse of `align`."""

    def zero_padding(self, x: Float[Tensor, "rows row_length channels"]) -> Float[Tensor, "rows row_length channels"]:
        """Set the padding to zero."""
        return x.masked_fill(~self.mask[..., None], 0)

    def last(
        self,
        x: Float[Tensor, "rows row_length channels"],
        before: Float[Tensor, "rows n_last channels"] | None,
        n_last: int,
    ) -> Float[Tensor, "rows n_last channels"]:
        """The last n_last real tokens of each row. A short row is extended by the end of `before`, or by zeros."""
        if before is None:
            before = x.new_zeros(x.shape[0], n_last, x.shape[-1])
        stream = torch.cat([before.to(x.dtype), x], 1)
        index = self.lengths[:, None] + torch.arange(n_last, device=x.device)
        return stream.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class Alignment(Rows):
    """Moves the real tokens of each row to its start, in order, and back.

    Args:
        attention_mask: (batch, length), true or nonzero where a token is real. Padding may be anywhere.
    """

    def __init__(self, attention_mask: Tensor, batch: int, length: int) -> None:
        if tuple(attention_mask.shape) != (batch, length):
            raise ValueError(
                f"attention_mask must be (batch, length) = ({batch}, {length}), got {tuple(attention_mask.shape)}"
            )
        real = attention_mask.bool()
        self._order = torch.argsort(~real, dim=1, stable=True)
        self._place = torch.argsort(self._order, dim=1)
        self.mask = real.gather(1, self._order)
        self.lengths = real.sum(1)

    def align(self, x: Float[Tensor, "batch length channels"]) -> Float[Tensor, "batch length channels"]:
        """The row with its real tokens first."""
        return x.gather(1, self._order[..., None].expand(-1, -1, x.shape[-1]))

    def restore(self, x: Float[Tensor, "batch length channels"]) -> Float[Tensor, "batch length channels"]:
        """The inverse of `align`."""
        return x.gather(1, self._place[..., None].expand(-1, -1, x.shape[-1]))


class Packing(Rows):
    """Splits a packed row into one row for each sequence, and packs it again.

    Args:
        cu_seqlens: int32, (n + 1,): the offsets, ascending from 0 to length.
    """

    def __init__(self, cu_seqlens: Tensor, batch: int, length: int) -> None:
        n_sequences(batch, cu_seqlens)
        offsets = cu_seqlens.long()
        self.lengths = offsets[1:] - offsets[:-1]
        longest = length  # for tensors whose values cannot be read
        if plain(cu_seqlens):
            require_offsets(cu_seqlens, length)
            longest = int(self.lengths.max())
        place = torch.arange(longest, device=offsets.device)
        self.mask = place < self.lengths[:, None]
        self._source = (offsets[:-1, None] + place).clamp(max=max(0, length - 1))
        token = torch.arange(length, device=offsets.device)
        self._row = torch.searchsorted(offsets[1:], token, right=True)
        self._place = token - offsets[self._row]

    def align(self, x: Float[Tensor, "1 length channels"]) -> Float[Tensor, "rows row_length channels"]:
        return x[0, self._source]

    def restore(self, x: Float[Tensor, "rows row_length channels"]) -> Float[Tensor, "1 length channels"]:
        return x[self._row, self._place][None]
