"""The selective scan in C++ (csrc/scan.cpp), for real A. This module passes pointers and adds up partial sums.

Tensors may be strided if their last dimension is contiguous; others are copied.
"""

from __future__ import annotations

from torch import Tensor

from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.kernels.selective_scan.chunks import leaving_row
from anymamba.runtimes import native

NAME = "cpu"
TRANSPARENT: frozenset[str] = frozenset()

TILE = 32  # steps between saved states; they take d_state / 32 of the memory of u
LONG = 1 << 14  # from this length on, work that would be a single task is split in time
VERY_LONG = 1 << 17


def unavailable(device_type: str) -> str | None:
    return native.unavailable(device_type)


def refuses(arguments: ScanArguments) -> str | None:
    return "it supports only real A" if arguments.A.is_complex() else None


def description() -> str:
    return f"compiled C++: {native.description()}; complex A goes to portable"


def task_channels(d_inner: int, n_groups: int) -> int:
    """Channels per task. More channels share the reads of B and C and the sums for them; fewer keep all cores busy."""
    per_group = max(1, d_inner // n_groups)
    return 128 if per_group >= 512 else 64 if per_group >= 256 else 32 if per_group >= 64 else 16


def task_steps(batch: int, length: int, d_inner: int, n_groups: int) -> int:
    """Steps per task: the whole length, unless that gives one task. Chunks cost a second pass over most steps."""
    n_tasks = batch * n_groups * -(-(d_inner // n_groups) // task_channels(d_inner, n_groups))
    n_chunks = 1 if n_tasks > 1 or length < LONG else 3 if length < VERY_LONG else 9
    return -(-length // (n_chunks * TILE)) * TILE


def saved_shape(a: ScanArguments) -> tuple[int, ...]:
    """Shape of the states before each tile, which forward saves for backward (the last two may be unused)."""
    return (a.length // TILE + 2, a.batch, a.d_state, a.d_inner)


def forward(a: ScanArguments, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, d), last_state (n_sequences, d, n), and the states before each tile for backward, empty unless save."""
    call = _Call(a)
    y = native.empty(a.u)
    last_state = _initial_states(a, call.dtype)
    saved = native.empty(a.u, *(saved_shape(a) if save else (0,)), dtype=call.dtype)
    if save:
        saved[-(-a.length // TILE) :] = 0
    if y.numel():
        call.rows(y=y)
        call.pointers(last_state=last_state, saved=saved if save else None)
        native.module().scan_forward(call.args)
    return y, last_state, saved


def _initial_states(a: ScanArguments, dtype: torch.dtype) -> Tensor:
    """The tensor for the last states. It holds the initial states if a sequence may be empty and so keep its state."""
    shape = (a.n_sequences, *a.A.shape)
    if a.cu_seqlens is None and a.u.numel():
        return native.empty(a.u, *shape, dtype=dtype)
    states = a.u.new_zeros(shape, dtype=dtype)
    return states if a.initial_state is None else states.copy_(a.initial_state)


def backward(dy: Tensor, dlast_state: Tensor | None, a: ScanArguments, saved: Tensor) -> list[Tensor | None]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and initial_state (None for an input that is not given)."""
    call = _Call(a)
    (batch, length, d_inner), d_state = a.u.shape, a.d_state
    du, ddelta, dz = native.empty(a.u), native.empty(a.delta), None if a.z is None else native.empty(a.z)
    n_ranges = -(-(d_inner // call.n_groups) // call.args.range) if d_inner else 0

    n_parts = batch * call.n_chunks

    def parts(*shape: int) -> Tensor:  # the kernel writes every element, unless u is empty
        made = native.empty(a.u, *shape, dtype=call.dtype)
        return made if a.u.numel() else made.zero_()

    def matrix_parts(M: Tensor) -> Tensor:
        if M.ndim == 2:
            return parts(n_parts, d_state, d_inner)
        return parts(batch, call.n_groups, n_ranges, length, d_state)

    dA, dB, dC = parts(n_parts, d_state, d_inner), matrix_parts(a.B), matrix_parts(a.C)
    dD, dbias = parts(n_parts, d_inner), parts(n_parts, d_inner)
    dlast_state = a.state_gradient(dlast_state).to(call.dtype).contiguous()
    dinitial = None if a.initial_state is None else dlast_state.clone()  # as an empty sequence needs it
    if a.u.numel():
        call.rows(dy=dy, du=du, ddelta=ddelta, dz=dz)
        call.pointers(dlast_state=dlast_state, dinitial_state=dinitial, saved=saved)
        call.pointers(dA_parts=dA, dB_parts=dB, dC_parts=dC, dD_parts=dD, dbias_parts=dbias)
        native.module().scan_backward(call.args)
    return [
        du,
        ddelta,
        _like(dA.sum(0).T, a.A),
        _sum_of_parts(dB, a.B),
        _sum_of_parts(dC, a.C),
        None if a.D is None else _like(dD.sum(0), a.D),
        dz,
        None if a.delta_bias is None else _like(dbias.sum(0), a.delta_bias),
        None if dinitial is None or a.initial_state is None else _like(dinitial, a.initial_state),
    ]


def step(a: ScanArguments) -> tuple[Tensor, Tensor]:
    """One token: y (b, 1, d) and the new state (b, d, n). Not for autograd."""
    y, last_state, _ = forward(a, save=False)
    return y, last_state


def summary(a: ScanArguments) -> tuple[Tensor, Tensor]:
    """The state (b, d, n) after the last token of each row, and the sum of the row's steps (b, d)."""
    call = _Call(a._replace(C=a.B, D=None, z=None))
    steps = a.u.new_empty(a.batch, call.n_chunks, a.d_inner, dtype=call.dtype)
    call.pointers(chunk_steps=steps)
    return call.leaving_row(a, backward=False), steps.sum(1)


def reverse_summary(dy: Tensor, dlast_state: Tensor, a: ScanArguments) -> Tensor:
    """The gradient of the state (b, d, n) before the first token of each row."""
    call = _Call(a)
    call.rows(dy=dy)
    call.pointers(dlast_state=dlast_state.to(call.dtype).contiguous())
    return call.leaving_row(a, backward=True)


class _Call(native.Call):
    def __init__(self, a: ScanArguments) -> None:
        super().__init__(native.module().ScanArgs(), a.dtype)
        args = self.args
        args.softplus, args.zoh = a.delta_softplus, a.zoh
        batch, length, d_inner = a.u.shape
        args.batch, args.length, args.d_inner, args.d_state = batch, length, d_inner, a.d_state
        self.n_groups = args.n_groups = a.n_groups
        args.tile, args.range = TILE, task_channels(d_inner, self.n_groups)
        chunk = args.chunk = max(TILE, task_steps(batch, length, d_inner, self.n_groups))
        self.n_chunks = -(-length // chunk)
        if self.n_chunks > 1:
            self._new_chunks(a)
        self.rows(u=a.u, delta=a.delta, z=a.z)
        args.selective_B, args.selective_C = a.B.ndim == 4, a.C.ndim == 4
        for name, M in (("B", a.B), ("C", a.C)):
            if M.ndim == 4:
                self.rows(**{name: M})
            else:
                self.vectors(**{f"constant_{name}": M})
        self.vectors(A=a.A, D=a.D, delta_bias=a.delta_bias, initial_state=a.initial_state)
        self.offsets(a.cu_seqlens)

    def _new_chunks(self, a: ScanArguments) -> tuple[Tensor, Tensor]:
        """Scratch for the state that leaves each chunk, and for the decay of what arrives at it."""
        shape = (a.batch, self.n_chunks, *a.A.shape)
        states, decays = (a.u.new_empty(shape, dtype=self.dtype) for _ in range(2))
        self.pointers(chunk_states=states, chunk_decays=decays)
        return states, decays

    def leaving_row(self, a: ScanArguments, *, backward: bool) -> Tensor:
        """What leaves each row: the first phase of a call in chunks, for all chunks."""
        states, decays = self._new_chunks(a)
        native.module().scan_summary(self.args, backward)
        return leaving_row(states, decays, a, self.args.chunk, reverse=backward)


def _like(gradient: Tensor, tensor: Tensor) -> Tensor:
    return gradient.to(tensor.dtype).contiguous()


def _sum_of_parts(parts: Tensor, M: Tensor) -> Tensor:
    """The gradient of B or C from partial sums: (b, n, d) for a constant one, otherwise (b, g, ranges, l, n)."""
    if M.ndim == 2:
        return _like(parts.sum(0).T, M)
    total = parts[:, :, 0] if parts.shape[2] == 1 else parts.sum(2)
    return _like(total.transpose(1, 2), M)
