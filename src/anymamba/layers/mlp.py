"""The MLP between other mixers: two projections, a nonlinearity, and a product in the gated kinds.

    gelu:    y = out_proj(gelu(in_proj(x)))
    swiglu:  y = out_proj(u * silu(g)),  [u, g] = in_proj(x);  geglu and glu use gelu and sigmoid in place of silu

Source: the Transformer (arXiv:1706.03762), section 3.3; the gated kinds: arXiv:2002.05202.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anymamba.base.sizes import require_sizes
from anymamba.parts.gated import FUNCTIONS, gated_halves
from anymamba.parts.linear import linear
from anymamba.parts.options import MLPOptions
from anymamba.parts.padding import Rows
from anymamba.parts.sequence import SequenceLayer
from anymamba.parts.state import NoState

ACTIVATIONS = {"gelu": ("gelu", False), "swiglu": ("silu", True), "geglu": ("gelu", True), "glu": ("sigmoid", True)}
"""The nonlinearity of each kind, one of `gated.FUNCTIONS`, and whether it gates."""


class MLP(SequenceLayer):
    """An MLP that is applied to each token. It has no state.

    Args:
        d_model: width of the input and output.
        kind: "gelu" (tanh form), "swiglu", "geglu" or "glu".
        d_hidden: hidden width; defaults to 4 d_model for "gelu", 8/3 d_model rounded up to a multiple of 128 for the
            gated kinds, whose three matrices then have about as many parameters.
        bias: whether both projections have biases; defaults to True for "gelu" and False for the gated kinds.
    Raises ValueError for sizes below 1 and unknown kinds.
    """

    state_type = NoState
    projects_input = True
    takes_parts = True

    def __init__(
        self,
        d_model: int,
        kind: str = MLPOptions.kind,
        d_hidden: int | None = None,
        bias: bool | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if kind not in ACTIVATIONS:
            raise ValueError(f"kind must be one of {', '.join(ACTIVATIONS)}, got {kind!r}")
        self.activation, self.gated = ACTIVATIONS[kind]
        if d_hidden is None:
            d_hidden = -(-8 * d_model // (3 * 128)) * 128 if self.gated else 4 * d_model
        require_sizes(d_model=d_model, d_hidden=d_hidden)
        self.d_model, self.kind, self.d_hidden = d_model, kind, d_hidden
        bias = not self.gated if bias is None else bias
        self.in_proj = nn.Linear(d_model, (2 if self.gated else 1) * d_hidden, bias, device, dtype)
        self.out_proj = nn.Linear(d_hidden, d_model, bias, device, dtype)

    @property
    def exports_step(self) -> bool:
        return True

    def reset_parameters(self) -> None:
        """PyTorch's default for linear layers, in the order of construction."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> NoState:
        return NoState()

    def run(
        self, x: Float[Tensor, "rows length d_model"], state: NoState | None, rows: Rows | None
    ) -> tuple[Float[Tensor, "rows length d_model"], NoState]:
        return self._map(x), NoState()

    def run_packed(self, x: Tensor, state: NoState | None, cu_seqlens: Tensor) -> tuple[Tensor, NoState]:
        return self._map(x), NoState()

    def run_step(
        self, x: Float[Tensor, "batch d_model"], state: NoState
    ) -> tuple[Float[Tensor, "batch d_model"], NoState]:
        return self._map(x), NoState()

    def _map(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        hidden = linear(self.in_proj, x)
        if not self.gated:
            return linear(self.out_proj, FUNCTIONS[self.activation](hidden))
        return linear(self.out_proj, gated_halves(hidden, self.activation))
