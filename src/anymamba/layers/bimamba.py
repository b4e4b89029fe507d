"""A Mamba layer that reads its sequence in both directions; the projections are shared.

    [x, z] = in_proj(input)
    y = map(x, z) + reverse(map'(reverse(x), reverse(z)))        each map: convolution, selective scan, gate
    output = out_proj(y)

Two Mamba layers with the same in_proj and out_proj, one of them over the reversed sequence, have this sum. So the two
projections are computed once.

Source: Caduceus (arXiv:2403.03234), section 3.1 (BiMamba).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from anymamba.base.sizes import require_sizes
from anymamba.layers.s6 import SelectiveSSM
from anymamba.ops.checks import n_sequences, require_offsets
from anymamba.ops.observers import plain
from anymamba.parts.conv import ShortConvolution
from anymamba.parts.norm import build_norm
from anymamba.parts.options import MambaOptions
from anymamba.parts.padding import Rows
from anymamba.parts.recipes import recomputing
from anymamba.parts.sequence import SequenceLayer
from anymamba.parts.state import NoState


class Direction(SelectiveSSM):
    """What a Mamba layer has between its projections: short convolution, selective scan and gate.

    Args:
        d_inner: channels.
        dt_rank: rank of the step projection.
        options: of the layer.
    """

    def __init__(self, d_inner: int, dt_rank: int, options: MambaOptions, device=None, dtype=None) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = ShortConvolution(d_inner, options.d_conv, options.conv_bias, **like)
        self._build_selection(
            d_inner,
            d_state=options.d_state,
            dt_rank=dt_rank,
            dt_range=(options.dt_min, options.dt_max, options.dt_init_floor),
            dt_init=options.dt_init,
            dt_scale=options.dt_scale,
            b_discretization=options.b_discretization,
            selective=(options.selective_delta, options.selective_B, options.selective_C),
            A_init=options.A_init,
            norms=(options.inner_norm_weights, options.norm_eps) if options.inner_norms else None,
            like=like,
        )

    def reset_parameters(self) -> None:
        """Redraw all parameters, in the order of construction."""
        self.conv.reset_parameters()
        self._reset_selection()

    def forward(
        self,
        u: Float[Tensor, "rows length d_inner"],
        z: Float[Tensor, "rows length d_inner"],
        rows: Rows | None,
        cu_seqlens: Tensor | None,
    ) -> Float[Tensor, "rows length d_inner"]:
        """The gated output. Padding of u must be zero and after the real tokens."""
        with recomputing(u):
            return self._scan(self.conv(u, None, cu_seqlens).y, z, None, rows, cu_seqlens).y


class BiMamba(SequenceLayer):
    """A bidirectional Mamba layer: two maps, one of them over the reversed sequence, between shared projections.

    Each output depends on the whole sequence. So the layer takes whole sequences only: it has no state and no `step`.

    Args:
        d_model: width of the input and output.
        options: those of `Mamba`; both directions have the same.
    Raises ValueError for invalid sizes.
    """

    state_type = NoState
    projects_input = True
    is_causal = False

    def __init__(self, d_model: int, options: MambaOptions | None = None, device=None, dtype=None) -> None:
        super().__init__()
        options = options or MambaOptions()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_inner = d_model, int(options.expand * d_model)
        require_sizes(d_model=d_model, d_inner=self.d_inner)
        dt_rank = math.ceil(d_model / 16) if options.dt_rank is None else options.dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=options.bias, **like)
        self.ahead = Direction(self.d_inner, dt_rank, options, **like)
        self.back = Direction(self.d_inner, dt_rank, options, **like)
        norm = options.output_norm
        self.output_norm: Any = None if norm is None else build_norm(norm, self.d_inner, options.norm_eps, **like)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=options.bias, **like)

    def reset_parameters(self) -> None:
        """Redraw all parameters, in the order of construction."""
        for module in (self.in_proj, self.ahead, self.back, self.output_norm, self.out_proj):
            if module is not None:
                module.reset_parameters()

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> NoState:
        """Raises ValueError: there is no state before the first token, as the layer needs the whole sequence."""
        raise ValueError(_whole("has no state"))

    def step(self, x: Float[Tensor, "batch width"], state: Any) -> tuple[Float[Tensor, "batch width"], Any]:
        """Raises ValueError: an output depends on the tokens after it."""
        raise ValueError(_whole("has no step"))

    def run(self, x: Tensor, state: Any, rows: Rows | None) -> tuple[Tensor, NoState]:
        if state is not None:
            raise ValueError(_whole("has no state"))
        return self._both(x, rows, None, _reversed_rows(x, rows)), NoState()

    def run_packed(self, x: Tensor, state: Any, cu_seqlens: Tensor) -> tuple[Tensor, NoState]:
        if state is not None:
            raise ValueError(_whole("has no state"))
        return self._both(x, None, cu_seqlens, _reversed_sequences(x, cu_seqlens)), NoState()

    def _both(self, x: Tensor, rows: Rows | None, cu_seqlens: Tensor | None, order: Tensor) -> Tensor:
        """Both directions over rows; `order` (rows, length) reverses the real tokens of each sequence."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        if rows is not None:
            u = rows.zero_padding(u)
        y = self.ahead(u, z, rows, cu_seqlens)
        y = y + _permuted(self.back(_permuted(u, order), _permuted(z, order), rows, cu_seqlens), order)
        return self.out_proj(y if self.output_norm is None else self.output_norm(y))


def _whole(what: str) -> str:
    return f"bimamba reads sequences in both directions and {what}; give it whole sequences, or use the mixer mamba"


def _permuted(x: Float[Tensor, "rows length channels"], order: Int[Tensor, "rows length"]) -> Tensor:
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


def _reversed_rows(x: Tensor, rows: Rows | None) -> Int[Tensor, "rows length"]:
    """The places of the real tokens of each row in reverse; padding after them keeps its place."""
    place = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    if rows is None:
        return place.flip(1)
    return torch.where(rows.mask, rows.lengths[:, None] - 1 - place, place)


def _reversed_sequences(x: Tensor, cu_seqlens: Tensor) -> Int[Tensor, "1 length"]:
    """The places of the tokens of each packed sequence in reverse."""
    n_sequences(x.shape[0], cu_seqlens)
    if plain(cu_seqlens):
        require_offsets(cu_seqlens, x.shape[1])
    offsets, place = cu_seqlens.long(), torch.arange(x.shape[1], device=x.device)
    sequence = torch.searchsorted(offsets[1:], place, right=True)
    return (offsets[sequence] + offsets[sequence + 1] - 1 - place)[None]
