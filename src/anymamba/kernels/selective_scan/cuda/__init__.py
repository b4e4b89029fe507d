"""The selective scan in CUDA C++ for NVIDIA GPUs; `forward.cu` has the notation.

Fast kernels serve real A with selective B and C, general ones the rest of the contract. Nothing here waits for the GPU,
and every sum has an order of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.kernels.selective_scan.cuda import passes, plan
from anymamba.kernels.selective_scan.cuda.call import Call, real
from anymamba.kernels.selective_scan.cuda.summary import (
    Chunks,
    begin,
    begin_reverse,
    reverse_summary,
    summary,
    with_arrival,
)
from anymamba.runtimes import nvrtc
from anymamba.runtimes.launching import copied, resolved
from anymamba.runtimes.replaying import replayed

__all__ = [
    "CLAMPS_OFFSETS",
    "NAME",
    "TRANSPARENT",
    "backward",
    "begin",
    "begin_reverse",
    "description",
    "finish",
    "finish_reverse",
    "forward",
    "refuses",
    "reverse_summary",
    "saved_shape",
    "step",
    "summary",
    "unavailable",
    "with_arrival",
]

NAME = "cuda"
TRANSPARENT: frozenset[str] = frozenset()
CLAMPS_OFFSETS = True


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve tensors on a device, in words; None where it can."""
    return "it serves tensors on an NVIDIA GPU" if device_type != "cuda" else nvrtc.reason()


def refuses(arguments: ScanArguments) -> str | None:
    device = arguments.u.device
    return nvrtc.refuses_gpu(device.index) if device.type == "cuda" else None


def description() -> str:
    return f"CUDA C++: {nvrtc.description()}"


