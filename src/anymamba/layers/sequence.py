"""What every layer is: a map of sequences with a state that goes in and comes out."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from anymamba.layers.padding import Rows, as_rows
from anymamba.layers.state import require_state


class SequenceLayer(nn.Module):
    """A causal map of sequences (batch, length, width).

    `forward` on a whole sequence, on its pieces with the state carried between them, and `step` token by token compute
    the same. A layer writes `run`, which sees rows of real tokens followed by padding, and so serves padded batches and
    packed ones; and `run_step`, where one token has a shorter way.
    """

    state_type: ClassVar[type] = tuple
    """What `init_state` makes; another layer's state is refused."""

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        state: Any = None,
        *,
        attention_mask: Bool[Tensor, "batch length"] | None = None,
        cu_seqlens: Int[Tensor, " n_sequences_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "batch length width"], Any]:
        """The output at each position, and the state after the last real token of each sequence.

        Args:
            x: (batch, length, width).
            state: one row per sequence; None means the beginning.
            attention_mask: (batch, length), true at real tokens; padding may lie on either side.
            cu_seqlens: int32 borders of sequences packed along the length of one row.
        Raises ValueError where the state has another number of rows, TypeError where it is another layer's.
        """
        rows = as_rows(x, attention_mask, cu_seqlens)
        aligned = x if rows is None else rows.align(x)
        if state is not None:
            require_state(state, self.state_type, aligned.shape[0])
        y, state = self.run(aligned, state, rows)
        return y if rows is None else rows.restore(y), state

    def step(self, x: Float[Tensor, "batch width"], state: Any) -> tuple[Float[Tensor, "batch width"], Any]:
        """One token per row: `forward` at length one. Raises as `forward` does."""
        require_state(state, self.state_type, x.shape[0])
        return self.run_step(x, state)

    @abstractmethod
    def run(self, x: Float[Tensor, "rows length width"], state: Any, rows: Rows | None) -> tuple[Tensor, Any]:
        """`forward` on rows whose real tokens come first; `rows` tells how many they are, None that all are real."""

    def run_step(self, x: Float[Tensor, "batch width"], state: Any) -> tuple[Float[Tensor, "batch width"], Any]:
        """`step` with a state that fits: `run` at length one, unless a layer has a shorter way."""
        y, state = self.run(x[:, None], state, None)
        return y[:, 0], state

    @abstractmethod
    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> Any:
        """The state before the first token of `batch` sequences; dtype is the activations', None the weights'."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw every parameter anew, in the order of construction."""
