"""Learned absolute positions, added to the embeddings at a model's input.

Source: the Transformer (arXiv:1706.03762), section 3.5, with a learned table as in GPT.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from anymamba.base.sizes import require_sizes
from anymamba.ops.observers import plain
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
        return x + F.embedding(positions, self.table).to(x.dtype), PositionsState(after)

    def _require_room(self, length: int) -> None:
        if length > self.max_positions:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the table of {self.max_positions} absolute positions; "
                f'raise max_positions, shorten the sequence, or use positions="rotary", which has no limit'
            )
