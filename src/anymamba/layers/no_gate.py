"""A block without a gate: the S4 block with a linear map in place of its GLU.

    y = out_proj(gelu(inner(x)))

The Mamba paper (arXiv:2312.00752, table 1) does not describe its "no gate" architecture in detail; this is the block of
S4 (arXiv:2111.00396) without its multiplicative branch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anymamba.parts.padding import Rows
from anymamba.parts.sequence import SequenceLayer


class NoGate(SequenceLayer):
    """`inner`, GELU, and a linear map of the channels.

    Args:
        d_model: width of the input and output.
        inner: a function that makes the map of sequences from its number of channels, d_model.
        bias: whether the linear map has a bias.
    """

    takes_parts = True  # an inner layer that does not refuses itself

    def __init__(
        self, d_model: int, inner: Callable[[int], nn.Module], bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.d_model = d_model
        layer: Any = inner(d_model)
        self.inner, self.state_type = layer, layer.state_type
        self.out_proj = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Redraw all parameters, in the order of construction."""
        self.inner.reset_parameters()
        self.out_proj.reset_parameters()

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> Any:
        """The inner layer's initial state."""
        return self.inner.init_state(batch, dtype)

    @property
    def grows(self) -> bool:
        return self.inner.grows

    @property
    def exports_step(self) -> bool:
        return self.inner.exports_step

    def run(
        self, x: Float[Tensor, "rows length d_model"], state: Any, rows: Rows | None
    ) -> tuple[Float[Tensor, "rows length d_model"], Any]:
        y, state = self.inner(x, state, attention_mask=None if rows is None else rows.mask)
        return self.out_proj(F.gelu(y)), state

    def run_packed(self, x: Tensor, state: Any, cu_seqlens: Tensor) -> tuple[Tensor, Any]:
        y, state = self.inner(x, state, cu_seqlens=cu_seqlens)
        return self.out_proj(F.gelu(y)), state

    def run_step(self, x: Float[Tensor, "batch d_model"], state: Any) -> tuple[Float[Tensor, "batch d_model"], Any]:
        y, state = self.inner.step(x, state)
        return self.out_proj(F.gelu(y)), state
