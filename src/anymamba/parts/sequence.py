"""The base class of every layer: it maps a sequence and a state to a sequence and the new state."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from anymamba.ops.checks import n_sequences
from anymamba.ops.groups import is_spread
from anymamba.parts.padding import Alignment, Packing, Rows
from anymamba.parts.state import require_state


class SequenceLayer(nn.Module):
    """A map of sequences (batch, length, width), causal unless `is_causal` is false.

    `forward` on a whole sequence, `forward` on its pieces with the state carried between them, and `step` on each token
    compute the same result. A layer defines `run`, which receives rows of real tokens followed by padding; this covers
    padded and packed batches. It may define `run_packed` to take a packed row directly, and `run_step` if one token can
    be computed faster than by `run`.
    """

    state_type: type = tuple
    """The type that `init_state` returns; the state of another layer is refused."""

    projects_input: bool = False
    """Whether the layer uses its input in one linear map only, so that autocast converts the input in any case."""

    is_causal: bool = True
    """Whether an output depends on its own and earlier tokens only. Other layers have no state and no `step`."""

    takes_parts: bool = False
    """Whether the layer runs on parts of sequences, in `anymamba.parallel.context_parallel`. Others refuse."""

    @property
    def grows(self) -> bool:
        """Whether the state grows with the sequence, as a cache does."""
        return False

    @property
    def exports_step(self) -> bool:
        """Whether `step` can be exported to ONNX: real arithmetic on a state of fixed size."""
        return False

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        state: Any = None,
        *,
        attention_mask: Bool[Tensor, "batch length"] | None = None,
        cu_seqlens: Int[Tensor, " n_sequences_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "batch length width"], Any]:
        """Run the layer over sequences.

        Args:
            x: (batch, length, width).
            state: one row per sequence; defaults to the state before the first token.
            attention_mask: (batch, length), true at real tokens. Padding may be anywhere; it changes neither the
                outputs at real tokens nor the state. Outputs at padding are undefined.
            cu_seqlens: int32 offsets of sequences packed along the length of one row.
        Returns the output at each position, and the state after the last real token of each sequence.
        Raises ValueError if both a mask and offsets are given, the state has the wrong number of rows, or the layer
            does not run on parts of sequences, and TypeError if the state belongs to another layer.
        """
        if not self.takes_parts and is_spread():
            raise ValueError(
                f"{type(self).__name__} needs whole sequences, but context_parallel gives it parts; use a layer that "
                "takes parts (Mamba, S6, Attention, MLP), or keep each sequence on one process"
            )
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
        """Run one token per row, like `forward` at length one. Raises the same errors."""
        require_state(state, self.state_type, x.shape[0])
        return self.run_step(x, state)

    @abstractmethod
    def run(self, x: Float[Tensor, "rows length width"], state: Any, rows: Rows | None) -> tuple[Tensor, Any]:
        """`forward` on rows whose real tokens come first. `rows` has their number; None means that all are real."""

    def run_packed(
        self, x: Float[Tensor, "1 length width"], state: Any, cu_seqlens: Int[Tensor, " n_sequences_plus_1"]
    ) -> tuple[Float[Tensor, "1 length width"], Any]:
        """`forward` on a packed row. By default it calls `run` with one row for each sequence."""
        rows = Packing(cu_seqlens, *x.shape[:2])
        y, state = self.run(rows.align(x), state, rows)
        return rows.restore(y), state

    def run_step(self, x: Float[Tensor, "batch width"], state: Any) -> tuple[Float[Tensor, "batch width"], Any]:
        """`step` after the state was checked. By default it calls `run` at length one."""
        y, state = self.run(x[:, None], state, None)
        return y[:, 0], state

    @abstractmethod
    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> Any:
        """The state before the first token of `batch` sequences. dtype is that of the activations; it defaults to the
        weights' dtype."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Redraw all parameters, in the order of construction."""
