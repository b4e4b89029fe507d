"""The two strands of DNA: a sequence and its reverse complement, read by the same parameters.

A model of both strands runs over each strand by itself. So its layers need not know about strands: the strands are more
rows of the batch. At the end both are brought to the positions of the given strand, side by side in the channels.
There the reverse complement of the input is `reversed_strands`: the length is reversed, and the halves of the channels
change places.

Source: Caduceus (arXiv:2403.03234), section 3.2. Its layers keep both strands in the channels; the function is equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def complement_table(complement: Sequence[int], n_ids: int, device: torch.device) -> Int[Tensor, " n_ids"]:
    """The complement of each of n_ids ids; ids that are not listed are their own."""
    return torch.tensor([*complement, *range(len(complement), n_ids)], device=device)


def both_strands(ids: Int[Tensor, "batch length"], table: Int[Tensor, " n_ids"]) -> Int[Tensor, "both length"]:
    """The rows, and after them the reverse complement of each."""
    return torch.cat([ids, table[ids.flip(1).long()].to(ids.dtype)])


def both_masks(mask: Tensor | None) -> Tensor | None:
    """A mask (batch, length) of rows, for `both_strands`."""
    return None if mask is None else torch.cat([mask, mask.flip(1)])


def both_offsets(cu_seqlens: Int[Tensor, " n_plus_1"]) -> Int[Tensor, " twice_n_plus_1"]:
    """The offsets of a packed row and its reverse complement, one after the other; there its last sequence is first."""
    length = cu_seqlens[-1]
    return torch.cat([cu_seqlens, 2 * length - cu_seqlens.flip(0)[1:]])


def side_by_side(rows: Float[Tensor, "both length width"]) -> Float[Tensor, "batch length twice_width"]:
    """The strands of `both_strands` in the channels, each at the positions of the given strand."""
    given, other = rows.tensor_split(2)
    return torch.cat([given, other.flip(1)], -1)


def in_rows(x: Float[Tensor, "batch length twice_width"]) -> Float[Tensor, "both length width"]:
    """The inverse of `side_by_side`: each strand in its own direction."""
    given, other = x.chunk(2, dim=-1)
    return torch.cat([given, other.flip(1)])


def reversed_strands(x: Float[Tensor, "batch length twice_width"]) -> Float[Tensor, "batch length twice_width"]:
    """What `side_by_side` gives for the reverse complement of the input."""
    return torch.cat(x.flip(1).chunk(2, dim=-1)[::-1], -1)


def head_weight(
    weight: Float[Tensor, "n_ids width"], table: Int[Tensor, " n_ids"]
) -> Float[Tensor, "n_ids twice_width"]:
    """The weight of a head over both strands: an id's logit on one plus its complement's logit on the other."""
    return torch.cat([weight, weight[table]], 1)
