"""S4D: a time-invariant state space model per channel, with a diagonal A.

    h'(τ) = A h(τ) + u(τ),   y(τ) = 2 Re(C . h(τ)) + D u(τ)          discretised with a learned step per channel

A sequence is computed by a convolution with the kernel K[t] = 2 Re(sum over n of C Bbar Abar^t), a single token by a
step of the recurrence h = Abar h + Bbar u. Both give the same result.

Source: S4D (arXiv:2206.11893), sections 3 and 4.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

from anymamba.ops.dispatch import without_autocast
from anymamba.parts import diagonal
from anymamba.parts.derivatives import recomputed
from anymamba.parts.fft_conv import fft_conv
from anymamba.parts.options import S4DOptions
from anymamba.parts.padding import Rows
from anymamba.parts.parameters import KernelParameters, complex_dtype
from anymamba.parts.sequence import SequenceLayer
from anymamba.parts.state import last_states_are_wanted, unread

INITS = ("s4d-lin", "s4d-inv", "s4d-real")
DISCRETIZATIONS = ("zoh", "bilinear")
TABLES_TO_KEEP = 16  # tables of powers with at most 1/16 of the numbers of x are kept, in some 15 bytes a number


class S4DState(NamedTuple):
    """State of an S4D layer; its size does not depend on how many tokens it has seen."""

    h: Num[Tensor, "batch width n_states"]
    """d_state / 2 complex entries, whose conjugates are implied, or d_state real entries; float32 or wider."""


class DiagonalSystem(NamedTuple):
    """A discretised system in float64: h = Abar h + Bbar u, y = C . h + D u; the dot is real_sum."""

    Abar: Num[Tensor, "width n_states"]
    Bbar: Num[Tensor, "width n_states"]
    C: Num[Tensor, "width n_states"]
    D: Float[Tensor, " width"]

    def kernel(self, length: int, dtype: torch.dtype) -> Float[Tensor, "width length"]:
        """K[t] = C . Abar^t Bbar, with D added to K[0]."""
        weights = diagonal.in_precision(self.C * self.Bbar, dtype)
        K = diagonal.exponential_sums(weights[None], self.Abar, length)[0]
        return K + F.pad(self.D[:, None].to(dtype), (0, length - 1))

    def free_response(self, h: Num[Tensor, "batch width n_states"], length: int) -> Float[Tensor, "batch length width"]:
        """C . Abar^(t + 1) h: the part of the outputs that comes from the state h."""
        weights = (self.C * self.Abar).to(h.dtype) * h
        return diagonal.exponential_sums(weights, self.Abar, length).transpose(1, 2)


class S4D(SequenceLayer):
    """S4D as a map of `width` channels, without projections or activation.

    Args:
        width: channels; each has its own state space model.
        d_state: real numbers of state per channel; "s4d-lin" and "s4d-inv" store d_state / 2 complex numbers.
        init: A[n] = -1/2 + π n i ("s4d-lin"), -1/2 + N/π (N/(2n + 1) - 1) i with N = d_state ("s4d-inv"), or -(n + 1)
            ("s4d-real").
        discretization: "zoh", Abar = exp(ΔA) and Bbar = (exp(ΔA) - 1)/A, or "bilinear",
            Abar = (1 + ΔA/2) / (1 - ΔA/2) and Bbar = Δ / (1 - ΔA/2).
        dt_min, dt_max: the initial step Δ is log-uniform between them, one draw per channel.
    Raises ValueError for invalid sizes and names.
    """

    state_type = S4DState

    def __init__(
        self,
        width: int,
        d_state: int = S4DOptions.d_state,
        *,
        init: str = S4DOptions.init,
        discretization: str = S4DOptions.discretization,
        dt_min: float = S4DOptions.dt_min,
        dt_max: float = S4DOptions.dt_max,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.width, self.d_state = width, d_state
        self.kernel = S4DKernel(width, d_state, init, discretization, (dt_min, dt_max), device, dtype)

    def reset_parameters(self) -> None:
        """Redraw all parameters."""
        self.kernel.reset_parameters()

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> S4DState:
        """Zeros in the precision of the kernel's parameters, whatever the dtype of the activations."""
        A_log = self.kernel.A_log
        return S4DState(torch.zeros(batch, *A_log.shape, device=A_log.device, dtype=self.kernel.state_dtype))

    def run(
        self, x: Float[Tensor, "rows length width"], state: S4DState | None, rows: Rows | None
    ) -> tuple[Tensor, S4DState]:
        """Convolution mode: O(length (log length + d_state)) operations and O(length) numbers per channel."""
        length, lengths = int(x.shape[1]), None if rows is None else rows.lengths
        if not length:
            return x, self.init_state(x.shape[0]) if state is None else state
        with without_autocast(x.device.type):
            u = x if rows is None else rows.zero_padding(x)
            wide = torch.promote_types(x.dtype, self.kernel.D.dtype)
            system = self.kernel.discretise()
            y = fft_conv(u if state is None else u.to(wide), self._kernel(system, x, wide))
            if state is not None:
                y = y + recomputed(DiagonalSystem.free_response, system, state.h, length)
            return y.to(x.dtype), S4DState(self._last_state(u, wide, system, state, lengths))

    def _kernel(
        self, system: DiagonalSystem, x: Float[Tensor, "rows length width"], wide: torch.dtype
    ) -> Float[Tensor, "width length"]:
        """The kernel. The backward pass computes its tables again, except where they are small next to x."""
        rows, length = x.shape[0], int(x.shape[1])
        if TABLES_TO_KEEP * self.d_state * diagonal.n_powers(length) <= rows * length:  # both for one channel
            return system.kernel(length, wide)
        return recomputed(DiagonalSystem.kernel, system, length, wide)

    def _last_state(
        self,
        u: Float[Tensor, "rows length width"],
        wide: torch.dtype,
        system: DiagonalSystem,
        state: S4DState | None,
        lengths: Any,
    ) -> Num[Tensor, "rows width n_states"]:
        """h after the last real token of each row."""
        dtype = self.kernel.state_dtype
        if not last_states_are_wanted():
            return unread((len(u), *system.Abar.shape), dtype, u.device)
        length, u = int(u.shape[1]), diagonal.right_aligned(u.to(wide), lengths)
        h = system.Bbar * recomputed(diagonal.accumulate, u, system.Abar)
        if state is not None:
            h = h + diagonal.elapsed(system.Abar, length, lengths) * state.h
        return h.to(dtype)

    def run_step(
        self, x: Float[Tensor, "batch width"], state: S4DState
    ) -> tuple[Float[Tensor, "batch width"], S4DState]:
        """Recurrent mode, O(d_state) per channel. In float64: the error of a float32 Abar grows with every step."""
        with without_autocast(x.device.type):
            system = self.kernel.derived("system", self.kernel.discretise)
            u = x.to(system.D.dtype)
            h = system.Abar * state.h + system.Bbar * u[..., None]
            y = diagonal.real_sum(system.C * h) + system.D * u
            return y.to(x.dtype), S4DState(h.to(self.kernel.state_dtype))


