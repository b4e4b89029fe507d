"""S4: a time-invariant state space model per channel; A is diagonal plus rank one and is initialised as HiPPO-LegS.

    h'(τ) = A h(τ) + B u(τ),   y(τ) = C h(τ) + D u(τ),   A = Λ - P P*          discretised by the bilinear rule

The bilinear rule keeps this structure: Abar = 2 (1 - Δ/2 A)^-1 - 1 is again diagonal plus rank one,

    Abar = Γ - p q*,   h[t] = Γ h[t-1] - p s[t] + Bbar u[t],   s[t] = q* h[t-1].

This is a diagonal system with feedback of the scalar s, so a step costs O(d_state). Let k_xy[t] = x Γ^t y be the
kernels of the diagonal part, written as power series in z. Unrolling the recurrence gives

    S = z k_qB / (1 + z k_qp)  (from u to s),   K = k_CB - k_Cp S  (from u to y).

This is Woodbury's identity, as in the paper's generating function. The paper evaluates it at roots of unity; here the
power series are truncated at z^length. So the parameters do not depend on the length (C is stored, not
C (1 - Abar^length)), a short kernel is the beginning of a longer one, and there is no singular frequency. A is
dissipative, so Abar is a contraction and 1 / (1 + z k_qp) is bounded on the unit circle by
1 + Δ/2 |P* (1 - Δ/2 Λ)^-1 P|: nothing in the recursion grows.

Source: S4 (arXiv:2111.00396), section 3 and appendices B and C.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from anymamba.ops.dispatch import without_autocast
from anymamba.parts import diagonal
from anymamba.parts.derivatives import as_operations, recomputed
from anymamba.parts.fft_conv import fast_fft_size, fft_conv
from anymamba.parts.options import S4Options
from anymamba.parts.padding import Rows
from anymamba.parts.parameters import KernelParameters, complex_dtype
from anymamba.parts.sequence import SequenceLayer
from anymamba.parts.state import last_states_are_wanted, unread

KERNEL_BLOCK, GPU_KERNEL_BLOCK = 2**18, 2**23
"""Kernel terms, counted over all channels, that are computed at a time. A GPU needs many to be busy."""


class S4State(NamedTuple):
    """State of an S4 layer; its size does not depend on how many tokens it has seen."""

    h: Complex[Tensor, "batch width n_states"]
    """In the basis of Λ: d_state / 2 entries, whose conjugates are implied; complex64 or wider."""


class Kernels(NamedTuple):
    """The first `length` terms of the kernels of convolution mode, (width, length) each."""

    K: Float[Tensor, "width length"]
    """From u to y, including D."""
    S: Float[Tensor, "width length"]
    """From u to s."""
    loop: Float[Tensor, "width length"]
    """1 / (1 + z k_qp): from q* Γ^t h0 to s."""
    k_Cp: Float[Tensor, "width length"]
    """From -s to y."""


class LowRankSystem(NamedTuple):
    """A discretised system in float64: s = q . h; then h = Γ h - p s + Bbar u; then y = C . h + D u. Dots are
    real_sum."""

    Gamma: Complex[Tensor, "width n_states"]
    p: Complex[Tensor, "width n_states"]
    q: Complex[Tensor, "width n_states"]
    Bbar: Complex[Tensor, "width n_states"]
    C: Complex[Tensor, "width n_states"]
    D: Float[Tensor, " width"]

    def kernels(self, length: int, dtype: torch.dtype) -> Kernels:
        """All four kernels, computed in float64 and returned in dtype. Groups of channels bound the memory."""
        channels = max(1, (KERNEL_BLOCK if self.D.device.type == "cpu" else GPU_KERNEL_BLOCK) // length)
        parts = []
        for start in range(0, self.D.shape[0], channels):
            part = LowRankSystem(*(field[start : start + channels] for field in self))
            parts.append(recomputed(LowRankSystem._kernels, part, length, dtype))
        return Kernels(*(torch.cat(kernel) for kernel in zip(*parts, strict=True)))

    def _kernels(self, length: int, dtype: torch.dtype) -> Kernels:
        weights = torch.stack([self.C * self.Bbar, self.C * self.p, self.q * self.Bbar, self.q * self.p])
        k_CB, k_Cp, k_qB, k_qp = diagonal.exponential_sums(weights, self.Gamma, length)
        loop = inverse_series(shifted(k_qp, first=1))
        S = shifted(multiply_series(loop, k_qB))
        K = k_CB - multiply_series(k_Cp, S)
        K = torch.cat([K[:, :1] + self.D[:, None], K[:, 1:]], 1)
        return Kernels(*(k.to(dtype) for k in (K, S, loop, k_Cp)))

    def undisturbed(
        self, h: Complex[Tensor, "batch width n_states"], length: int
    ) -> tuple[Float[Tensor, "batch length width"], Float[Tensor, "batch length width"]]:
        """q . Γ^t h and C . Γ^(t + 1) h: the values of s and y without feedback and input."""
        weights = torch.cat([self.q.to(h.dtype) * h, (self.C * self.Gamma).to(h.dtype) * h])
        s, y = diagonal.exponential_sums(weights, self.Gamma, length).transpose(1, 2).chunk(2)
        return s, y


class S4(SequenceLayer):
    """S4 as a map of `width` channels, without projections or activation.

    Args:
        width: channels; each has its own step, C and D.
        d_state: real numbers of state per channel, stored as d_state / 2 complex numbers.
        n_ssm: number of different Λ, P and B; channel d uses number d % n_ssm. Defaults to one for each channel.
        dt_min, dt_max: the initial step Δ is log-uniform between them, one draw per channel.
    Raises ValueError for invalid sizes.
    """

    state_type = S4State

    def __init__(
        self,
        width: int,
        d_state: int = S4Options.d_state,
        *,
        n_ssm: int | None = None,
        dt_min: float = S4Options.dt_min,
        dt_max: float = S4Options.dt_max,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        n_ssm = width if n_ssm is None else n_ssm
        self.width, self.d_state, self.n_ssm = width, d_state, n_ssm
        self.kernel = S4Kernel(width, d_state, n_ssm, (dt_min, dt_max), device, dtype)

    def reset_parameters(self) -> None:
        """Redraw all parameters."""
        self.kernel.reset_parameters()

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> S4State:
        """Zeros in the precision of the kernel's parameters, whatever the dtype of the activations."""
        shape = (batch, self.width, self.d_state // 2)
        return S4State(torch.zeros(shape, device=self.kernel.D.device, dtype=self.kernel.state_dtype))

    def run(
        self, x: Float[Tensor, "rows length width"], state: S4State | None, rows: Rows | None
    ) -> tuple[Tensor, S4State]:
        """Convolution mode: O(length (log length + d_state)) operations and O(length) numbers per channel."""
        length, lengths = int(x.shape[1]), None if rows is None else rows.lengths
        if not length:
            return x, self.init_state(x.shape[0]) if state is None else state
        with without_autocast(x.device.type):
            u = x if rows is None else rows.zero_padding(x)
            wide = torch.promote_types(x.dtype, self.kernel.D.dtype)
            system = self.kernel.discretise()
            kernels = system.kernels(length, wide)
            if state is None and not last_states_are_wanted():
                shape = (len(x), *system.Gamma.shape)
                return fft_conv(u, kernels.K), S4State(unread(shape, self.kernel.state_dtype, x.device))
            u = u.to(wide)
            y, s = fft_conv(u, kernels.K), fft_conv(u, kernels.S)
            if state is not None:
                s0, y0 = recomputed(LowRankSystem.undisturbed, system, state.h, length)
                s0 = fft_conv(s0, kernels.loop)
                y, s = y + y0 - fft_conv(s0, kernels.k_Cp), s + s0
            u, s = diagonal.right_aligned(u, lengths), diagonal.right_aligned(s, lengths)
            of_u, of_s = recomputed(diagonal.accumulate, torch.cat([u, s]), system.Gamma).chunk(2)
            h = system.Bbar * of_u - system.p * of_s
            if state is not None:
                h = h + diagonal.elapsed(system.Gamma, length, lengths) * state.h
            return y.to(x.dtype), S4State(h.to(self.kernel.state_dtype))

    def run_step(self, x: Float[Tensor, "batch width"], state: S4State) -> tuple[Float[Tensor, "batch width"], S4State]:
        """Recurrent mode, O(d_state) per channel. Float64, because the error of a float32 Γ grows with each token."""
        with without_autocast(x.device.type):
            system = self.kernel.derived("system", self.kernel.discretise)
            u, s = x.to(system.D.dtype), diagonal.real_sum(system.q * state.h)
            h = system.Gamma * state.h - system.p * s[..., None] + system.Bbar * u[..., None]
            y = diagonal.real_sum(system.C * h) + system.D * u
            return y.to(x.dtype), S4State(h.to(self.kernel.state_dtype))


class S4Kernel(KernelParameters):
    """log Δ, Λ = -exp(A_log) + i A_imag, P, B, C and D. P, B and C are complex: their last dimension is (re, im)."""

    def __init__(
        self, width: int, d_state: int, n_ssm: int, dt_range: tuple[float, float], device=None, dtype=None
    ) -> None:
        super().__init__()
        diagonal.require_sizes(width, d_state, pairs=True)
        if n_ssm < 1 or width % n_ssm:
            raise ValueError(
                f"n_ssm must divide width, got {n_ssm} and {width}; 1 shares one A and B among all channels"
            )
        self.dt_range = dt_range

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=self.wide(dtype)))

        self.log_dt = parameter(width)
        self.A_log = parameter(n_ssm, d_state // 2)
        self.A_imag = parameter(n_ssm, d_state // 2)
        self.P = parameter(n_ssm, d_state // 2, 2)
        self.B = parameter(n_ssm, d_state // 2, 2)
        self.C = parameter(width, d_state // 2, 2)
        self.D = parameter(width)
        self.reset_parameters()

    @property
    def state_dtype(self) -> torch.dtype:
        """The complex dtype of the parameters' precision."""
        return complex_dtype(self.D.dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """log Δ, HiPPO-LegS, C complex standard normal, D standard normal, in this order."""
        if self.log_dt.is_meta:
            return
        diagonal.draw_log_dt(self.log_dt, *self.dt_range)
        frequencies, P = legs(2 * self.A_log.shape[1])
        self.A_log.fill_(math.log(0.5))
        self.A_imag.copy_(frequencies)
        for parameter, value in ((self.P, P), (self.B, math.sqrt(2) * P)):
            parameter.copy_(torch.stack([value, torch.zeros_like(value)], -1))
        self.C.normal_(std=math.sqrt(0.5))
        self.D.normal_()

    def discretise(self) -> LowRankSystem:
        """The system discretised with each channel's step, by the Sherman-Morrison formula for (1 - Δ/2 A)^-1."""
        exact = diagonal.exact_dtype(self.D.device)
        repeats = self.D.shape[0] // self.A_log.shape[0]
        A_log, A_imag, P, B = (p.to(exact).repeat(repeats, *[1] * (p.ndim - 1)) for p in self._of_ssm())
        P, B, C = (torch.complex(*x.unbind(-1)) for x in (P, B, self.C.to(exact)))
        dt = torch.exp(self.log_dt.to(exact))[:, None]
        inverse = 1 / (1 - dt / 2 * torch.complex(-torch.exp(A_log), A_imag))
        p, q = inverse * P, inverse * P.conj()
        scale = dt / (1 + dt / 2 * diagonal.real_sum(q * P)[:, None])
        Bbar = dt * inverse * B - dt / 2 * scale * p * diagonal.real_sum(q * B)[:, None]
        return LowRankSystem(2 * inverse - 1, scale * p, q, Bbar, C, self.D.to(exact))

    def _of_ssm(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.A_log, self.A_imag, self.P, self.B


def legs(d_state: int) -> tuple[Float[Tensor, " n_states"], Float[Tensor, " n_states"]]:
    """HiPPO-LegS as -1/2 + i frequencies - P P*, in the basis where P is real; B is sqrt(2) P there.

    A[n, k] = -sqrt((2n + 1)(2k + 1)) below the diagonal, -(n + 1) on it, B[n] = sqrt(2n + 1), P[n] = sqrt(n + 1/2).
    A + P P^T + 1/2 is skew-symmetric. The phases of its eigenvectors V are free; they are chosen so that V* P is
    positive and B is real. Returns the half with positive frequencies; the others are their conjugates.
    """
    P = torch.sqrt(torch.arange(d_state, dtype=torch.float64, device="cpu") + 0.5)
    outer = P[:, None] * P
    skew = outer.triu(1) - outer.tril(-1)
    frequencies, V = torch.linalg.eigh(-1j * skew)
    half = d_state // 2
    return frequencies[half:], (V[:, half:].conj().T @ P.to(V.dtype)).abs()


def shifted(series: Float[Tensor, "width length"], first: float = 0) -> Float[Tensor, "width length"]:
    """first + z series, truncated to the same length."""
    return F.pad(series[:, :-1], (1, 0), value=first)


def multiply_series(
    a: Float[Tensor, "width length"], b: Float[Tensor, "width length"]
) -> Float[Tensor, "width length"]:
    """The product of two power series, truncated to their length."""
    length = int(a.shape[1])
    size = fast_fft_size(2 * length - 1)
    return torch.fft.irfft(torch.fft.rfft(a, size) * torch.fft.rfft(b, size), size)[:, :length]


def inverse_series(a: Float[Tensor, "width length"]) -> Float[Tensor, "width length"]:
    """1 / a for a power series that begins with 1, truncated to its length; O(length log length)."""
    return _newton(a) if as_operations(a) else _InverseSeries.apply(a)


def _newton(a: Float[Tensor, "width length"]) -> Float[Tensor, "width length"]:
    """1 / a by the iteration g <- g - g (a g - 1), which doubles the number of correct terms."""
    lengths = [int(a.shape[1])]
    while lengths[-1] > 1:
        lengths.append(-(-lengths[-1] // 2))
    g = torch.ones_like(a[:, :1])
    for known, wanted in zip(lengths[:0:-1], lengths[-2::-1], strict=True):
        size = fast_fft_size(2 * known)  # terms that wrap around land on terms that are already known
        spectrum = torch.fft.rfft(g, size)
        error = torch.fft.irfft(torch.fft.rfft(a[:, :wanted], size) * spectrum, size)[:, known:wanted]
        correction = torch.fft.irfft(torch.fft.rfft(error, size) * spectrum, size)[:, : wanted - known]
        g = torch.cat([g, -correction], 1)
    return g


class _InverseSeries(torch.autograd.Function):
    """1 / a. Only the result is kept for the backward pass, d(1/a) = -(1/a)^2 da, which can be differentiated again."""

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        g = _newton(a)
        ctx.save_for_backward(g)
        return g

    @staticmethod
    def backward(ctx, dg: Tensor) -> Tensor:
        (g,) = ctx.saved_tensors
        return -multiply_series(multiply_series(g, g), dg.flip(1)).flip(1)