def saved_shape(a: ScanArguments) -> tuple[int, ...]:
    """Of the states that forward saves for backward: (batch, tokens / 64, padded states, padded channels) in one
    dimension, so that code that torch.compile traces serves any length."""
    channels = (a.d_inner // a.n_groups + 31) // 32 * 32 * a.n_groups
    return (
        a.batch
        * ((a.length + plan.SAVED_EVERY - 1) // plan.SAVED_EVERY)
        * plan.padded_states(a, plan.layouts(a))
        * channels,
    )


def forward(a: ScanArguments, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, d), last_state (b or n_sequences, d, n), and the states before every 64 tokens (or nothing)."""
    return finish(a, save, None)


def finish(a: ScanArguments, save: bool, chunks: Chunks | None) -> tuple[Tensor, Tensor, Tensor]:
    """What `forward` returns, from the chunks of `begin` for these arguments."""
    a = passes.with_aligned_matrices(a)
    tensors = a.tensors if chunks is None else (*a.tensors, chunks.states, chunks.decays)
    y, last_state, saved = replayed("scan", tensors, (*a.options, save), lambda: _forward(a, save, chunks))
    return y, last_state, saved


def _forward(a: ScanArguments, save: bool, chunks: Chunks | None) -> tuple[Tensor, Tensor, Tensor]:
    saved = a.u.new_empty(saved_shape(a) if save else (0,), dtype=a.dtype)
    last_state = a.u.new_empty(a.n_sequences, a.d_inner, a.d_state, dtype=a.dtype)
    if a.u.numel() == 0:
        initial = torch.zeros_like(last_state) if a.initial_state is None else a.initial_state
        return a.u.new_empty(a.u.shape), last_state.copy_(initial), saved
    layouts = plan.layouts(a)
    call, dtype = passes.start(a, layouts)
    y = a.u.new_empty(a.u.shape, dtype=dtype)
    call.rows(y=y)
    call.dense(last_state=last_state, saved=saved if save else None)
    if a.cu_seqlens is not None:
        passes.between(call, "pass_empty", a.n_sequences * plan.SMALL_THREADS)
    _fast_forward(call, layouts, dtype, chunks) if layouts else _general_forward(call)
    return y.to(a.u.dtype), last_state, saved


def backward(dy: Tensor, dlast_state: Tensor | None, a: ScanArguments, saved: Tensor) -> list[Tensor | None]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and initial_state (None where the input is None)."""
    return finish_reverse(dy, dlast_state, a, saved, None)


def finish_reverse(
    dy: Tensor, dlast_state: Tensor | None, a: ScanArguments, saved: Tensor, chunks: Chunks | None
) -> list[Tensor | None]:
    """What `backward` returns, from the chunks of `begin_reverse` for these arguments."""
    dy, dlast_state = resolved(dy), resolved(dlast_state)
    a = passes.with_aligned_matrices(a)
    tensors = (dy, dlast_state, saved, *a.tensors, *(() if chunks is None else chunks[:2]))
    grads = replayed("scan backward", tensors, a.options, lambda: _backward(dy, dlast_state, a, saved, chunks))
    return list(grads)


def _backward(
    dy: Tensor, dlast_state: Tensor | None, a: ScanArguments, saved: Tensor, chunks: Chunks | None
) -> list[Tensor | None]:
    inputs = (a.u, a.delta, a.A, a.B, a.C, a.D, a.z, a.delta_bias, a.initial_state)
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = (None if t is None else t.new_empty(t.shape) for t in inputs)
    if a.u.numel() == 0:
        summed = [None if t is None else t.zero_() for t in (dA, dB, dC, dD, dbias)]
        passed = None if dinitial is None else copied(dinitial, dlast_state)
        return [du, ddelta, *summed[:4], dz, summed[4], passed]
    layouts = plan.layouts(a)
    call, dtype = passes.start(a, layouts)
    rows = (du, ddelta, dz)
    written = [None if t is None else t.new_empty(t.shape, dtype=dtype) if layouts else t for t in rows]
    call.rows(dy=dy.to(dtype), du=written[0], ddelta=written[1], dz=written[2])
    call.states(dlast_state=dlast_state)
    states = None if dinitial is None else torch.empty_like(dinitial, dtype=a.dtype)
    call.dense(saved=saved, dinitial_state=states)
    call.gradients(dA=dA, dB=dB, dC=dC, dD=dD, dbias=dbias)
    if a.cu_seqlens is not None and dinitial is not None:
        passes.between(call, "pass_empty", a.n_sequences * plan.SMALL_THREADS)
    _fast_backward(call, a, layouts, dtype, chunks) if layouts else _general_backward(call, a)
    du, ddelta, dz = (None if t is None or w is None else w.to(t.dtype) for t, w in zip(rows, written, strict=True))
    initial = None if dinitial is None or states is None else states.to(dinitial.dtype)
    return [du, ddelta, dA, dB, dC, dD, dz, dbias, initial]


def step(a: ScanArguments) -> tuple[Tensor, Tensor]:
    """One token: y (b, 1, d) and the new state (b, d, n) from `initial_state`."""
    y, state = a.u.new_empty(a.u.shape), a.u.new_empty(a.batch, a.d_inner, a.d_state, dtype=a.dtype)
    if a.u.numel() == 0:
        return y, state
    call = Call(a)
    call.rows(u=a.u, delta=a.delta, z=a.z, y=y)
    passes.matrices(call, a)
    call.dense(last_state=state)
    threads, fast = plan.GENERAL_THREADS, plan.fast_step(a)
    lanes = min(32, _power_of_two(a.d_state))
    if fast:
        lanes = max(plan.ROWS_OF_BLOCK, _power_of_two(-(-a.d_state // plan.STATES_OF_LANE)))
    call.set(lanes=lanes)
    if fast:
        blocks_of_rows = -(-a.d_inner * lanes // threads)
        call.set(blocks_of_group=blocks_of_rows)
        call.launch(fast, blocks_of_rows * -(-a.batch // plan.ROWS_OF_BLOCK), threads, early=True)
    else:
        call.launch(
            plan.general("general_forward", "step", a.dtype), -(-a.batch * a.d_inner * lanes // threads), threads
        )
    return y, state


def _power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()


def _fast_forward(call: Call, layouts: plan.Layouts, dtype: torch.dtype, chunks: Chunks | None) -> None:
    channels = call["batch"] * call["channels"]
    device = nvrtc.device(call.index)
    layout, warps, split = plan.forward_plan(call["length"], channels, layouts.warps, dtype, call["states"], device)
    passes.set_split(call, split)
    if call["saved"]:
        nvrtc.prepare(plan.variants_of_training(layout, layouts, dtype, call["states"], split.n_chunks > 1), call.index)
    if chunks is not None:
        call.dense(chunk_states=chunks.states, chunk_decays=chunks.decays)
    elif split.n_chunks > 1:
        passes.scratch_of_chunks(call)
        passes.fast_scan(call, layout, warps, dtype, plan.SUMMARY, split.n_chunks - 1)
    passes.fast_scan(call, layout, warps, dtype, plan.FORWARD, split.n_chunks)


def _general_forward(call: Call) -> None:
    n_blocks = passes.blocks(call, 32)
    passes.split(call, n_blocks, 4)
    passes.scratch_of_chunks(call)
    if call["n_chunks"] > 1:
        passes.general_scan(call, plan.SUMMARY, n_blocks * (call["n_chunks"] - 1))
        passes.carry(call)
    passes.general_scan(call, plan.FORWARD, n_blocks * call["n_chunks"])


def _scratch_of_parts(call: Call, a: ScanArguments) -> None:
    """For sums over rows and chunks."""
    shape, n_parts = (call["states"], call["channels"]), call["n_parts"]
    call.scratch("dA_parts", n_parts, *shape)
    if a.D is not None:
        call.scratch("dD_parts", n_parts, call["channels"], dtype=real(call.dtype))
    if a.delta_bias is not None:
        call.scratch("dbias_parts", n_parts, call["channels"], dtype=real(call.dtype))


def _general_backward(call: Call, a: ScanArguments) -> None:
    n_blocks = passes.blocks(call, 32)
    passes.split(call, n_blocks, 4)
    passes.scratch_of_chunks(call)
    if call["n_chunks"] > 1:
        passes.general_scan(call, plan.REVERSE, n_blocks * (call["n_chunks"] - 1))
        passes.carry(call)
    _scratch_of_parts(call, a)
    n_tiles = plan.SAVED_EVERY // plan.general_tile(call.dtype)
    call.scratch("checkpoints", call["n_parts"], n_tiles, call["states"], call["channels"])
    for name, matrix in (("dB_parts", a.B), ("dC_parts", a.C)):
        if matrix.ndim == 4:
            call.scratch(name, n_blocks // a.batch, a.batch, a.length, a.d_state)
        else:
            call.scratch(name, call["n_parts"], call["states"], call["channels"])
    variant = plan.general("general_backward", "scan_backward", call.dtype)
    shared = plan.shared_of_general(call.dtype, backward=True)
    call.launch(variant, n_blocks * call["n_chunks"], plan.GENERAL_THREADS, shared)
    passes.between(call, "sum_blocks", a.batch * a.length * a.d_state * a.n_groups)
    passes.between(call, "sum_parts", (a.d_state + 2) * call["channels"])


def _fast_backward(
    call: Call, a: ScanArguments, layouts: plan.Layouts, dtype: torch.dtype, chunks: Chunks | None
) -> None:
    layout = layouts.backward
    has_phases = passes.split_backward(call, layout)
    n_blocks = passes.blocks(call, layout.block_channels)
    if chunks is not None:
        call.dense(chunk_states=chunks.states, chunk_decays=chunks.decays)
    elif has_phases:
        passes.scratch_of_chunks(call)
        passes.fast_scan(call, plan.WIDE, layouts.warps, dtype, plan.REVERSE, call["n_chunks"] - 1)
    _scratch_of_parts(call, a)
    n_pieces = -(-a.length // plan.SAVED_EVERY) * plan.SAVED_EVERY // layout.tokens
    n_units = a.batch * n_pieces * call["states"] * 2
    call.scratch("dB_parts", n_blocks // a.batch, n_units, layout.tokens)
    if call["states"] > plan.GROUP or call["chunk"] > plan.LONG:
        call.scratch("dA_of_warps", call["n_parts"], layout.warps, call["states"], call["channels"])
    shared = plan.shared_of_backward(layout, dtype, call["states"], layouts.ahead)
    variant = plan.fast_backward(layout, dtype, call["states"], layouts.ahead)
    call.launch(variant, n_blocks * call["n_chunks"], layout.threads, shared)
    threads = plan.SMALL_THREADS
    n_blocks = -(-n_units * a.n_groups // threads) + -(-(a.d_state + 2) * call["channels"] // threads)
    call.launch(variant._replace(kernel="sum_pieces"), n_blocks, threads)
