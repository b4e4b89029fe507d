"""The selective state space model (S6): Δ, B and C are computed from the input, and a scan runs the recurrence.

    [dt, B, C] = x_proj(u);   delta = softplus(dt_proj(dt) + delta_bias);   y = scan(u, delta, A, B, C, D)

Source: Mamba (arXiv:2312.00752), algorithm 2.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from anymamba.base.sizes import require_sizes
from anymamba.ops.groups import current_group
from anymamba.ops.selective_scan import B_DISCRETIZATIONS, ScanOutput, selective_scan, selective_scan_step
from anymamba.parts import init
from anymamba.parts.bare import is_bare
from anymamba.parts.norm import RMSNorm
from anymamba.parts.options import MambaOptions
from anymamba.parts.padding import Rows
from anymamba.parts.parameters import WideParameters, complex_dtype
from anymamba.parts.recipes import again, is_recomputing, recomputing
from anymamba.parts.sequence import SequenceLayer


class SSMParameters(WideParameters):
    """The parameters of the state space model: A, D, the bias of the step, and B and C if they are constant.

    A = -exp(A_log) + i A_imag. None of them has weight decay.
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

        parts = (2,) if self.is_complex else ()  # the last dimension is (real, imaginary)
        self.delta_bias = parameter(d_inner)
        self.A_log = parameter(d_inner, d_state)
        self.A_imag = parameter(d_inner, d_state) if self.is_complex else None
        self.D = parameter(d_inner)
        self.B = parameter(d_inner, d_state, *parts) if constant_B else None
        self.C = parameter(d_inner, d_state, *parts) if constant_C else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """delta_bias, A and D as in the paper. A constant B is 1, a constant C is standard normal, as in S4D."""
        if self.A_log.is_meta:
            return
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
        """(d_inner, d_state), real or complex.

        Raises TypeError for parameters that something has narrowed, such as a policy of FSDP2.
        """
        if self.A_log.dtype.itemsize < 4:
            raise TypeError(
                f"A_log must be float32 or wider, got {self.A_log.dtype}, in which states would never fade; shard the "
                "model with anymamba.parallel.parallelize, or leave param_dtype out of FSDP2's MixedPrecisionPolicy "
                "and run it under autocast"
            )
        real = -torch.exp(self.A_log)
        return real if self.A_imag is None else torch.complex(real, self.A_imag)

    def constant(self, name: str) -> Tensor:
        """The constant B or C, by name, as (d_inner, d_state)."""
        matrix = getattr(self, name)
        return torch.complex(*matrix.unbind(-1)) if self.is_complex else matrix


