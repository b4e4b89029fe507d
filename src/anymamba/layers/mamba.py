"""The Mamba layer: projections, short convolution, selective scan, gate.

    [x, z] = in_proj(input);  x = silu(conv(x))
    [dt, B, C] = x_proj(x);   delta = softplus(dt_proj(dt) + delta_bias)
    y = out_proj(scan(x, delta, A, B, C, D) * silu(z))

Source: Mamba (arXiv:2312.00752), figure 3 and section 3.4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anymamba.layers import init
from anymamba.layers.conv import ShortConvolution
from anymamba.layers.norm import RMSNorm, build_norm
from anymamba.layers.padding import Alignment
from anymamba.layers.parameters import WideParameters
from anymamba.layers.state import MambaState
from anymamba.ops.selective_scan import B_DISCRETIZATIONS, selective_scan, selective_scan_step


class SSMParameters(WideParameters):
    """What discretisation needs: A, D, the step's bias, and B and C where they are constant.

    A = -exp(A_log) + i A_imag. None of them is to be weight-decayed.
    """

    def __init__(
        self,
        d_inner: int,
        d_state: int,
        A_init: str,
        constant_B: bool,
        constant_C: bool,
        dt_range: tuple[float, float, float],
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        wide = self.wide(dtype)
        self.A_init, self.dt_range = A_init, dt_range
        self.is_complex = A_init == "s4d-lin"

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=wide))

        parts = (2,) if self.is_complex else ()  # real and imaginary parts are last
        self.delta_bias = parameter(d_inner)
        self.A_log = parameter(d_inner, d_state)
        self.A_imag = parameter(d_inner, d_state) if self.is_complex else None
        self.D = parameter(d_inner)
        self.B = parameter(d_inner, d_state, *parts) if constant_B else None
        self.C = parameter(d_inner, d_state, *parts) if constant_C else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """delta_bias, A, D as published; constant B is 1, constant C is (complex) standard normal, as in S4D."""
        d_inner, d_state = self.A_log.shape
        device = self.A_log.device
        self.delta_bias.copy_(init.delta_bias(d_inner, *self.dt_range, device=device))
        A_log, A_imag = init.initial_A(self.A_init, d_inner, d_state, device)
        self.A_log.copy_(A_log)
        if self.A_imag is not None and A_imag is not None:
            self.A_imag.copy_(A_imag)
        self.D.fill_(1)
        if self.B is not None:
            self.B.fill_(1)
            if self.is_complex:
                self.B[..., 1] = 0
        if self.C is not None:
            self.C.normal_(std=math.sqrt(0.5) if self.is_complex else 1.0)

    def A(self) -> Tensor:
        """(d_inner, d_state), real or complex."""
        real = -torch.exp(self.A_log)
        return real if self.A_imag is None else torch.complex(real, self.A_imag)

    def constant(self, name: str) -> Tensor:
        """Constant "B" or "C" as (d_inner, d_state)."""
        matrix = getattr(self, name)
        return torch.view_as_complex(matrix) if self.is_complex else matrix


class Mamba(nn.Module):
    """A Mamba layer. `forward` and `step` take a state and return the new one; nothing is remembered on the module.

    Args:
        d_model: width of the input and output.
        d_state: N, state per channel (complex numbers where A is complex).
        d_conv: width of the short convolution.
        expand: d_inner = int(expand * d_model).
        dt_rank: rank of the step projection; None means ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: the initial step is log-uniform on [dt_min, dt_max], at least the floor.
        dt_init: "random" (uniform) or "constant" weight of the step projection.
        dt_scale: its scale, in units of dt_rank ** -0.5.
        conv_bias, bias: biases of the convolution, and of the input and output projections.
        b_discretization: "euler" (published checkpoints) or "zoh" for B.
        selective_delta, selective_B, selective_C: which of the three depend on the input; the others are parameters.
        A_init: "s4d-real", "s4d-lin" (complex), "constant" or "random".
        output_norm: None, "rmsnorm" or "layernorm" before the output projection.
        inner_norms: RMS norms on dt, B and C.
        inner_norm_weights: whether these have weights (Jamba) or not (FalconMamba).
        norm_eps: epsilon of the output and inner norms.
    Raises ValueError for sizes and names that do not exist.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        b_discretization: str = "euler",
        selective_delta: bool = True,
        selective_B: bool = True,
        selective_C: bool = True,
        A_init: str = "s4d-real",
        output_norm: str | None = None,
        inner_norms: bool = False,
        inner_norm_weights: bool = True,
        norm_eps: float = 1e-6,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        _require_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, d_inner=self.d_inner, dt_rank=self.dt_rank)
        if dt_init not in ("random", "constant"):
            raise ValueError(f'dt_init must be "random" or "constant", got {dt_init!r}')
        if b_discretization not in B_DISCRETIZATIONS:
            raise ValueError(f'b_discretization must be "euler" or "zoh", got {b_discretization!r}')
        self.dt_init, self.dt_scale = dt_init, dt_scale
        self.b_discretization = b_discretization
        self.selective_delta, self.selective_B, self.selective_C = selective_delta, selective_B, selective_C
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **like)
        self.conv = ShortConvolution(self.d_inner, d_conv, conv_bias, **like)
        matrix_rows = 2 * d_state if A_init == "s4d-lin" else d_state
        self.x_proj_rows = [
            self.dt_rank if selective_delta else 0,
            matrix_rows if selective_B else 0,
            matrix_rows if selective_C else 0,
        ]
        rows = sum(self.x_proj_rows)
        self.x_proj = nn.Linear(self.d_inner, rows, bias=False, **like) if rows else None
        self.dt_proj = self._build_dt_proj(like) if selective_delta else None
        self.ssm = SSMParameters(
            self.d_inner,
            d_state,
            A_init,
            not selective_B,
            not selective_C,
            (dt_min, dt_max, dt_init_floor),
            **like,
        )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **like)
        self.output_norm = None if output_norm is None else build_norm(output_norm, self.d_inner, norm_eps, **like)
        dt_rows, B_rows, C_rows = self.x_proj_rows
        self.dt_norm, self.B_norm, self.C_norm = (
            RMSNorm(rows, norm_eps, weight=inner_norm_weights, **like) if inner_norms and rows else None
            for rows in (dt_rows, B_rows, C_rows)
        )

    def _build_dt_proj(self, like: dict[str, Any]) -> nn.Linear:
        projection = nn.Linear(self.dt_rank, self.d_inner, bias=True, **like)
        projection.register_parameter(
            "bias", None
        )  # drawn, as the published module draws it, then dropped: it is ssm.delta_bias
        self._init_dt_weight(projection)
        return projection

    @torch.no_grad()
    def _init_dt_weight(self, projection: nn.Linear) -> None:
        scale = self.dt_rank**-0.5 * self.dt_scale
        if self.dt_init == "constant":
            projection.weight.fill_(scale)
        else:
            projection.weight.uniform_(-scale, scale)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every parameter anew, in the order of construction; for modules made on the meta device."""
        self.in_proj.reset_parameters()
        self.conv.reset_parameters()
        if self.x_proj is not None:
            self.x_proj.reset_parameters()
        if self.dt_proj is not None:
            self.dt_proj.reset_parameters()
            bound = self.dt_rank**-0.5
            torch.empty_like(self.ssm.delta_bias, dtype=self.dt_proj.weight.dtype).uniform_(-bound, bound)
            self._init_dt_weight(self.dt_proj)
        self.ssm.reset_parameters()
        self.out_proj.reset_parameters()
        for norm in (self.output_norm, self.dt_norm, self.B_norm, self.C_norm):
            if norm is not None:
                norm.reset_parameters()

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> MambaState:
        """The state before the first token: zeros on the layer's device.

        Args:
            batch: sequences.
            dtype: of the convolution's part; absent means that of the weights.
        """
        device = self.in_proj.weight.device
        real = self.ssm.A_log.dtype
        state_dtype = real.to_complex() if self.ssm.is_complex else real
        conv = torch.zeros(
            batch, self.d_conv - 1, self.d_inner, device=device, dtype=dtype or self.in_proj.weight.dtype
        )
        return MambaState(conv, torch.zeros(batch, self.d_inner, self.d_state, device=device, dtype=state_dtype))

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: MambaState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], MambaState]:
        """Run over a sequence from a state (absent: zeros) and return the outputs and the state after it.

        Args:
            x: (batch, length, d_model).
            state: one row per sequence.
            attention_mask: (batch, length), true at real tokens; padding, wherever it lies, changes neither the outputs
                at real tokens nor the state. Outputs at padding mean nothing.
            cu_seqlens: int32 borders of sequences packed along the length of one row.
        Raises ValueError when both a mask and cu_seqlens are given, or shapes disagree.
        """
        if attention_mask is not None and cu_seqlens is not None:
            raise ValueError("give attention_mask or cu_seqlens, not both; packed sequences need no padding")
        padding = None if attention_mask is None else Alignment(attention_mask, *x.shape[:2])
        if padding is not None:
            x = padding.align(x)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        if padding is not None:
            u = padding.zero_padding(u)
        before = None if state is None else state.conv
        conv = self.conv(u, before, cu_seqlens)
        delta, B, C = self._selection(conv.y)
        if padding is not None:  # softplus(-inf) = 0 freezes the state
            delta = delta.masked_fill(~padding.mask[..., None], -math.inf)
        scan = selective_scan(
            conv.y,
            delta,
            self.ssm.A(),
            B,
            C,
            self.ssm.D,
            z,
            self.ssm.delta_bias,
            delta_softplus=True,
            b_discretization=self.b_discretization,
            initial_state=None if state is None else state.ssm,
            cu_seqlens=cu_seqlens,
        )
        y = self._output(scan.y)
        if padding is None:
            return y, MambaState(conv.last_state, scan.last_state)
        conv_state = padding.last(u, before, self.d_conv - 1)
        return padding.restore(y), MambaState(conv_state, scan.last_state)

    def step(
        self, x: Float[Tensor, "batch d_model"], state: MambaState
    ) -> tuple[Float[Tensor, "batch d_model"], MambaState]:
        """One token: `forward` at length one, in constant time."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv_state = self.conv.step(u, state.conv)
        delta, B, C = self._selection(u)
        y, ssm_state = selective_scan_step(
            state.ssm,
            u,
            delta,
            self.ssm.A(),
            B[:, None] if self.selective_B else B,
            C[:, None] if self.selective_C else C,
            self.ssm.D,
            z,
            self.ssm.delta_bias,
            delta_softplus=True,
            b_discretization=self.b_discretization,
        )
        return self._output(y), MambaState(conv_state, ssm_state)

    def _selection(self, u: Float[Tensor, "... d_inner"]) -> tuple[Tensor, Tensor, Tensor]:
        """delta before its bias and softplus, B and C: from the input where selective, else the parameters."""
        projected = u.new_empty(*u.shape[:-1], 0) if self.x_proj is None else self.x_proj(u)
        dt, B, C = projected.split(self.x_proj_rows, dim=-1)
        if self.dt_norm is not None:
            dt = self.dt_norm(dt)
        delta = torch.zeros_like(u) if self.dt_proj is None else self.dt_proj(dt)
        B = self._matrix(B, self.B_norm) if self.selective_B else self.ssm.constant("B")
        C = self._matrix(C, self.C_norm) if self.selective_C else self.ssm.constant("C")
        return delta, B, C

    def _matrix(self, M: Tensor, norm: RMSNorm | None) -> Tensor:
        """Selective B or C (..., d_state) from its projected rows; a complex one has real and imaginary halves."""
        if norm is not None:
            M = norm(M)
        if not self.ssm.is_complex:
            return M
        real, imaginary = M.to(torch.promote_types(M.dtype, torch.float32)).chunk(2, dim=-1)
        return torch.complex(real, imaginary)

    def _output(self, y: Float[Tensor, "... d_inner"]) -> Float[Tensor, "... d_model"]:
        return self.out_proj(y if self.output_norm is None else self.output_norm(y))


def _require_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