class S4DKernel(KernelParameters):
    """log Δ, A = -exp(A_log) + i A_imag, C and D. B is fixed to 1, because C can take any factor of B."""

    def __init__(
        self,
        width: int,
        d_state: int,
        init: str,
        discretization: str,
        dt_range: tuple[float, float],
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        if discretization not in DISCRETIZATIONS:
            raise ValueError(f"discretization must be one of {', '.join(DISCRETIZATIONS)}, got {discretization!r}")
        is_complex = init != "s4d-real"
        diagonal.require_sizes(width, d_state, is_complex, ', or init="s4d-real", whose states are real')
        self.init, self.discretization, self.dt_range = init, discretization, dt_range
        n_states = d_state // 2 if is_complex else d_state

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=self.wide(dtype)))

        self.log_dt = parameter(width)
        self.A_log = parameter(width, n_states)
        self.A_imag = parameter(width, n_states) if is_complex else None
        self.C = parameter(width, n_states, 2) if is_complex else parameter(width, n_states)
        self.D = parameter(width)
        self.reset_parameters()

    @property
    def state_dtype(self) -> torch.dtype:
        """The complex or real dtype of the parameters' precision."""
        return self.A_log.dtype if self.A_imag is None else complex_dtype(self.A_log.dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """log Δ, A, C standard normal (complex if A is), D standard normal, in this order."""
        if self.log_dt.is_meta:
            return
        diagonal.draw_log_dt(self.log_dt, *self.dt_range)
        n = torch.arange(self.A_log.shape[1], dtype=torch.float64, device="cpu")
        if self.A_imag is None:
            self.A_log.copy_(torch.log(n + 1))
        else:
            self.A_log.fill_(math.log(0.5))
            N = 2 * len(n)
            self.A_imag.copy_(math.pi * n if self.init == "s4d-lin" else N / math.pi * (N / (2 * n + 1) - 1))
        self.C.normal_(std=1 if self.A_imag is None else math.sqrt(0.5))
        self.D.normal_()

    def discretise(self) -> DiagonalSystem:
        """The system discretised with each channel's step."""
        exact = diagonal.exact_dtype(self.D.device)
        A = -torch.exp(self.A_log.to(exact))
        C = self.C.to(exact)
        if self.A_imag is not None:
            A, C = torch.complex(A, self.A_imag.to(exact)), torch.complex(*C.unbind(-1))
        dt = torch.exp(self.log_dt.to(exact))[:, None]
        if self.discretization == "zoh":
            x = dt * A
            Abar, Bbar = torch.exp(x), dt * recomputed(diagonal.expm1_ratio, x)
        else:
            x = dt / 2 * A
            inverse = 1 / (1 - x)
            Abar, Bbar = (1 + x) * inverse, dt * inverse
        return DiagonalSystem(Abar, Bbar, C, self.D.to(exact))