class SelectiveSSM(nn.Module):
    """The selective map with its gate, shared by `S6` and `Mamba`.

    It is a mixin, so that its parameters are direct members of these layers, as in checkpoints and adapters.
    """

    def _build_selection(
        self,
        width: int,
        *,
        d_state: int,
        dt_rank: int,
        dt_range: tuple[float, float, float],
        dt_init: str,
        dt_scale: float,
        b_discretization: str,
        selective: tuple[bool, bool, bool],
        A_init: str,
        norms: tuple[bool, float] | None,
        like: dict[str, Any],
    ) -> None:
        """Make the parameters.

        Args:
            dt_range: (smallest, largest, floor): the initial step is log-uniform between the first two, and at least
                the third.
            selective: whether Δ, B and C depend on the input.
            norms: for RMS norms on dt, B and C: (whether they have weights, their epsilon). None means no norms.
        """
        require_sizes(d_state=d_state, dt_rank=dt_rank)
        if dt_init not in ("random", "constant"):
            raise ValueError(f'dt_init must be "random" or "constant", got {dt_init!r}')
        if b_discretization not in B_DISCRETIZATIONS:
            raise ValueError(f'b_discretization must be "euler" or "zoh", got {b_discretization!r}')
        self.d_state, self.dt_rank, self.dt_init, self.dt_scale = d_state, dt_rank, dt_init, dt_scale
        self.b_discretization = b_discretization
        self.selective_delta, self.selective_B, self.selective_C = selective
        matrix_rows = 2 * d_state if A_init == "s4d-lin" else d_state
        sizes = (dt_rank, matrix_rows, matrix_rows)
        self.x_proj_rows = [size if chosen else 0 for size, chosen in zip(sizes, selective, strict=True)]
        rows = sum(self.x_proj_rows)
        self.x_proj = nn.Linear(width, rows, bias=False, **like) if rows else None
        self.dt_proj = self._build_dt_proj(width, like) if self.selective_delta else None
        self.ssm = SSMParameters(width, d_state, A_init, not self.selective_B, not self.selective_C, dt_range, **like)
        self.dt_norm, self.B_norm, self.C_norm = (
            RMSNorm(rows, norms[1], weight=norms[0], **like) if norms is not None and rows else None
            for rows in self.x_proj_rows
        )

    def _build_dt_proj(self, width: int, like: dict[str, Any]) -> nn.Linear:
        projection = nn.Linear(self.dt_rank, width, bias=True, **like)
        projection.register_parameter(
            "bias", None
        )  # drawn for the same random numbers as the published module, then dropped: the bias is ssm.delta_bias
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
    def _reset_selection(self) -> None:
        """Redraw all parameters, in the order of construction."""
        if self.x_proj is not None:
            self.x_proj.reset_parameters()
        if self.dt_proj is not None:
            self.dt_proj.reset_parameters()
            bound = self.dt_rank**-0.5
            torch.empty_like(self.ssm.delta_bias, dtype=self.dt_proj.weight.dtype).uniform_(-bound, bound)
            self._init_dt_weight(self.dt_proj)
        self.ssm.reset_parameters()
        for norm in (self.dt_norm, self.B_norm, self.C_norm):
            if norm is not None:
                norm.reset_parameters()

    def _init_ssm_state(self, batch: int) -> Float[Tensor, "batch width d_state"]:
        A_log = self.ssm.A_log
        dtype = complex_dtype(A_log.dtype) if self.ssm.is_complex else A_log.dtype
        return torch.zeros(batch, *A_log.shape, device=A_log.device, dtype=dtype)

    def _scan(
        self,
        u: Float[Tensor, "batch length width"],
        z: Float[Tensor, "batch length width"] | None,
        state: Tensor | None,
        rows: Rows | None,
        cu_seqlens: Tensor | None,
    ) -> ScanOutput:
        """The scan over a sequence, gated by z if it is given. Padding leaves the state unchanged."""
        dt, B, C = self._selection(u)
        return selective_scan(
            u,
            self._delta(u, dt, None if rows is None else rows.mask),
            self.ssm.A(),
            B,
            C,
            self.ssm.D,
            z,
            self.ssm.delta_bias,
            delta_softplus=True,
            b_discretization=self.b_discretization,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            group=current_group(u.shape[1]),
        )

    def _scan_step(
        self, u: Float[Tensor, "batch width"], z: Float[Tensor, "batch width"] | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`_scan` of one token: y and the new state."""
        dt, B, C = self._selection(u)
        return selective_scan_step(
            state,
            u,
            self._delta(u, dt),
            self.ssm.derived("A", self.ssm.A),
            B[:, None] if self.selective_B else B,
            C[:, None] if self.selective_C else C,
            self.ssm.D,
            z,
            self.ssm.delta_bias,
            delta_softplus=True,
            b_discretization=self.b_discretization,
        )

    def _selection(self, u: Float[Tensor, "... width"]) -> tuple[Tensor, Tensor, Tensor]:
        """dt, of which `_delta` is a map, B and C. Selective ones come from the input, others are parameters."""
        projected = u.new_empty(*u.shape[:-1], 0) if self.x_proj is None else self.x_proj(u)
        dt, B, C = projected.split(self.x_proj_rows, dim=-1)
        if self.dt_norm is not None:
            dt = self.dt_norm(dt)
        B = self._matrix(B, self.B_norm) if self.selective_B else self.ssm.constant("B")
        C = self._matrix(C, self.C_norm) if self.selective_C else self.ssm.constant("C")
        return dt, B, C

    def _delta(
        self, u: Float[Tensor, "... width"], dt: Tensor, mask: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "... width"]:
        """delta before its bias and softplus, which makes it 0 where the mask is false."""
        projection = self.dt_proj
        delta = _masked(torch.zeros_like(u) if projection is None else projection(dt), mask)
        if projection is not None and is_recomputing() and is_bare(projection, nn.Linear):
            again(delta, _projected, dt, projection.weight, mask, delta.dtype)
        return delta

    def _matrix(self, M: Tensor, norm: RMSNorm | None) -> Tensor:
        """Selective B or C (..., d_state) from its projection; for a complex one that is real and imaginary halves."""
        if norm is not None:
            M = norm(M)
        if not self.ssm.is_complex:
            return M
        real, imaginary = M.to(torch.promote_types(M.dtype, torch.float32)).chunk(2, dim=-1)
        return torch.complex(real, imaginary)


def _masked(delta: Tensor, mask: Tensor | None) -> Tensor:
    """delta with -inf where the mask is false: softplus(-inf) = 0 leaves the state unchanged."""
    return delta if mask is None else delta.masked_fill(~mask[..., None], -math.inf)


def _projected(dt: Tensor, weight: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """delta in the dtype that it had under autocast, or without it."""
    return _masked(F.linear(dt.to(dtype), weight.to(dtype)), mask)


class S6State(NamedTuple):
    """State of an S6 layer."""

    ssm: Float[Tensor, "batch width d_state"]
    """h, in float32 or wider; complex for a complex A."""


class S6(SelectiveSSM, SequenceLayer):
    """The selective state space model as a map of `width` channels, without projections around it.

    Args:
        width: channels of the input and output.
        d_state, dt_rank, dt_min, dt_max, dt_init_floor, dt_init, dt_scale, b_discretization, A_init, selective_delta,
        selective_B, selective_C: as in `Mamba`; dt_rank defaults to ceil(width / 16).
    """

    state_type = S6State
    takes_parts = True

    def __init__(
        self,
        width: int,
        d_state: int = MambaOptions.d_state,
        dt_rank: int | None = None,
        *,
        dt_min: float = MambaOptions.dt_min,
        dt_max: float = MambaOptions.dt_max,
        dt_init_floor: float = MambaOptions.dt_init_floor,
        dt_init: str = MambaOptions.dt_init,
        dt_scale: float = MambaOptions.dt_scale,
        b_discretization: str = MambaOptions.b_discretization,
        selective_delta: bool = MambaOptions.selective_delta,
        selective_B: bool = MambaOptions.selective_B,
        selective_C: bool = MambaOptions.selective_C,
        A_init: str = MambaOptions.A_init,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        require_sizes(width=width)
        self.width = width
        self._build_selection(
            width,
            d_state=d_state,
            dt_rank=math.ceil(width / 16) if dt_rank is None else dt_rank,
            dt_range=(dt_min, dt_max, dt_init_floor),
            dt_init=dt_init,
            dt_scale=dt_scale,
            b_discretization=b_discretization,
            selective=(selective_delta, selective_B, selective_C),
            A_init=A_init,
            norms=None,
            like={"device": device, "dtype": dtype},
        )

    def reset_parameters(self) -> None:
        """Redraw all parameters, in the order of construction."""
        self._reset_selection()

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> S6State:
        """Zeros in the dtype of A, whatever the dtype of the activations."""
        return S6State(self._init_ssm_state(batch))

    @property
    def exports_step(self) -> bool:
        return not self.ssm.is_complex

    def run(self, x: Tensor, state: S6State | None, rows: Rows | None) -> tuple[Tensor, S6State]:
        u = x if rows is None else rows.zero_padding(x)
        with recomputing(u):
            scan = self._scan(u, None, None if state is None else state.ssm, rows, None)
        return scan.y, S6State(scan.last_state)

    def run_packed(self, x: Tensor, state: S6State | None, cu_seqlens: Tensor) -> tuple[Tensor, S6State]:
        with recomputing(x):
            scan = self._scan(x, None, None if state is None else state.ssm, None, cu_seqlens)
        return scan.y, S6State(scan.last_state)

    def run_step(self, x: Float[Tensor, "batch width"], state: S6State) -> tuple[Float[Tensor, "batch width"], S6State]:
        """One token, in constant time and memory."""
        y, ssm = self._scan_step(x, None, state.ssm)
        return y, S6State(ssm)
