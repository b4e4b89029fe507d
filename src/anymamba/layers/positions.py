"""Learned absolute positions, added to the embeddings at a model's input.

Source: the Transformer (arXiv:1706.03762), section 3.5, with a learned table as in GPT.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from anymamba.base.sizes import require_sizes
from anymamba.ops.checks import n_sequences
from anymamba.ops.groups import SequenceGroup, current_group, gathered_parts
from anymamba.ops.observers import plain
from anymamba.parts.embedding import embedding
from anymamba.parts.padding import Rows
from anymamba.parts.sequence import SequenceLayer


class PositionsState(NamedTuple):
    """State of `LearnedPositions`."""

    n_seen: Int[Tensor, " batch"]
    """Tokens seen by each row, which is the position of the next one."""


class LearnedPositions(SequenceLayer):
    """y[t] = x[t] + table[position of t].

    Args:
        max_positions: length of the table; a longer sequence is an error.
        d_model: width of the embeddings.
    Raises ValueError for sizes below 1, and for a sequence that is longer than the table.
    """

    state_type = PositionsState
    takes_parts = True

    def __init__(self, max_positions: int, d_model: int, device=None, dtype=None) -> None:
        super().__init__()
        require_sizes(max_positions=max_positions, d_model=d_model)
        self.max_positions, self.d_model = max_positions, d_model
        self.table = nn.Parameter(torch.empty(max_positions, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02), like the embeddings."""
        nn.init.normal_(self.table, std=0.02)

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> PositionsState:
        """No tokens seen. Counts are int64, whatever dtype is."""
        return PositionsState(torch.zeros(batch, dtype=torch.int64, device=self.table.device))

    def run(
        self, x: Float[Tensor, "rows length d_model"], state: PositionsState | None, rows: Rows | None
    ) -> tuple[Float[Tensor, "rows length d_model"], PositionsState]:
        batch, length, _ = x.shape
        group = current_group(length)
        if group is not None:
            return self._run_part(x, state, rows, None, group)
        if state is None and rows is None:
            self._require_room(length)
            after = torch.full((batch,), length, dtype=torch.int64, device=x.device)
            return x + self.table[:length].to(x.dtype), PositionsState(after)
        before = self.init_state(batch).n_seen if state is None else state.n_seen
        after = before + (length if rows is None else rows.lengths)
        if batch and plain(after):
            self._require_room(int(after.max()))
        positions = before[:, None] + torch.arange(length, device=x.device)
        if rows is not None:  # positions of padding may exceed the table
            positions = positions.masked_fill(~rows.mask, 0)
        return x + embedding(positions, self.table).to(x.dtype), PositionsState(after)

    def run_packed(
        self, x: Float[Tensor, "1 length d_model"], state: PositionsState | None, cu_seqlens: Tensor
    ) -> tuple[Float[Tensor, "1 length d_model"], PositionsState]:
        group = current_group(x.shape[1])
        if group is None:
            return super().run_packed(x, state, cu_seqlens)
        return self._run_part(x, state, None, cu_seqlens, group)

    def _run_part(
        self,
        x: Tensor,
        state: PositionsState | None,
        rows: Rows | None,
        cu_seqlens: Tensor | None,
        group: SequenceGroup,
    ) -> tuple[Tensor, PositionsState]:
        """`run` or `run_packed` on this process's part of the sequences."""
        before = self.init_state(n_sequences(x.shape[0], cu_seqlens)).n_seen if state is None else state.n_seen
        if rows is not None:
            counts = gathered_parts(rows.lengths, group)
            positions = (before + counts[: group.rank].sum(0))[:, None] + torch.arange(x.shape[1], device=x.device)
            positions, after = positions.masked_fill(~rows.mask, 0), before + counts.sum(0)
        elif cu_seqlens is not None:
            positions = (group.positions(cu_seqlens, x.device) + before[group.sequences(cu_seqlens)])[None]
            after = before + cu_seqlens.diff()
        else:
            positions, after = before[:, None] + group.positions(None, x.device), before + group.length
        if after.numel() and plain(after):
            self._require_room(int(after.max()))
        n_seen = group.only_where_it_ends(after, cu_seqlens)
        return x + embedding(positions, self.table).to(x.dtype), PositionsState(n_seen)

    def _require_room(self, length: int) -> None:
        if length > self.max_positions:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the table of {self.max_positions} absolute positions; "
                f'raise max_positions, shorten the sequence, or use positions="rotary", which has no limit'
            )
