"""`selective_state_update` of `mamba_ssm` 2.3: one token, the state changed in place."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from anymamba.compat.mamba_ssm.refused import refusing
from anymamba.ops import observers
from anymamba.ops.selective_scan import selective_scan_step

__getattr__ = refusing(__name__)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Int[Tensor, " batch"] | None = None,
) -> Tensor:
    """One token of the selective scan.

    Args:
        state: (batch, dim, dstate) or (batch, nheads, dim, dstate), of any dtype, changed in place. The arithmetic is
            in float32, and the output is computed before the new state is rounded to its dtype.
        x, dt, z: (batch, dim) or (batch, nheads, dim).
        A: (dim, dstate) or (nheads, dim, dstate).
        B, C: (batch, dstate) or (batch, ngroups, dstate).
        D, dt_bias: (dim,) or (nheads, dim).
        state_batch_indices: (batch,) the row of `state` for each row of x. A negative index is padding: the output is 0
            and no state changes.
    Returns out, like x; gradients flow through it and through the changed state. Raises ValueError for shapes.
    Source: the interface of mamba-ssm 2.3.2.
    """
    if state.ndim not in (3, 4):
        raise ValueError(f"state must be (batch, [nheads,] dim, dstate), got {tuple(state.shape)}")
    rows = before_writing(state) if state_batch_indices is None else state[state_batch_indices.clamp_min(0).long()]
    flat = rows.flatten(1, -2)  # heads are channels; the groups of B and C divide them in order
    y, new = selective_scan_step(
        flat.to(torch.promote_types(flat.dtype, torch.float32)),
        x.flatten(1),
        dt.flatten(1),
        A.flatten(0, -2),
        _grouped(B),
        _grouped(C),
        None if D is None else D.flatten(),
        None if z is None else z.flatten(1),
        None if dt_bias is None else dt_bias.flatten(),
        delta_softplus=dt_softplus,
    )
    out, new = y.reshape(x.shape), new.reshape(rows.shape)
    if state_batch_indices is None:
        write(state, new)
        return out
    _write_rows(state, new, state_batch_indices)
    return out.masked_fill((state_batch_indices < 0).view(-1, *[1] * (x.ndim - 1)), 0)


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`selective_state_update` without state_batch_indices."""
    return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def before_writing(state: Tensor) -> Tensor:
    """The state to compute from, if the state is overwritten later: a copy if autograd may save it for backward."""
    return state.clone() if torch.is_grad_enabled() else state


def write(state: Tensor, new: Tensor, rows: Tensor | None = None) -> Tensor:
    """Write new values into a state, or into some of its rows; returns the state.

    A state that was made in inference mode is written in that mode; it cannot carry a gradient.
    """
    if not torch.compiler.is_compiling() and state.is_inference() and not torch.is_inference_mode_enabled():
        with torch.inference_mode():
            return write(state, new, rows)
    return state.copy_(new) if rows is None else state.index_put_((rows,), new.to(state.dtype))


def _write_rows(state: Tensor, new: Tensor, indices: Tensor) -> None:
    """Write each new row into the row of the state that its index gives; a negative index writes nothing."""
    if observers.plain(state, new, indices):
        valid = indices >= 0
        write(state, new[valid], indices[valid].long())
        return
    named = indices == torch.arange(len(state), device=state.device)[:, None]  # shapes must not depend on values
    found = named.any(dim=1).view(-1, *[1] * (state.ndim - 1))
    write(state, torch.where(found, new[named.int().argmax(dim=1)].to(state.dtype), state))


def _grouped(M: Tensor) -> Tensor:
    """(batch, dstate) as one group."""
    return M[:, None] if M.ndim == 2 else M
