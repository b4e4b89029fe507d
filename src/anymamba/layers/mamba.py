"""The Mamba layer: projections, short convolution, selective scan, gate.

    [x, z] = in_proj(input);  x = silu(conv(x))
    [dt, B, C] = x_proj(x);   delta = softplus(dt_proj(dt) + delta_bias)
    y = out_proj(scan(x, delta, A, B, C, D) * silu(z))

Source: Mamba (arXiv:2312.00752), figure 3 and section 3.4.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anymamba.base.sizes import require_sizes
from anymamba.layers.s6 import SelectiveSSM
from anymamba.parts.conv import ShortConvolution
from anymamba.parts.gated import gated
from anymamba.parts.norm import build_norm
from anymamba.parts.options import MambaOptions
from anymamba.parts.padding import Rows
from anymamba.parts.recipes import recomputing
from anymamba.parts.sequence import SequenceLayer
from anymamba.parts.state import MambaState


class GatedBlock(SequenceLayer):
    """Projections, short convolution and gate of the Mamba block. A subclass provides the map of sequences inside.

    y = out_proj(map(silu(conv(x))) * silu(z)) where [x, z] = in_proj(input).
    """

    state_type = MambaState
    projects_input = True
    takes_parts = True

    def _build_projections(
        self, d_model: int, d_conv: int, expand: float, conv_bias: bool, bias: bool, like: dict[str, Any]
    ) -> None:
        """Make the modules before the map. `_build_output` makes those after it, so that weights are drawn in order."""
        self.d_model, self.d_conv, self.d_inner = d_model, d_conv, int(expand * d_model)
        require_sizes(d_model=d_model, d_conv=d_conv, d_inner=self.d_inner)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **like)
        self.conv = ShortConvolution(self.d_inner, d_conv, conv_bias, **like)

    def _build_output(self, bias: bool, norm: Callable[[int], nn.Module] | None, like: dict[str, Any]) -> None:
        self.out_proj = nn.Linear(self.d_inner, self.d_model, bias=bias, **like)
        self.output_norm: Any = None if norm is None else norm(self.d_inner)

    @abstractmethod
    def _map(
        self, u: Tensor, z: Tensor, state: Any, rows: Rows | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Any]:
        """The map of u (batch, length, d_inner), times silu(z), and its state."""

    @abstractmethod
    def _map_step(self, u: Tensor, z: Tensor, state: Any) -> tuple[Tensor, Any]:
        """`_map` of one token (batch, d_inner)."""

    def _init_conv_state(self, batch: int, dtype: torch.dtype | None) -> Tensor:
        weight = self.conv.weight  # projections may have been replaced by quantised ones
        shape = (batch, self.d_conv - 1, self.d_inner)
        return torch.zeros(shape, device=weight.device, dtype=dtype or weight.dtype)

    def run(self, x: Tensor, state: MambaState | None, rows: Rows | None) -> tuple[Tensor, MambaState]:
        return self._run(x, state, rows, None)

    def run_packed(self, x: Tensor, state: MambaState | None, cu_seqlens: Tensor) -> tuple[Tensor, MambaState]:
        return self._run(x, state, None, cu_seqlens)

    def _run(
        self,
        x: Float[Tensor, "rows length d_model"],
        state: MambaState | None,
        rows: Rows | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Float[Tensor, "rows length d_model"], MambaState]:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        if rows is not None:
            u = rows.zero_padding(u)
        before = None if state is None else state.conv
        with recomputing(u):
            conv = self.conv(u, before, cu_seqlens, rows)
            y, after = self._map(conv.y, z, None if state is None else state.ssm, rows, cu_seqlens)
        return self._output(y), MambaState(conv.last_state, after)

    def run_step(
        self, x: Float[Tensor, "batch d_model"], state: MambaState
    ) -> tuple[Float[Tensor, "batch d_model"], MambaState]:
        """One token, in constant time and memory."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv_state = self.conv.step(u, state.conv)
        y, after = self._map_step(u, z, state.ssm)
        return self._output(y), MambaState(conv_state, after)

    def _output(self, y: Float[Tensor, "... d_inner"]) -> Float[Tensor, "... d_model"]:
        return self.out_proj(y if self.output_norm is None else self.output_norm(y))


