"""H3: a shift and two multiplications around any map of sequences.

    [q, k, v] = in_proj(input)
    k = shift(k) + D k                                a learned filter over the last d_shift keys
    y = out_proj(sum over i of q_i inner(k_i v_j))    per head; i, j run over its d_head channels

With d_head = 1 this is q * inner(k * v). The published layer has a diagonal state space model as `inner`.

Source: H3 (arXiv:2212.14052), section 3.1 and algorithm 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anymamba.base.sizes import require_sizes
from anymamba.ops.causal_conv1d import causal_conv1d
from anymamba.ops.observers import plain
from anymamba.parts import head_products, toeplitz
from anymamba.parts.derivatives import as_operations
from anymamba.parts.fft_conv import conv_of_taps
from anymamba.parts.linear import linear
from anymamba.parts.options import H3Options
from anymamba.parts.padding import Rows
from anymamba.parts.parameters import KernelParameters, activations_of
from anymamba.parts.sequence import SequenceLayer
from anymamba.parts.state import map_state


class ShiftSSM(KernelParameters):
    """A state space model whose A shifts its d_shift states by one: a causal filter of that length plus a skip.

        y[t] = sum over j < d_shift of C[j] u[t - j] + D u[t]

    B is fixed to the first unit vector, the initial value in the published layer: only the correlation of B and C
    matters, so a learned B would add nothing.
    """

    def __init__(self, d_model: int, d_shift: int, device=None, dtype=None) -> None:
        super().__init__()
        wide = self.wide(dtype)
        # the last column is the present, as in `causal_conv1d`
        self.C = nn.Parameter(torch.empty(d_model, d_shift, device=device, dtype=wide))
        self.D = nn.Parameter(torch.empty(d_model, device=device, dtype=wide))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """C uniform on ±d_shift^-0.5 (Kaiming's rule with a = sqrt(5)), D standard normal."""
        bound = self.C.shape[1] ** -0.5
        nn.init.uniform_(self.C, -bound, bound)
        nn.init.normal_(self.D)

    def forward(
        self, u: Float[Tensor, "batch length d_model"], state: Float[Tensor, "batch d_shift_minus_1 d_model"] | None
    ) -> tuple[Tensor, Tensor]:
        """y in the dtype of u, and the last d_shift - 1 inputs."""
        d_shift, alone = self.C.shape[1], not as_operations(u) and plain(u, self.C)
        if alone and state is None and u.numel() and toeplitz.serves_taps(u.device.type, u.dtype, d_shift):
            kernel = torch.cat([self.C[:, -1:] + self.D[:, None], self.C[:, :-1].flip(1)], 1)
            last = F.pad(u, (0, 0, max(0, d_shift - 1 - u.shape[1]), 0))[:, -(d_shift - 1) :]
            return conv_of_taps(u, kernel), last
        y, state = causal_conv1d(u, self.C, initial_state=state)
        return (y + self.D * u).to(u.dtype), state


class H3State(NamedTuple):
    """State of an H3 layer."""

    shift: Float[Tensor, "batch d_shift_minus_1 d_model"]
    """The last keys before the shift, oldest first."""
    inner: Any
    """The inner layer's state for each product of two channels of a head; its tensors are (batch, d_head^2, ...)."""


class H3(SequenceLayer):
    """The H3 layer around any map of sequences.

    Args:
        d_model: width of the input and output.
        inner: a `SequenceLayer` over n_heads = d_model / d_head channels. Each of the d_head^2 products of a key and a
            value channel is one row of its batch.
        d_head: channels of a head.
        d_shift: length of the filter on the keys; 64 in the paper.
        bias: whether the projections have biases.
    Raises ValueError for invalid sizes.
    """

    state_type = H3State
    projects_input = True

    def __init__(
        self,
        d_model: int,
        inner: nn.Module,
        *,
        d_head: int = H3Options.d_head,
        d_shift: int = H3Options.d_shift,
        bias: bool = H3Options.bias,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        require_sizes(d_model=d_model, d_head=d_head, d_shift=d_shift)
        if d_model % d_head:
            raise ValueError(f"d_model must be a multiple of d_head, got {d_model} and {d_head}; change one of them")
        self.d_model, self.d_head, self.n_heads, self.d_shift = d_model, d_head, d_model // d_head, d_shift
        width = getattr(inner, "width", self.n_heads)
        if width != self.n_heads:
            raise ValueError(
                f"inner must have n_heads = d_model / d_head = {self.n_heads} channels, got {width}; "
                "build it with that width"
            )
        self.inner: Any = inner
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias, device=device, dtype=dtype)
        self.shift = ShiftSSM(d_model, d_shift, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)

    @property
    def grows(self) -> bool:
        return self.inner.grows

    def reset_parameters(self) -> None:
        """Redraw all parameters, in the order of construction."""
        for module in (self.inner, self.in_proj, self.shift, self.out_proj):
            module.reset_parameters()

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> H3State:
        """Zeros for the shift, and the inner layer's initial state."""
        like = activations_of(self.in_proj)
        like["dtype"] = dtype = dtype or like["dtype"]
        shift = torch.zeros(batch, self.d_shift - 1, self.d_model, **like)
        return H3State(shift, self._unfold(self.inner.init_state(batch * self.d_head**2, dtype), batch))

    def run(
        self, x: Float[Tensor, "rows length d_model"], state: H3State | None, rows: Rows | None
    ) -> tuple[Tensor, H3State]:
        """The layer over rows of real tokens."""
        # padding comes after all real tokens, so it does not reach them
        q, k, v = linear(self.in_proj, x).chunk(3, dim=-1)
        before = None if state is None else state.shift
        shifted, shift = self.shift(k, before)
        if rows is not None:
            shift = rows.last(k, before, self.d_shift - 1)
        mask = None if rows is None else rows.mask.repeat_interleave(self.d_head**2, 0)
        folded = None if state is None else map_state(lambda t: t.flatten(0, 1), state.inner)
        products, inner = self.inner(self._outer(shifted, v), folded, attention_mask=mask)
        return linear(self.out_proj, self._contract(q, products)), H3State(shift, self._unfold(inner, x.shape[0]))

    def run_step(self, x: Float[Tensor, "batch d_model"], state: H3State) -> tuple[Tensor, H3State]:
        """One token."""
        q, k, v = self.in_proj(x)[:, None].chunk(3, dim=-1)
        k, shift = self.shift(k, state.shift)
        folded = map_state(lambda t: t.flatten(0, 1), state.inner)
        products, inner = self.inner.step(self._outer(k, v)[:, 0], folded)
        y = self.out_proj(self._contract(q, products[:, None])[:, 0])
        return y, H3State(shift, self._unfold(inner, x.shape[0]))

    def _outer(
        self, k: Float[Tensor, "batch length d_model"], v: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "products length n_heads"]:
        """The products of key and value channels of each head; row (batch, i, j) has k_i v_j of all heads."""
        k, v = self._heads(k), self._heads(v)
        if self._reorders(k):
            return head_products.outer(k, v).flatten(2).permute(2, 1, 0)
        k, v = k.permute(0, 3, 1, 2), v.permute(0, 3, 1, 2)
        return (k[:, :, None] * v[:, None]).flatten(0, 2)

    def _contract(
        self, q: Float[Tensor, "batch length d_model"], products: Float[Tensor, "products length n_heads"]
    ) -> Float[Tensor, "batch length d_model"]:
        """Sum over i of q_i times row (batch, i, j) of the products, in the original order of channels."""
        q, sizes = self._heads(q), (q.shape[0], self.d_head, self.d_head)
        if self._reorders(products):
            return head_products.contract(q, products.permute(2, 1, 0).unflatten(2, sizes)).flatten(2)
        y = (q.permute(0, 3, 1, 2)[:, :, None] * products.unflatten(0, sizes)).sum(1)
        return y.permute(0, 2, 3, 1).flatten(2)

    def _heads(self, t: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length n_heads d_head"]:
        return t.unflatten(-1, (self.n_heads, self.d_head))

    def _reorders(self, t: Tensor) -> bool:
        """Whether the convolution of many rows reads them in another order than that of the layer's input."""
        return t.is_cuda and self.d_head > 1

    def _unfold(self, inner: Any, batch: int) -> Any:
        """The inner layer's state as (batch, d_head^2, ...)."""
        return map_state(lambda t: t.reshape(batch, self.d_head**2, *t.shape[1:]), inner)
