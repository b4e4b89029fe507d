"""Only the states that leave a row at its end, or their gradients at its start; for sequences spread over processes.

These are the first phases of a scan in chunks of time, for all chunks. `begin` and `begin_reverse` choose the chunks of
`forward` and `backward`, whose second phases are `finish` and `finish_reverse`. In between, `with_arrival` makes what
leaves the chunks right for what arrives at the row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymamba.kernels.elementwise import sum_of_steps
from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.kernels.selective_scan.cuda import passes, plan
from anymamba.kernels.selective_scan.cuda.call import Call
from anymamba.runtimes import nvrtc
from anymamba.runtimes.launching import resolved
from anymamba.runtimes.replaying import replayed


class Chunks(NamedTuple):
    """What the first phase finds of each chunk: (batch, chunks, padded states, padded channels)."""

    states: Tensor
    """What leaves it if nothing arrives at the row."""
    decays: Tensor
    """What an arrival is multiplied with on its way through."""
    length: int
    """Tokens of a chunk."""


def summary(a: ScanArguments) -> tuple[Tensor, Tensor]:
    """The state (b, d, n) after the last token of each row, and the sum of the row's steps (b, d).

    In a packed row the sum is that of the row's steps only if the row has one sequence.
    """
    return begin(a)[:2]


def begin(a: ScanArguments) -> tuple[Tensor, Tensor, Chunks | None]:
    """What `summary` returns, and the chunks for `finish`, if the scan has two phases."""
    a = passes.with_aligned_matrices(a._replace(z=None, D=None))
    leaving, steps, *chunks = replayed("scan begin", a.tensors, a.options, lambda: _begin(a))
    if steps is None:
        return leaving, sum_of_steps(a.delta, a.delta_bias, a.delta_softplus, a.real_dtype), None
    of_groups = steps.sum(1).unflatten(1, (a.n_groups, -1))[..., : a.d_inner // a.n_groups]
    return leaving, of_groups.flatten(1), Chunks(*chunks) if chunks else None


def _begin(a: ScanArguments) -> list[Any]:
    """What leaves each row, the sum of the steps of each chunk (nothing from the general kernels), and the fields of
    Chunks, if there are two phases."""
    layouts = plan.layouts(a)
    call, dtype = passes.start(a, layouts)
    if layouts is None:
        _general(call, plan.SUMMARY)
        return [_leaving(call, a), None]
    channels, device = call["batch"] * call["channels"], nvrtc.device(call.index)
    layout, warps, split = plan.forward_plan(call["length"], channels, layouts.warps, dtype, call["states"], device)
    has_phases = split.n_chunks > 1
    if has_phases:
        passes.set_split(call, split)
    else:
        layout, warps = plan.WIDE, layouts.warps
        _split_alone(call, plan.WIDE.block_channels, plan.WIDE.blocks)
    states, decays = passes.scratch_of_chunks(call)
    steps = call.scratch("chunk_steps", call["batch"], call["n_chunks"], call["channels"])
    passes.fast_scan(call, layout, warps, dtype, plan.SUMMARY, call["n_chunks"])
    return [_leaving(call, a), steps, *((states, decays, call["chunk"]) if has_phases else ())]


def reverse_summary(dy: Tensor, dlast_state: Tensor, a: ScanArguments) -> Tensor:
    """The gradient of the state (b, d, n) before the first token of each row."""
    return begin_reverse(dy, dlast_state, a)[0]


def begin_reverse(dy: Tensor, dlast_state: Tensor | None, a: ScanArguments) -> tuple[Tensor, Chunks | None]:
    """What `reverse_summary` returns, and the chunks for `finish_reverse`, if the pass has two phases."""
    dy, dlast_state = resolved(dy), resolved(dlast_state)
    a = passes.with_aligned_matrices(a)
    tensors = (dy, dlast_state, *a.tensors)
    leaving, *chunks = replayed("scan begin reverse", tensors, a.options, lambda: _begin_reverse(dy, dlast_state, a))
    return leaving, Chunks(*chunks) if chunks else None


def _begin_reverse(dy: Tensor, dlast_state: Tensor | None, a: ScanArguments) -> list[Any]:
    """What leaves each row, and the fields of Chunks, if there are two phases."""
    layouts = plan.layouts(a)
    call, dtype = passes.start(a, layouts)
    call.rows(dy=dy.to(dtype))
    call.states(dlast_state=dlast_state)
    call.set(first_chunk=0)
    if layouts is None:
        _general(call, plan.REVERSE)
        return [_leaving(call, a)]
    has_phases = passes.split_backward(call, layouts.backward)
    if not has_phases:
        _split_alone(call, plan.WIDE.block_channels, plan.WIDE.blocks)
    states, decays = passes.scratch_of_chunks(call)
    passes.fast_scan(call, plan.WIDE, layouts.warps, dtype, plan.REVERSE, call["n_chunks"])
    return [_leaving(call, a), *((states, decays, call["chunk"]) if has_phases else ())]


def with_arrival(chunks: Chunks, arriving: Tensor, a: ScanArguments, *, reverse: bool) -> Chunks:
    """The chunks where `arriving` (b, d, n) arrives at the row's beginning, or at its end in reverse.

    It passes through the first chunk on the way unless one of the packed sequences ends in it. Writes to the chunks.
    """
    n, n_chunks, per_group = (-1 if reverse else 0), chunks.states.shape[1], a.d_inner // a.n_groups
    rows = arriving.to(chunks.states.dtype).mT.unflatten(2, (a.n_groups, per_group))
    if a.cu_seqlens is not None:
        begin = (n_chunks - 1) * chunks.length if reverse else 0
        inside = (a.cu_seqlens > begin) & (a.cu_seqlens < min(a.length, begin + chunks.length))
        rows = torch.where(inside.any(), 0, rows)
    leaving, decays = (  # (b, n, groups, channels of a group), without padding
        t[:, n, : a.d_state].unflatten(2, (a.n_groups, -1))[..., :per_group] for t in chunks[:2]
    )
    leaving.addcmul_(decays, rows)
    return chunks


def _split_alone(call: Call, block_channels: int, blocks: int) -> None:
    """Chunks for a first phase that no second one follows."""
    passes.split(call, passes.blocks(call, block_channels), blocks, summary=0)


def _general(call: Call, passage: int) -> None:
    _split_alone(call, 32, 4)
    passes.scratch_of_chunks(call)
    passes.general_scan(call, passage, passes.blocks(call, 32) * call["n_chunks"])


def _leaving(call: Call, a: ScanArguments) -> Tensor:
    """What leaves each row, (b, d, n)."""
    leaving = call.scratch("leaving", a.batch, a.d_inner, a.d_state)
    passes.between(call, "leave", call["batch"] * call["states"] * call["channels"])
    return leaving
