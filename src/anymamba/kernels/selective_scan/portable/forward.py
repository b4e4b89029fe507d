"""Forward: y, the last state, and the state before each block."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from anymamba.kernels.elementwise import silu
from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.kernels.selective_scan.portable.block import Workspace, contract, expand
from anymamba.kernels.selective_scan.portable.inputs import Channels, Inputs, contiguous_like, prepare, write_channels
from anymamba.kernels.selective_scan.portable.plan import Plan
from anymamba.kernels.selective_scan.portable.splitting import saved_shape


def forward(a: ScanArguments, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, d), last_state (n_sequences, d, n), and the states before each block for backward, empty unless save."""
    inputs = prepare(a)
    batch, packed = a.batch, a.cu_seqlens is not None
    plan = Plan(batch, a.length, inputs, a.cu_seqlens)
    y = contiguous_like(a.u)
    saved = inputs.A.new_empty(saved_shape(a) if save else 0)
    saved[sum(span.n_blocks for span in plan.spans) :] = 0
    last_state = inputs.A.new_zeros(a.n_sequences, *inputs.A.shape)
    if inputs.initial_state is not None:
        last_state.copy_(inputs.initial_state)
    scratch = Workspace(inputs.A)
    for rows in plan.row_slices:
        part = inputs if packed else inputs.rows(rows)
        state = inputs.A.new_zeros(batch, *inputs.A.shape) if packed else last_state[rows]
        for span in plan.spans:
            c = Channels(part, span)
            y_span = torch.empty_like(c.x)
            for k, block in enumerate(range(span.first_block, span.first_block + span.n_blocks)):
                if save:
                    saved[block, rows] = state
                e = expand(part, c, k, plan.sequences, block, state, scratch)
                y_span[k] = contract(c.C[k], e.h, scratch)
                state = e.last
                if (ends := plan.sequences.ends.get(block)) is not None:
                    last_state[ends.sequence] = e.h[ends.where][:, 0]
            write_channels(y[rows], span, _output_(part, c, y_span))
        if not packed:
            last_state[rows] = state
    return y, rearrange(last_state, "b g n p -> b (g p) n").contiguous(), saved


def _output_(inputs: Inputs, c: Channels, y: Tensor) -> Tensor:
    """Apply the skip and the gate in place."""
    if inputs.D is not None:
        y.addcmul_(inputs.D, c.x)
    if c.gate is not None:
        y.mul_(silu(c.gate))
    return y
