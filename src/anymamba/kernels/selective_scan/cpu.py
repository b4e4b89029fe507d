"""The selective scan in C++ (csrc/scan.cpp), for real A: here tensors become pointers, and parts of sums sums.

Rows may be strided as long as their last dimension is dense; what is not is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.kernels import native

NAME = "cpu"

TILE = 32  # steps between saved states, which cost d_state / 32 of u
LONG = 1 << 14  # steps from which a shape of one task is cut in time
VERY_LONG = 1 << 17


def task_channels(d_inner: int, n_groups: int) -> int:
    """Channels of a task: many share the reading of B and C and the sums over them, few keep all cores busy."""
    per_group = max(1, d_inner // n_groups)
    return 128 if per_group >= 512 else 64 if per_group >= 256 else 32 if per_group >= 64 else 16


def task_steps(batch: int, length: int, d_inner: int, n_groups: int) -> int:
    """Steps of a task: the whole length unless that leaves a single task; chunks cost a second pass over most of it."""
    n_tasks = batch * n_groups * -(-(d_inner // n_groups) // task_channels(d_inner, n_groups))
    n_chunks = 1 if n_tasks > 1 or length < LONG else 3 if length < VERY_LONG else 9
    return -(-length // (n_chunks * TILE)) * TILE


def saved_shape(batch: int, length: int, d_inner: int, d_state: int, n_groups: int) -> tuple[int, ...]:
    """Of the states that forward saves for backward, before each tile (the last two may stay unused)."""
    return (length // TILE + 2, batch, d_state, d_inner)


def working_dtype(u: Tensor, delta: Tensor, A: Tensor) -> torch.dtype:
    """float32, or float64 where any of these is."""
    return torch.float64 if torch.float64 in (u.dtype, delta.dtype, A.dtype) else torch.float32


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
    """y (b, l, d), last_state (b or n_sequences, d, n), and the states before each tile, for backward (or nothing)."""
    call = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, b_discretization, initial_state, cu_seqlens)
    batch, length, d_inner = u.shape
    y = native.empty(u)
    last_state = _initial_states(call, u, A.shape, initial_state, cu_seqlens)
    shape = saved_shape(batch, length, d_inner, A.shape[1], call.n_groups) if save else (0,)
    saved = native.empty(u, *shape, dtype=call.dtype)
    if save:
        saved[-(-length // TILE) :] = 0
    if y.numel():
        call.rows(y=y)
        call.pointers(last_state=last_state, saved=saved if save else None)
        native.module().scan_forward(call.args)
    return y, last_state, saved


def _initial_states(
    call: _Call, u: Tensor, matrix: torch.Size, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Where the last states go, filled where a sequence may be empty: its state passes through."""
    if cu_seqlens is None and u.numel():
        return native.empty(u, u.shape[0], *matrix, dtype=call.dtype)
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    states = u.new_zeros(rows, *matrix, dtype=call.dtype)
    return states if initial_state is None else states.copy_(initial_state)


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
    """Gradients of u, delta, A, B, C, D, z, delta_bias and initial_state (None where the input is absent)."""
    call = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, b_discretization, initial_state, cu_seqlens)
    (batch, length, d_inner), d_state = u.shape, A.shape[1]
    du, ddelta, dz = native.empty(u), native.empty(delta), None if z is None else native.empty(z)
    n_ranges = -(-(d_inner // call.n_groups) // call.args.range) if d_inner else 0

    n_parts = batch * call.n_chunks

    def parts(*shape: int) -> Tensor:  # every one of them is written, unless there is nothing to do
        made = native.empty(u, *shape, dtype=call.dtype)
        return made if u.numel() else made.zero_()

    def matrix_parts(M: Tensor) -> Tensor:
        if M.ndim == 2:
            return parts(n_parts, d_state, d_inner)
        return parts(batch, call.n_groups, n_ranges, length, d_state)

    dA, dB, dC = parts(n_parts, d_state, d_inner), matrix_parts(B), matrix_parts(C)
    dD, dbias = parts(n_parts, d_inner), parts(n_parts, d_inner)
    dlast_state = dlast_state.to(call.dtype).contiguous()
    dinitial = None if initial_state is None else dlast_state.clone()  # what an empty sequence passes through
    if u.numel():
        call.rows(dy=dy, du=du, ddelta=ddelta, dz=dz)
        call.pointers(dlast_state=dlast_state, dinitial_state=dinitial, saved=saved)
        call.pointers(dA_parts=dA, dB_parts=dB, dC_parts=dC, dD_parts=dD, dbias_parts=dbias)
        native.module().scan_backward(call.args)
    return [
        du,
        ddelta,
        _like(dA.sum(0).T, A),
        _sum_of_parts(dB, B),
        _sum_of_parts(dC, C),
        None if D is None else _like(dD.sum(0), D),
        dz,
        None if delta_bias is None else _like(dbias.sum(0), delta_bias),
        None if dinitial is None or initial_state is None else _like(dinitial, initial_state),
    ]


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
    """One token: y (b, d) and the new state (b, d, n); B and C (d, n) or (b, g, n). Not for autograd."""
    B, C = (M if M.ndim == 2 else M[:, None] for M in (B, C))
    z = None if z is None else z[:, None]
    y, last_state, _ = forward(
        u[:, None], delta[:, None], A, B, C, D, z, delta_bias, delta_softplus, b_discretization, state, None, False
    )
    return y[:, 0], last_state


class _Call(native.Call):
    def __init__(
        self,
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
    ) -> None:
        super().__init__(native.module().ScanArgs(), working_dtype(u, delta, A))
        args = self.args
        args.softplus, args.zoh = delta_softplus, b_discretization == "zoh"
        (args.batch, args.length, args.d_inner), args.d_state = u.shape, A.shape[1]
        self.n_groups = args.n_groups = next((M.shape[2] for M in (B, C) if M.ndim == 4), 1)
        args.tile, args.range = TILE, task_channels(u.shape[2], self.n_groups)
        args.chunk = max(TILE, task_steps(args.batch, args.length, args.d_inner, self.n_groups))
        self.n_chunks = -(-u.shape[1] // args.chunk)
        if self.n_chunks > 1:
            shape = (u.shape[0], self.n_chunks, *A.shape)
            self.pointers(chunk_states=u.new_empty(shape, dtype=self.dtype))
            self.pointers(chunk_decays=u.new_empty(shape, dtype=self.dtype))
        self.rows(u=u, delta=delta, z=z)
        args.selective_B, args.selective_C = B.ndim == 4, C.ndim == 4
        for name, M in (("B", B), ("C", C)):
            if M.ndim == 4:
                self.rows(**{name: M})
            else:
                self.vectors(**{f"constant_{name}": M})
        self.vectors(A=A, D=D, delta_bias=delta_bias, initial_state=initial_state)
        self.borders(cu_seqlens)


def _like(gradient: Tensor, tensor: Tensor) -> Tensor:
    return gradient.to(tensor.dtype).contiguous()


def _sum_of_parts(parts: Tensor, M: Tensor) -> Tensor:
    """The gradient of B or C from its parts: (b, n, d) where it is constant, else (b, g, ranges, l, n)."""
    if M.ndim == 2:
        return _like(parts.sum(0).T, M)
    total = parts[:, :, 0] if parts.shape[2] == 1 else parts.sum(2)
    return _like(total.transpose(1, 2), M)
