"""Layers with reverse-complement equivariance: both strands of DNA share all parameters.

They carry (batch, length, 2 width): the strand that was given in the first half of the channels, the other one in the
second half, at the same positions. For the reverse complement of the ids the result is `reversed_strands` of the
result: the length is reversed and the halves change places.

    StrandEmbedding        ids -> (batch, length, 2 width)
    SharedStrands(layer)   any layer of that width over each strand in its own direction
    StrandHead             (batch, length, 2 width) -> logits, which are equivariant themselves

A language model with `complement` in its config computes the same function, with the strands in the batch.

Source: Caduceus (arXiv:2403.03234), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from anymamba.base.sizes import require_complement
from anymamba.parts.embedding import embedding
from anymamba.parts.sequence import SequenceLayer
from anymamba.parts.strands import (
    both_masks,
    both_offsets,
    both_strands,
    complement_table,
    head_weight,
    in_rows,
    side_by_side,
)


class _OfIds(nn.Module):
    """A weight with a row for each id, and the complement of each id."""

    def __init__(self, n_ids: int, width: int, complement: Sequence[int], device=None, dtype=None) -> None:
        super().__init__()
        require_complement(complement, n_ids)
        self.complement = tuple(complement)
        self.weight = nn.Parameter(torch.empty(n_ids, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 0.02)."""
        nn.init.normal_(self.weight, std=0.02)

    def table(self, device: torch.device) -> Int[Tensor, "n_ids"]:
        """The complement of each id."""
        return complement_table(self.complement, self.weight.shape[0], device)


class StrandEmbedding(_OfIds):
    """Embeds ids on both strands with one table.

    Args:
        n_ids: rows of the table.
        width: size of a vector; the output has twice as many channels.
        complement: the complement of each id; ids that are not listed are their own.
    Raises ValueError if the complement of a complement is not the id itself.
    """

    def forward(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length twice_width"]:
        """The vectors of both strands."""
        return side_by_side(embedding(both_strands(ids, self.table(ids.device)), self.weight))


class SharedStrands(nn.Module):
    """Runs one layer over each strand in its own direction.

    Each output depends on the whole sequence, even if the layer is causal. So there is no state and no `step`.

    Args:
        layer: any layer of `width` channels; this one has twice as many.
    """

    def __init__(self, layer: SequenceLayer) -> None:
        super().__init__()
        self.layer = layer

    def reset_parameters(self) -> None:
        """Redraw the layer's parameters."""
        self.layer.reset_parameters()

    def forward(
        self,
        x: Float[Tensor, "batch length twice_width"],
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Float[Tensor, "batch length twice_width"]:
        """Both strands through the layer; arguments as in `SequenceLayer.forward`."""
        rows, offsets = in_rows(x), None
        if cu_seqlens is not None:
            rows, offsets = rows.reshape(1, -1, rows.shape[-1]), both_offsets(cu_seqlens)
        y, _ = self.layer(rows, attention_mask=both_masks(attention_mask), cu_seqlens=offsets)
        return side_by_side(y.reshape(2 * x.shape[0], x.shape[1], -1))


class StrandHead(_OfIds):
    """Logits from both strands: an id's logit on one strand plus its complement's on the other.

    Args:
        n_ids: number of logits.
        width: channels of one strand.
        complement: as in `StrandEmbedding`.
    """

    def forward(self, x: Float[Tensor, "batch length twice_width"]) -> Float[Tensor, "batch length n_ids"]:
        """The logits at the positions of the given strand."""
        return F.linear(x, head_weight(self.weight, self.table(x.device)))
