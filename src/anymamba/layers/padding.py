"""Padded batches: rows whose real tokens are marked by a mask are brought to the left, so that padding only follows."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Alignment:
    """Moves the real tokens of each row to its start, in order, and back.

    Args:
        attention_mask: (batch, length), true or nonzero where a token is real. Padding may lie anywhere.
    """

    mask: Bool[Tensor, "batch length"]
    """True at the real tokens of the aligned rows."""
    lengths: Int[Tensor, " batch"]
    """Real tokens in each row."""

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

    def zero_padding(self, x: Float[Tensor, "batch length channels"]) -> Float[Tensor, "batch length channels"]:
        """An aligned tensor with zeros at the padding."""
        return x.masked_fill(~self.mask[..., None], 0)

    def last(
        self,
        x: Float[Tensor, "batch length channels"],
        before: Float[Tensor, "batch n_last channels"] | None,
        n_last: int,
    ) -> Float[Tensor, "batch n_last channels"]:
        """The last n_last real tokens of each aligned row, reaching into what came before the row (or zeros)."""
        if before is None:
            before = x.new_zeros(x.shape[0], n_last, x.shape[-1])
        stream = torch.cat([before.to(x.dtype), x], 1)
        index = self.lengths[:, None] + torch.arange(n_last, device=x.device)
        return stream.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
