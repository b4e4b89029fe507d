"""The selective scan as the recurrence itself, a loop over time in differentiable PyTorch: the oracle of every backend.

Notation: b batch, l length, d channels, n state, g groups of channels that share B and C. Never optimised; it holds
(b, l, d, n) tensors. Any float dtype; the state is float32 or wider.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor

NAME = "reference"


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    b_discretization: str,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, d), last_state (b or n_sequences, d, n) and an empty tensor, where other backends may save states.

    Shapes are those of `anymamba.ops.selective_scan`, with B and C (d, n) or (b, l, g, n).
    """
    if cu_seqlens is None:
        y, last_state = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, b_discretization, initial_state)
    else:
        y, last_state = _packed_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, b_discretization, initial_state, cu_seqlens
        )
    return y, last_state, last_state.new_empty(0)


def backward(
    dy: Tensor,
    dlast_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    b_discretization: str,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
) -> list[Tensor | None]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, by automatic differentiation of `forward`."""
    inputs = [u, delta, A, B, C, D, z, delta_bias, initial_state]
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        options = (delta_softplus, b_discretization, leaves[8], cu_seqlens)
        y, last_state, _ = forward(*leaves[:8], *options)  # type: ignore[arg-type, call-arg]
    present = [t for t in leaves if t is not None]
    pairs = [pair for pair in ((y, dy), (last_state, dlast_state)) if pair[0].requires_grad]
    outputs, cotangents = zip(*pairs, strict=True)
    grads = iter(torch.autograd.grad(outputs, present, cotangents, materialize_grads=True))
    return [None if t is None else next(grads) for t in leaves]


def step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    b_discretization: str,
) -> tuple[Tensor, Tensor]:
    """One token: y (b, d) and the new state (b, d, n); B and C (d, n) or (b, g, n)."""
    selective_B, selective_C = (M if M.ndim == 2 else rearrange(M, "b g n -> b 1 g n") for M in (B, C))
    y, state, _ = forward(
        u[:, None],
        delta[:, None],
        A,
        selective_B,
        selective_C,
        D,
        None if z is None else z[:, None],
        delta_bias,
        delta_softplus,
        b_discretization,
        state,
        None,
    )
    return y[:, 0], state


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    b_discretization: str,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, length, d_inner = u.shape
    real = torch.promote_types(torch.float32, torch.promote_types(u.dtype, delta.dtype))
    real = torch.promote_types(real, A.real.dtype)
    dtype = torch.promote_types(real, A.dtype)
    x, step_size, A = u.to(real), delta.to(real), A.to(dtype)
    if delta_bias is not None:
        step_size = step_size + delta_bias.to(real)
    if delta_softplus:
        step_size = F.softplus(step_size)
    B, C = (_per_channel(M.to(dtype), batch, length, d_inner) for M in (B, C))
    delta_A = einsum(step_size.to(dtype), A, "b l d, d n -> b l d n")
    decay = torch.exp(delta_A)
    weight = step_size[..., None] if b_discretization == "euler" else expm1_ratio(delta_A) * step_size[..., None]
    drive = weight * B * x[..., None]
    h = u.new_zeros(batch, d_inner, A.shape[1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(length):
        h = decay[:, t] * h + drive[:, t]
        outputs.append(einsum(h, C[:, t], "b d n, b d n -> b d"))
    y = torch.stack(outputs, 1) if outputs else h.new_zeros(batch, 0, d_inner)
    y = 2 * y.real if y.is_complex() else y  # conjugate partners are implied
    if D is not None:
        y = y + D.to(real) * x
    if z is not None:
        y = y * F.silu(z.to(real))
    return y.to(u.dtype), h.clone() if length == 0 else h


def _packed_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    b_discretization: str,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    ys, states = [], []
    borders = cu_seqlens.tolist()
    for i, (start, stop) in enumerate(itertools.pairwise(borders)):
        part = slice(start, stop)
        y, state = _scan(
            u[:, part],
            delta[:, part],
            A,
            B if B.ndim == 2 else B[:, part],
            C if C.ndim == 2 else C[:, part],
            D,
            None if z is None else z[:, part],
            delta_bias,
            delta_softplus,
            b_discretization,
            None if initial_state is None else initial_state[i : i + 1],
        )
        ys.append(y)
        states.append(state)
    return torch.cat(ys, 1), torch.cat(states)


def _per_channel(M: Tensor, batch: int, length: int, d_inner: int) -> Tensor:
    """B or C, constant (d, n) or grouped (b, l, g, n), as (b, l, d, n)."""
    if M.ndim == 2:
        return M.expand(batch, length, *M.shape)
    return repeat(M, "b l g n -> b l (g p) n", p=d_inner // M.shape[2])


def expm1_ratio(x: Tensor) -> Tensor:
    """(exp(x) - 1) / x, and its limit 1 at 0, without cancellation, with a gradient that does not cancel either.

    Near zero its power series sum x^k / (k+1)!, elsewhere the quotient.
    """
    near = x.abs() < 0.5
    small = torch.where(near, x, 0.1)
    series = torch.zeros_like(x)
    for k in range(16, 0, -1):
        series = (series + 1) * small / (k + 1)
    large = torch.where(near, 1.0, x)
    quotient = torch.exp(large) - 1 if x.is_complex() else torch.expm1(large)
    return torch.where(near, 1 + series, quotient / large)