class Mamba(SelectiveSSM, GatedBlock):
    """A Mamba layer. `forward` and `step` take a state and return the new one; nothing is stored on the module.

    Args:
        d_model: width of the input and output.
        d_state: N, state per channel (complex numbers where A is complex).
        d_conv: width of the short convolution.
        expand: d_inner = int(expand * d_model).
        dt_rank: rank of the step projection; defaults to ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: the initial step is log-uniform on [dt_min, dt_max], and at least dt_init_floor.
        dt_init: how the weight of the step projection is initialised, "random" (uniform) or "constant".
        dt_scale: the scale of that weight, in units of dt_rank ** -0.5.
        conv_bias: whether the convolution has a bias.
        bias: whether the input and output projections have biases.
        b_discretization: "euler" (published checkpoints) or "zoh" for B.
        selective_delta, selective_B, selective_C: whether each depends on the input; otherwise it is a parameter.
        A_init: "s4d-real", "s4d-lin" (complex), "constant" or "random".
        output_norm: norm before the output projection: "rmsnorm" or "layernorm"; defaults to none.
        inner_norms: whether dt, B and C have RMS norms.
        inner_norm_weights: whether these norms have weights (Jamba) or not (FalconMamba).
        norm_eps: epsilon of the output and inner norms.
    Raises ValueError for invalid sizes and names.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = MambaOptions.d_state,
        d_conv: int = MambaOptions.d_conv,
        expand: float = MambaOptions.expand,
        dt_rank: int | None = None,
        dt_min: float = MambaOptions.dt_min,
        dt_max: float = MambaOptions.dt_max,
        dt_init: str = MambaOptions.dt_init,
        dt_scale: float = MambaOptions.dt_scale,
        dt_init_floor: float = MambaOptions.dt_init_floor,
        conv_bias: bool = MambaOptions.conv_bias,
        bias: bool = MambaOptions.bias,
        *,
        b_discretization: str = MambaOptions.b_discretization,
        selective_delta: bool = MambaOptions.selective_delta,
        selective_B: bool = MambaOptions.selective_B,
        selective_C: bool = MambaOptions.selective_C,
        A_init: str = MambaOptions.A_init,
        output_norm: str | None = None,
        inner_norms: bool = MambaOptions.inner_norms,
        inner_norm_weights: bool = MambaOptions.inner_norm_weights,
        norm_eps: float = MambaOptions.norm_eps,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self._build_projections(d_model, d_conv, expand, conv_bias, bias, like)
        self._build_selection(
            self.d_inner,
            d_state=d_state,
            dt_rank=math.ceil(d_model / 16) if dt_rank is None else dt_rank,
            dt_range=(dt_min, dt_max, dt_init_floor),
            dt_init=dt_init,
            dt_scale=dt_scale,
            b_discretization=b_discretization,
            selective=(selective_delta, selective_B, selective_C),
            A_init=A_init,
            norms=(inner_norm_weights, norm_eps) if inner_norms else None,
            like=like,
        )
        norm = None if output_norm is None else lambda size: build_norm(output_norm, size, norm_eps, **like)
        self._build_output(bias, norm, like)

    def reset_parameters(self) -> None:
        """Redraw all parameters, in the order of construction, for example after creation on the meta device."""
        self.in_proj.reset_parameters()
        self.conv.reset_parameters()
        self._reset_selection()
        self.out_proj.reset_parameters()
        if self.output_norm is not None:
            self.output_norm.reset_parameters()

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> MambaState:
        """The state before the first token: zeros on the layer's device.

        Args:
            batch: number of sequences.
            dtype: dtype of the convolution's state; defaults to that of the weights.
        """
        return MambaState(self._init_conv_state(batch, dtype), self._init_ssm_state(batch))

    @property
    def exports_step(self) -> bool:
        return not self.ssm.is_complex

    def _map(
        self, u: Tensor, z: Tensor, state: Any, rows: Rows | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Any]:
        return self._scan(u, z, state, rows, cu_seqlens)

    def _map_step(self, u: Tensor, z: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self._scan_step(u, z, state)


class MambaBlock(GatedBlock):
    """The Mamba block with any map of sequences in place of the selective one (tables 1 and 6 of the paper).

    Args:
        d_model: width of the input and output.
        inner: a function that makes the map from its number of channels, d_inner.
        d_conv, expand, conv_bias, bias: as in `Mamba`.
    """

    def __init__(
        self,
        d_model: int,
        inner: Callable[[int], nn.Module],
        d_conv: int = MambaOptions.d_conv,
        expand: float = MambaOptions.expand,
        conv_bias: bool = MambaOptions.conv_bias,
        bias: bool = MambaOptions.bias,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self._build_projections(d_model, d_conv, expand, conv_bias, bias, like)
        self.inner: Any = inner(self.d_inner)
        self._build_output(bias, None, like)

    def reset_parameters(self) -> None:
        """Redraw all parameters, in the order of construction."""
        for module in (self.in_proj, self.conv, self.inner, self.out_proj):
            module.reset_parameters()

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> MambaState:
        """Zeros for the convolution, and the inner layer's initial state in place of h."""
        return MambaState(self._init_conv_state(batch, dtype), self.inner.init_state(batch, dtype))

    @property
    def grows(self) -> bool:
        return self.inner.grows

    @property
    def exports_step(self) -> bool:
        return self.inner.exports_step

    def _map(
        self, u: Tensor, z: Tensor, state: Any, rows: Rows | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Any]:
        mask = None if rows is None else rows.mask
        y, after = self.inner(u, state, attention_mask=mask, cu_seqlens=cu_seqlens)
        return gated(y, z, "silu"), after

    def _map_step(self, u: Tensor, z: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, after = self.inner.step(u, state)
        return gated(y, z, "silu"), after
