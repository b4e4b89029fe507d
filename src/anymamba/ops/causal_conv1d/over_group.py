"""The inputs before a rank's part of a spread sequence: the halo of the causal convolution.

A rank needs the last width - 1 inputs before its part. If every part has so many, the rank before sends them.
Otherwise, or with padding, they may come from several ranks: every rank sends its last inputs to all others, which
choose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.ops.groups import SequenceGroup, from_previous_rank, gathered_parts


def inputs_before(
    x: Tensor, n: int, initial_state: Tensor | None, cu_seqlens: Tensor | None, group: SequenceGroup
) -> Tensor:
    """The n inputs before this rank's part, as the initial state of a convolution of the part with local offsets.

    Args:
        x: (batch, length, d_inner), this rank's part.
        initial_state: (n_sequences, n, d_inner) of the whole sequences; None means zeros.
        cu_seqlens: the whole sequence's offsets, or None.
    Returns (n_sequences, n, d_inner).
    """
    tail = x[:, max(0, x.shape[1] - n) :]
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype)
    if cu_seqlens is None:
        return last_inputs_before(tail, None, n, initial_state, group)
    return _of_arriving(last_inputs_before(tail, None, n, None, group)[0], initial_state, cu_seqlens, group)


def last_inputs_before(
    tail: Tensor, n_real: Tensor | None, n: int, initial_state: Tensor | None, group: SequenceGroup
) -> Tensor:
    """The last n inputs before this rank's part, (batch, n, d_inner); those before the whole sequence come from
    initial_state, or are zero.

    Args:
        tail: (batch, n or fewer, d_inner), the last inputs of this rank's part that are not padding.
        n_real: (batch,) how many inputs of the part are not padding; the tail then has length n, with other values
            before the real ones. None means that there is no padding.
    """
    if n_real is None and min(group.lengths) >= n:
        before = from_previous_rank(tail, group)
        return before if group.rank or initial_state is None else before + initial_state  # connects the exchange
    if n_real is None:
        n_real = torch.full((tail.shape[0],), tail.shape[1], device=tail.device)
        tail = torch.cat([tail.new_zeros(tail.shape[0], n - tail.shape[1], tail.shape[2]), tail], 1)
    if initial_state is None:
        initial_state = torch.zeros_like(tail)
    tails, counts = gathered_parts(tail, group), gathered_parts(n_real, group)
    stream = torch.cat([initial_state, *tails], 1)
    place = torch.arange(n, device=tail.device)
    is_before = torch.arange(group.size, device=tail.device) < group.rank
    valid = (place >= n - counts[..., None]) & is_before[:, None, None]  # (size, batch, n)
    valid = torch.cat([torch.ones_like(valid[:1]), valid]).transpose(0, 1).flatten(1)
    chosen = torch.argsort(valid, dim=1, stable=True)[:, valid.shape[1] - n :]
    return stream.gather(1, chosen[..., None].expand(-1, -1, stream.shape[2]))


def _of_arriving(before: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor, group: SequenceGroup) -> Tensor:
    """Initial states (n_sequences, n, d_inner) of local sequences, from the inputs before the part (n, d_inner).

    Only the sequence that arrives takes these, from its own beginning on.
    """
    n = before.shape[0]
    arriving = group.arriving(cu_seqlens)
    begin = torch.where(arriving, cu_seqlens[:-1], 0).sum()
    place = torch.arange(n, device=before.device)
    older: Tensor | int = 0
    rows = before.new_zeros(())
    if initial_state is not None:
        rows = initial_state
        source = (place + group.start - begin).clamp(0, max(0, n - 1))
        older = initial_state.index_select(0, arriving.long().argmax()[None])[0].index_select(0, source)
    own = torch.where((group.start - n + place >= begin)[:, None], before, older)
    return torch.where(arriving[:, None, None], own, rows)
