"""One token of the scan, of plain operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.kernels.elementwise import expm1_ratio
from anymamba.kernels.selective_scan.portable.inputs import working_dtypes


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
    """One token: y (b, d) and the new state (b, d, n); B and C (d, n) or (b, g, n). Plain operations, for export."""
    real, dtype = working_dtypes(u, delta, A)
    x, step_size = u.to(real), delta.to(real)
    if delta_bias is not None:
        step_size = step_size + delta_bias.to(real)
    if delta_softplus:
        step_size = F.softplus(step_size)
    B, C = (_step_matrix(M.to(dtype), u.shape[1]) for M in (B, C))
    delta_A = step_size[..., None] * A.to(dtype)
    drive = (step_size * x)[..., None] * B
    if b_discretization == "zoh":
        drive = drive * expm1_ratio(delta_A)
    state = torch.exp(delta_A) * state.to(dtype) + drive
    y = (state * C).sum(-1)
    y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = y + D.to(real) * x
    if z is not None:
        y = y * F.silu(z.to(real))
    return y.to(u.dtype), state


def _step_matrix(M: Tensor, d_inner: int) -> Tensor:
    """B or C of one token, constant (d, n) or (b, g, n), so that it broadcasts over (b, d, n)."""
    if M.ndim == 2 or M.shape[1] == 1:
        return M
    return M.repeat_interleave(d_inner // M.shape[1], 1)
