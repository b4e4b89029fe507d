"""Only the states that leave a row at its end, or their gradients at its start; for sequences spread over processes.

These are the first phases of a scan in chunks of time, for all chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.kernels.elementwise import sum_of_steps
from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.kernels.selective_scan.chunks import leaving_row
from anymamba.kernels.selective_scan.cuda import passes, plan
from anymamba.kernels.selective_scan.cuda.call import Call


def summary(a: ScanArguments) -> tuple[Tensor, Tensor]:
    """The state (b, d, n) after the last token of each row, and the sum of the row's steps (b, d)."""
    steps = sum_of_steps(a.delta, a.delta_bias, a.delta_softplus, a.real_dtype)
    layouts = plan.layouts(a)
    call, dtype = passes.start(a._replace(z=None, D=None), layouts)
    return _leaving(call, a, layouts, dtype, plan.SUMMARY), steps


def reverse_summary(dy: Tensor, dlast_state: Tensor, a: ScanArguments) -> Tensor:
    """The gradient of the state (b, d, n) before the first token of each row."""
    dy, dlast_state = (t.resolve_conj().resolve_neg() for t in (dy, dlast_state))
    layouts = plan.layouts(a)
    call, dtype = passes.start(a, layouts)
    call.rows(dy=dy.to(dtype))
    call.states(dlast_state=dlast_state)
    call.set(first_chunk=0)
    return _leaving(call, a, layouts, dtype, plan.REVERSE)


def _leaving(call: Call, a: ScanArguments, layouts: plan.Layouts | None, dtype: torch.dtype, passage: int) -> Tensor:
    """What leaves each row, (b, d, n)."""
    n_blocks = passes.blocks(call, plan.WIDE.block_channels if layouts else 32)
    passes.split(call, n_blocks, plan.WIDE.blocks if layouts else 4, summary=0)
    n_chunks = call["n_chunks"]
    leaving, decays = passes.scratch_of_chunks(call)
    if layouts:
        passes.fast_scan(call, plan.WIDE, layouts.warps, dtype, passage, n_chunks)
    else:
        passes.general_scan(call, passage, n_blocks * n_chunks)
    states = leaving_row(leaving, decays, a, call["chunk"], reverse=passage == plan.REVERSE)
    groups = states[:, : a.d_state].unflatten(2, (a.n_groups, call.padded))[..., : call.per_group]
    return groups.flatten(2).mT.contiguous()
