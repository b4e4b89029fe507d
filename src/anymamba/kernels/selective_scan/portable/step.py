"""One token of the scan in plain operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.kernels.elementwise import expm1_ratio
from anymamba.kernels.selective_scan.arguments import ScanArguments


def step(a: ScanArguments) -> tuple[Tensor, Tensor]:
    """One token: y (b, 1, d) and the new state (b, d, n). Plain operations, for export."""
    assert a.initial_state is not None
    real, dtype = a.real_dtype, a.dtype
    x, step_size = a.u.to(real), a.delta.to(real)
    if a.delta_bias is not None:
        step_size = step_size + a.delta_bias.to(real)
    if a.delta_softplus:
        step_size = F.softplus(step_size)
    B, C = (_step_matrix(M.to(dtype), a.d_inner) for M in (a.B, a.C))
    column = step_size.transpose(1, 2)  # (b, d, 1), to broadcast over the states
    delta_A = column * a.A.to(dtype)
    drive = (step_size * x).transpose(1, 2) * B
    if a.zoh:
        drive = drive * expm1_ratio(delta_A)
    state = torch.exp(delta_A) * a.initial_state.to(dtype) + drive
    y = (state * C).sum(-1)[:, None]
    y = 2 * y.real if y.is_complex() else y
    if a.D is not None:
        y = y + a.D.to(real) * x
    if a.z is not None:
        y = y * F.silu(a.z.to(real))
    return y.to(a.u.dtype), state


def _step_matrix(M: Tensor, d_inner: int) -> Tensor:
    """B or C of one token, constant (d, n) or (b, 1, g, n), so that it broadcasts over (b, d, n)."""
    if M.ndim == 2:
        return M
    return M[:, 0] if M.shape[2] == 1 else M[:, 0].repeat_interleave(d_inner // M.shape[2], 1)
