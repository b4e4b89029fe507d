"""Launch the passes over time that forward, backward and summaries share."""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.kernels.selective_scan.cuda import plan
from anymamba.kernels.selective_scan.cuda.call import Call
from anymamba.runtimes import nvrtc
from anymamba.runtimes.launching import aligned


def start(a: ScanArguments, layouts: plan.Layouts | None) -> tuple[Call, torch.dtype]:
    """A call with the op's inputs, and the dtype in which kernels write tokens."""
    call = Call(a)
    dtype = plan.element(a) if layouts else a.u.dtype
    tensors = {"u": a.u, "delta": a.delta, "z": a.z}
    call.rows(**{k: t if t is None or not layouts else t.to(dtype) for k, t in tensors.items()})
    matrices(call, a, dtype if layouts else None)
    call.set(states=plan.padded_states(a, layouts))
    if a.cu_seqlens is not None:
        offsets = a.cu_seqlens.to(torch.int64).cummax(0).values
        call.dense(offsets=offsets)
        call.scratch("sequence_of", a.length, dtype=torch.int32)
        between(call, "find_sequences", a.length)
    return call, dtype


def matrices(call: Call, a: ScanArguments, dtype: torch.dtype | None = None) -> None:
    """B, C, and what has no time; `dtype` is that of the fast kernels."""
    for name, matrix in (("B", a.B), ("C", a.C)):
        if matrix.ndim == 4:
            if dtype is not None:
                matrix = _aligned(matrix.to(dtype))
            call.rows(**{name: matrix})
        else:
            call.states(**{f"constant_{name}": matrix})
    call.states(A=a.A, initial_state=a.initial_state)
    call.vectors(D=a.D, delta_bias=a.delta_bias)


def with_aligned_matrices(a: ScanArguments) -> ScanArguments:
    """The arguments with B and C as the fast kernels take them: tokens begin at multiples of 16 bytes.

    They are slices of a product (dt_rank + 2 d_state columns, 44 for a d_model of 192), a fraction of u, and a scan
    takes 3 times as long without.
    """
    B, C = (_aligned(M) if M.ndim == 4 and M.dtype in plan.FAST_DTYPES else M for M in (a.B, a.C))
    return a if B is a.B and C is a.C else a._replace(B=B, C=C)


def _aligned(matrix: Tensor) -> Tensor:
    return matrix if aligned(matrix, 16 // matrix.dtype.itemsize) else matrix.contiguous()


def between(call: Call, kernel: str, n_threads: int) -> None:
    threads = plan.SMALL_THREADS
    call.launch(plan.general("between", kernel, call.dtype), -(-n_threads // threads), threads)


def blocks(call: Call, block_channels: int) -> int:
    """Set and return how many blocks of channels there are, of all rows."""
    blocks_of_group = call.padded // block_channels
    call.set(blocks_of_group=blocks_of_group)
    return call["batch"] * call["n_groups"] * blocks_of_group


def split(call: Call, n_blocks: int, held: int, summary: float = 0.5) -> None:
    """Decide on chunks of time; a multiprocessor holds so many blocks."""
    machine = plan.Machine(nvrtc.device(call.index).n_multiprocessors, held, summary=summary)
    set_split(call, plan.split(call["length"], n_blocks, machine))


def split_backward(call: Call, layout: plan.Layout) -> bool:
    """Decide on the chunks of the fast backward scan; whether it has a first phase."""
    split(call, blocks(call, layout.block_channels), layout.blocks, plan.SUMMARY_BACKWARD)
    return call["n_chunks"] > 1


def set_split(call: Call, split: plan.Split) -> None:
    call.set(chunk=split.chunk, n_chunks=split.n_chunks, n_parts=call["batch"] * split.n_chunks)


def scratch_of_chunks(call: Call) -> tuple[Tensor, Tensor]:
    """What leaves each chunk, and the decay of what arrives at it: (batch, chunks, padded states, padded channels)."""
    shape = (call["batch"], call["n_chunks"], call["states"], call["channels"])
    return call.scratch("chunk_states", *shape), call.scratch("chunk_decays", *shape)


def carry(call: Call) -> None:
    between(call, "carry", call["batch"] * call["states"] * call["channels"])


def fast_scan(call: Call, layout: plan.Layout, warps: int, dtype: torch.dtype, passage: int, n_chunks: int) -> None:
    n_blocks = blocks(call, layout.block_channels)
    call.set(passage=passage)
    shared = plan.shared_of_forward(layout, warps, dtype, call["states"], passage)
    call.launch(plan.fast_forward(layout, dtype, call["states"], passage), n_blocks * n_chunks, 32 * warps, shared)


def general_scan(call: Call, passage: int, n_blocks: int) -> None:
    call.set(passage=passage)
    variant = plan.general("general_forward", "scan", call.dtype)
    call.launch(variant, n_blocks, plan.GENERAL_THREADS, plan.shared_of_general(call.dtype, backward=False))
