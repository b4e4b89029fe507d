"""The selective scan by its definition, a loop over time in differentiable PyTorch: the oracle of every backend.

Notation: b batch, l length, d channels, n state, g groups of channels that share B and C. It is not optimised and holds
(b, l, d, n) tensors. Any float dtype; the state is float32 or wider.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, repeat
from torch import Tensor

from anymamba.kernels.selective_scan.arguments import ScanArguments

NAME = "reference"
TRANSPARENT = frozenset({"forward", "step"})


def unavailable(device_type: str) -> str | None:
    return None


def refuses(arguments: ScanArguments) -> str | None:
    return None


def description() -> str:
    return "a loop over time: slow, the oracle of the tests"


def forward(a: ScanArguments, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, d), last_state (n_sequences, d, n) and an empty tensor; other backends may save states in it."""
    y, last_state = _scan(a) if a.cu_seqlens is None else _packed_scan(a)
    return y, last_state, last_state.new_empty(0)


def backward(dy: Tensor, dlast_state: Tensor | None, a: ScanArguments, saved: Tensor) -> list[Tensor | None]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, by automatic differentiation of `forward`."""
    inputs = a.tensors[:-1]
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    fields: Any = (*leaves, a.cu_seqlens, *a.options)
    with torch.enable_grad():
        y, last_state, _ = forward(ScanArguments(*fields), save=False)
    present = [t for t in leaves if t is not None]
    pairs = [pair for pair in ((y, dy), (last_state, a.state_gradient(dlast_state))) if pair[0].requires_grad]
    outputs, cotangents = zip(*pairs, strict=True)
    grads = iter(torch.autograd.grad(outputs, present, cotangents, materialize_grads=True))
    return [None if t is None else next(grads) for t in leaves]


def step(a: ScanArguments) -> tuple[Tensor, Tensor]:
    """One token: y (b, 1, d) and the new state (b, d, n)."""
    return _scan(a)


def _scan(a: ScanArguments) -> tuple[Tensor, Tensor]:
    real, dtype = a.real_dtype, a.dtype
    x, step_size, A = a.u.to(real), a.delta.to(real), a.A.to(dtype)
    if a.delta_bias is not None:
        step_size = step_size + a.delta_bias.to(real)
    if a.delta_softplus:
        step_size = F.softplus(step_size)
    B, C = (_per_channel(M.to(dtype), a) for M in (a.B, a.C))
    delta_A = einsum(step_size.to(dtype), A, "b l d, d n -> b l d n")
    decay = torch.exp(delta_A)
    weight = expm1_ratio(delta_A) * step_size[..., None] if a.zoh else step_size[..., None]
    drive = weight * B * x[..., None]
    zeros = x.new_zeros(a.batch, a.d_inner, a.d_state, dtype=dtype)
    h = zeros if a.initial_state is None else a.initial_state.to(dtype)
    outputs = []
    for t in range(a.length):
        h = decay[:, t] * h + drive[:, t]
        outputs.append(einsum(h, C[:, t], "b d n, b d n -> b d"))
    if outputs:
        y = torch.stack(outputs, 1)
    else:  # empty, but connected to all inputs
        nothing = decay * drive * C
        y, h = nothing.sum(-1), h + nothing.sum(1)
    y = 2 * y.real if y.is_complex() else y  # conjugate partners are implied
    if a.D is not None:
        y = y + a.D.to(real) * x
    if a.z is not None:
        y = y * F.silu(a.z.to(real))
    return y.to(a.u.dtype), h


def _packed_scan(a: ScanArguments) -> tuple[Tensor, Tensor]:
    assert a.cu_seqlens is not None
    pairs = itertools.pairwise(a.cu_seqlens.tolist())
    ys, states = zip(*(_scan(a.of_sequence(i, *pair)) for i, pair in enumerate(pairs)), strict=True)
    return torch.cat(ys, 1), torch.cat(states)


def _per_channel(M: Tensor, a: ScanArguments) -> Tensor:
    """B or C, constant (d, n) or grouped (b, l, g, n), as (b, l, d, n)."""
    if M.ndim == 2:
        return M.expand(a.batch, a.length, *M.shape)
    return repeat(M, "b l g n -> b l (g p) n", p=a.d_inner // M.shape[2])


def expm1_ratio(x: Tensor) -> Tensor:
    """(exp(x) - 1) / x, and its limit 1 at 0, without cancellation in the value or the gradient.

    Near zero it is the power series sum x^k / (k+1)!, elsewhere the quotient.
    """
    near = x.abs() < 0.5
    small = torch.where(near, x, 0.1)
    series = torch.zeros_like(x)
    for k in range(16, 0, -1):
        series = (series + 1) * small / (k + 1)
    large = torch.where(near, 1.0, x)
    quotient = torch.exp(large) - 1 if x.is_complex() else torch.expm1(large)
    return torch.where(near, 1 + series, quotient / large)
