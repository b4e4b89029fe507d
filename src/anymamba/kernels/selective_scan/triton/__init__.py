"""The selective scan in Triton for GPUs of NVIDIA, AMD and Intel, for real A; `forward_kernels.py` says how it works.

Nothing here waits for the GPU, and every sum has an order of its own. With TRITON_INTERPRET=1 it serves CPU tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.kernels.selective_scan.chunks import leaving_row
from anymamba.kernels.selective_scan.triton import plan
from anymamba.kernels.selective_scan.triton.call import Call
from anymamba.runtimes import triton

NAME = "triton"
TRANSPARENT: frozenset[str] = frozenset()
CLAMPS_OFFSETS = True


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve tensors on a device, in words; None where it can."""
    return triton.unavailable(device_type)


def refuses(arguments: ScanArguments) -> str | None:
    if arguments.A.is_complex():
        return "it supports only real A"
    return triton.refuses(arguments.u.device, arguments.tensors)


def description() -> str:
    return f"{triton.description()}; complex A goes to portable"


def saved_shape(a: ScanArguments) -> tuple[int, ...]:
    """Of the states that forward saves for backward: (batch, tokens / 64, d_state, d_inner) in one dimension."""
    return (a.batch * ((a.length + plan.SAVED_EVERY - 1) // plan.SAVED_EVERY) * a.d_state * a.d_inner,)


def forward(a: ScanArguments, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, d), last_state (n_sequences, d, n), and the states before every 64 tokens (or nothing)."""
    y = a.u.new_empty(a.u.shape)
    saved = a.u.new_empty(saved_shape(a) if save else (0,), dtype=a.dtype)
    last_state = a.u.new_zeros(a.n_sequences, a.d_inner, a.d_state, dtype=a.dtype)
    if a.initial_state is not None:
        last_state.copy_(a.initial_state)  # an empty sequence keeps its state
    if a.u.numel() == 0:
        return y, last_state, saved
    call = Call(a)
    results = {"y": y, "last": last_state, "saved": saved if save else None}
    if plan.splits(a):
        call.scan_split(**results)
        return y, last_state, saved
    results["partial"] = a.u.new_empty(a.u.shape, dtype=a.dtype) if len(call.slabs) > 1 else None
    if call.n_chunks > 1:
        call.new_chunks()
        for slab in call.slabs:
            call.scan(slab, summary=True, **results | {"saved": None})
        call.carry(call.initial_state, reverse=False)
    for slab in call.slabs:
        call.scan(slab, summary=False, **results)
    return y, last_state, saved


def backward(dy: Tensor, dlast_state: Tensor | None, a: ScanArguments, saved: Tensor) -> list[Tensor | None]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and initial_state (None where the input is None)."""
    dlast_state = a.state_gradient(dlast_state)
    if a.u.numel() == 0:
        return _gradients_of_nothing(dlast_state, a)
    call = Call(a, plan.BACKWARD_PROGRAMS)
    dy, dlast_state = (t.resolve_conj().resolve_neg() for t in (dy, dlast_state))  # autograd hands over lazy ones
    dlast_state = dlast_state.to(a.dtype).contiguous()
    dinitial = None if a.initial_state is None else dlast_state.clone()  # an empty sequence hands it on
    call.gradient_of(dy)
    if call.n_chunks > 1:
        call.new_chunks()
        for slab in call.slabs:
            call.reverse_summary(slab, dlast_state)
        call.carry(dlast_state, reverse=True)
    du, ddelta, dz = (None if t is None else t.new_empty(t.shape) for t in (a.u, a.delta, a.z))
    parts = call.new_parts(saved, du, ddelta, dz, dinitial)
    for slab in call.slabs:
        call.scan_backward(slab, dlast_state, parts)
    dA, dB, dC, dD, dbias = call.sums(parts)
    initial = None if a.initial_state is None or dinitial is None else dinitial.to(a.initial_state.dtype)
    return [du, ddelta, dA, dB, dC, dD, dz, dbias, initial]


def _gradients_of_nothing(dlast_state: Tensor, a: ScanArguments) -> list[Tensor | None]:
    """Those of an empty batch or length."""
    found = [None if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format) for t in a.tensors[:8]]
    initial = None if a.initial_state is None else a.initial_state.new_empty(a.initial_state.shape).copy_(dlast_state)
    return [*found, initial]


def step(a: ScanArguments) -> tuple[Tensor, Tensor]:
    """One token: y (b, 1, d) and the new state (b, d, n) from `initial_state`."""
    y, state = a.u.new_empty(a.u.shape), a.u.new_empty(a.batch, a.d_inner, a.d_state, dtype=a.dtype)
    if a.u.numel():
        Call(a).step(y, state)
    return y, state


def summary(a: ScanArguments) -> tuple[Tensor, Tensor]:
    """The state (b, d, n) after the last token of each row, and the sum of the row's steps (b, d)."""
    call = Call(a._replace(C=a.B, D=None, z=None))
    call.n_leaving = call.n_chunks
    call.new_chunks()
    unused = {"partial": call.chunk_states, "y": call.chunk_states, "last": call.chunk_states, "saved": None}
    for slab in call.slabs:
        call.scan(slab, summary=True, **unused)
    return _leaving_row(call, None if a.cu_seqlens is not None else a.initial_state), call.chunk_steps.sum(1)


def reverse_summary(dy: Tensor, dlast_state: Tensor, a: ScanArguments) -> Tensor:
    """The gradient of the state (b, d, n) before the first token of each row."""
    call = Call(a)
    call.n_leaving = call.n_chunks
    call.new_chunks()
    dy, dlast_state = (t.resolve_conj().resolve_neg() for t in (dy, dlast_state))
    dlast_state = dlast_state.to(a.dtype).contiguous()
    call.gradient_of(dy)
    for slab in call.slabs:
        call.reverse_summary(slab, dlast_state)
    return _leaving_row(call, None if a.cu_seqlens is not None else dlast_state, reverse=True)


def _leaving_row(call: Call, arriving: Tensor | None, *, reverse: bool = False) -> Tensor:
    """What leaves each row (b, d, n), from what leaves its chunks if nothing arrives, and what arrives at the row."""
    a, leaving = call.a, call.chunk_states
    decays = torch.exp(call.chunk_steps[:, :, None] * a.A.to(a.dtype).T)
    if arriving is not None:  # as one more chunk
        given = arriving.to(a.dtype).mT[:, None]
        pair = (leaving, given) if reverse else (given, leaving)
        leaving = torch.cat(pair, 1)
        decays = torch.cat((decays, torch.ones_like(given)) if reverse else (torch.ones_like(given), decays), 1)
    return leaving_row(leaving, decays, a, call.chunk, reverse=reverse).mT.contiguous()
