"""`selective_scan_fn` and `mamba_inner_fn` of `mamba_ssm` 2.3 with anymamba's operators, layout (batch, dim, length).

All gradients are computed, including those of the last state, of out_proj's bias and of the norms' weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.compat.mamba_ssm.ops.triton.layer_norm import layer_norm_fn
from anymamba.compat.mamba_ssm.refused import refusing
from anymamba.ops import observers
from anymamba.ops.causal_conv1d import causal_conv1d
from anymamba.ops.selective_scan import selective_scan

__getattr__ = refusing(__name__)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan; out = (C . h + D u) silu(z), with 2 Re(C . h) for a complex A.

    Args:
        u, delta, z: (batch, dim, length), any strides.
        A: (dim, dstate), real or complex.
        B, C: (dim, dstate) constant, (batch, dstate, length) or (batch, n_groups, dstate, length) selective. If A is
            complex, the selective ones are real with twice the length: real and imaginary parts alternate.
        D, delta_bias: (dim,).
    Returns out, like u, or (out, last_state (batch, dim, dstate)).
    Raises ValueError for shapes, TypeError for dtypes.
    Source: the interface of mamba-ssm 2.3.2; the maths is in `anymamba.ops.selective_scan`.
    """
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, None)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_fn` as a plain loop over time."""
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, "reference")


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba layer after its input projection: conv, projections, scan, gate, output projection.

    Args:
        xz: (batch, 2 dim, length), x above z.
        conv1d_weight, conv1d_bias: (dim, 1, width), (dim,).
        x_proj_weight: (dt_rank + 2 dstate, dim); 4 dstate if A is complex (real and imaginary parts alternate).
        delta_proj_weight: (dim, dt_rank).
        out_proj_weight, out_proj_bias: (d_model, dim), (d_model,).
        A, D, delta_bias: as in `selective_scan_fn`.
        B, C: as in `selective_scan_fn`; default to the rows of x_proj.
        B_proj_bias, C_proj_bias: (dstate,) added to the rows of x_proj.
        checkpoint_lvl: 0 keeps the outputs of the convolution and of the step for backward, 1 computes them again.
        b_rms_weight, c_rms_weight: (dstate,) weights of RMS norms on B and C.
        dt_rms_weight: weight of an RMS norm on the step: (dim,) after its projection, (dt_rank,) before it.
        b_c_dt_rms_eps: epsilon of these norms.
    Returns (batch, length, d_model).
    """
    arguments: tuple[Any, ...] = (
        *(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias),
        *(B_proj_bias, C_proj_bias, delta_softplus, b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps),
    )
    if checkpoint_lvl and torch.is_grad_enabled() and not observers.transformed(*arguments[:11]):
        from torch.utils.checkpoint import checkpoint

        y = checkpoint(_inner, *arguments, use_reentrant=False)
    else:
        y = _inner(*arguments)
    bias = None if out_proj_bias is None else out_proj_bias.to(out_proj_weight.dtype)
    return F.linear(y, out_proj_weight, bias)


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` without checkpointing: it keeps all intermediate results for backward."""
    return mamba_inner_fn(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias,
        A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus, checkpoint_lvl=0,
    )  # fmt: skip


def rms_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6, is_rms_norm: bool = True
) -> Tensor:
    """The RMS norm of x (..., dim), or the layer norm."""
    return layer_norm_fn(x, weight, bias, eps=eps, is_rms_norm=is_rms_norm)


class SelectiveScanFn:
    """Has the name of the original's autograd function; `apply` is `selective_scan_fn`."""

    apply = staticmethod(selective_scan_fn)


class MambaInnerFn:
    """Has the name of the original's autograd function; `apply` is `mamba_inner_fn`."""

    apply = staticmethod(mamba_inner_fn)


# ------------------------------------------------------------------------------------------ layouts


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
    return_last_state: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    if u.ndim != 3:
        raise ValueError(f"u must be (batch, dim, length), got {tuple(u.shape)}")
    y, last_state = selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        _matrix("B", B, A),
        _matrix("C", C, A),
        D,
        None if z is None else z.transpose(1, 2),
        delta_bias,
        delta_softplus=delta_softplus,
        backend=backend,
    )
    out = y.transpose(1, 2)
    return (out, last_state) if return_last_state else out


def _matrix(name: str, M: Tensor, A: Tensor) -> Tensor:
    """B or C as (dim, dstate), (batch, length, dstate) or (batch, length, n_groups, dstate)."""
    if M.ndim == 2:
        return M
    if M.ndim not in (3, 4):
        raise ValueError(
            f"{name} must be (dim, dstate), (batch, dstate, length) or (batch, n_groups, dstate, length), "
            f"got {tuple(M.shape)}"
        )
    if A.is_complex() and not M.is_complex():
        wide = M.to(torch.promote_types(M.dtype, torch.float32)).unflatten(-1, (-1, 2))
        M = torch.view_as_complex(wide.contiguous())
    return M.transpose(1, 2) if M.ndim == 3 else M.permute(0, 3, 1, 2)


def _inner(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    delta_softplus: bool,
    b_rms_weight: Tensor | None,
    c_rms_weight: Tensor | None,
    dt_rms_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """The gated output of the scan, (batch, length, dim)."""
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    x = causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu").y
    dt_rank, dstate = delta_proj_weight.shape[1], A.shape[1]
    rows = 2 * dstate if A.is_complex() else dstate
    dt, B_rows, C_rows = F.linear(x, x_proj_weight).split(
        [dt_rank, rows if B is None else 0, rows if C is None else 0], dim=-1
    )
    if dt_rms_weight is not None and dt_rms_weight.numel() == delta_proj_weight.shape[0]:
        delta = _rms(F.linear(dt, delta_proj_weight), dt_rms_weight, eps)
    else:
        delta = F.linear(_rms(dt, dt_rms_weight, eps), delta_proj_weight)
    return selective_scan(
        x,
        delta,
        A,
        _from_rows(B_rows, B_proj_bias, b_rms_weight, eps, A) if B is None else _matrix("B", B, A),
        _from_rows(C_rows, C_proj_bias, c_rms_weight, eps, A) if C is None else _matrix("C", C, A),
        D,
        z,
        delta_bias,
        delta_softplus=delta_softplus,
    ).y


def _from_rows(rows: Tensor, bias: Tensor | None, weight: Tensor | None, eps: float, A: Tensor) -> Tensor:
    """B or C (batch, length, dstate) from the projection's rows."""
    if bias is not None:
        rows = rows + bias.to(rows.dtype)
    rows = _rms(rows, weight, eps)
    if not A.is_complex():
        return rows
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32)).unflatten(-1, (-1, 2))
    return torch.view_as_complex(wide.contiguous())


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)
