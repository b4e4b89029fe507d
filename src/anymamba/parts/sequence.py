"""What every layer is: a map of sequences with a state that goes in and comes out."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from anymamba.ops.checks import n_sequences
from anymamba.parts.padding import Alignment, Packing, Rows
from anymamba.parts.state import require_state


class SequenceLayer(nn.Module):
    """A causal map of sequences (batch, length, width).

    `forward` on a whole sequence, on its pieces with the state carried between them, and `step` token by token compute
    the same. A layer writes `run`, which sees rows of real tokens followed by padding, and so serves padded batches and
    packed ones. It may write `run_packed`, where it takes a packed row as it is, and `run_step`, where one token has a
    shorter way.
    """

    state_type: type = tuple
    """What `init_state` makes; another layer's state is refused."""

    @property
    def grows(self) -> bool:
        """Whether the state grows with the sequence, as a cache does."""
        return False

    @property
    def exports_step(self) -> bool:
        """Whether ONNX can express `step`: real arithmetic on a state of fixed size."""
        return False

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
            attention_mask: (batch, length), true at real tokens. Padding may lie anywhere; it changes neither the
                outputs at real tokens nor the state. Outputs at padding mean nothing.
            cu_seqlens: int32 offsets of sequences packed along the length of one row.
        Raises ValueError where both a mask and offsets are given, or the state has another number of rows, TypeError
            where it is another layer's.
        """
        if attention_mask is not None and cu_seqlens is not None:
            raise ValueError("give attention_mask or cu_seqlens, not both; packed sequences need no padding")
        if state is not None:
            require_state(state, self.state_type, n_sequences(x.shape[0], cu_seqlens))
        if cu_seqlens is not None:
            return self.run_packed(x, state, cu_seqlens)
        if attention_mask is None:
            return self.run(x, state, None)
        rows = Alignment(attention_mask, *x.shape[:2])
        y, state = self.run(rows.align(x), state, rows)
        return rows.restore(y), state

    def step(self, x: Float[Tensor, "batch width"], state: Any) -> tuple[Float[Tensor, "batch width"], Any]:
        """One token per row: `forward` at length one. Raises as `forward` does."""
        require_state(state, self.state_type, x.shape[0])
        return self.run_step(x, state)

    @abstractmethod
    def run(self, x: Float[Tensor, "rows length width"], state: Any, rows: Rows | None) -> tuple[Tensor, Any]:
        """`forward` on rows whose real tokens come first; `rows` tells how many they are, None that all are real."""

    def run_packed(
        self, x: Float[Tensor, "1 length width"], state: Any, cu_seqlens: Int[Tensor, " n_sequences_plus_1"]
    ) -> tuple[Float[Tensor, "1 length width"], Any]:
        """`forward` on a packed row: `run` with a row for each sequence, unless a layer takes the row as it is."""
        rows = Packing(cu_seqlens, *x.shape[:2])
        y, state = self.run(rows.align(x), state, rows)
        return rows.restore(y), state

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
