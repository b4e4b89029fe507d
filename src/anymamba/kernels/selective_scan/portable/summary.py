"""Only the states that leave a row at its end, or their gradients at its start; for sequences spread over processes."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from anymamba.kernels.elementwise import conj, silu, sum_of_steps
from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.kernels.selective_scan.portable.block import Workspace, expand
from anymamba.kernels.selective_scan.portable.inputs import Channels, prepare
from anymamba.kernels.selective_scan.portable.plan import Plan
from anymamba.kernels.selective_scan.portable.recurrence import reverse_scan_, segment_decays


def summary(a: ScanArguments) -> tuple[Tensor, Tensor]:
    """The state (b, d, n) after the last token of each row, and the sum of the row's steps (b, d)."""
    steps = sum_of_steps(a.delta, a.delta_bias, a.delta_softplus, a.real_dtype)
    if a.cu_seqlens is not None:
        a = a.of_sequence(*a.range_of(a.length - 1))
    inputs = prepare(a._replace(C=a.B, D=None, z=None))
    plan, scratch = Plan(a.batch, a.length, inputs, None), Workspace(inputs.A)
    states = inputs.A.new_zeros(a.batch, *inputs.A.shape)
    if inputs.initial_state is not None:
        states.copy_(inputs.initial_state)
    for rows in plan.row_slices:
        part, state = inputs.rows(rows), states[rows]
        for span in plan.spans:
            c = Channels(part, span)
            for k in range(span.n_blocks):
                state = expand(part, c, k, plan.sequences, span.first_block + k, state, scratch).last
        states[rows] = state
    return rearrange(states, "b g n p -> b (g p) n").contiguous(), steps


def reverse_summary(dy: Tensor, dlast_state: Tensor, a: ScanArguments) -> Tensor:
    """The gradient of the state (b, d, n) before the first token of each row."""
    if a.cu_seqlens is not None:
        index, start, stop = a.range_of(0)
        a, dy, dlast_state = a.of_sequence(index, start, stop), dy[:, start:stop], dlast_state[index : index + 1]
    inputs = prepare(a._replace(B=a.C, D=None, initial_state=None))
    plan, scratch = Plan(a.batch, a.length, inputs, None), Workspace(inputs.A)
    gradients = rearrange(dlast_state.to(inputs.dtype), "b (g p) n -> b g n p", g=inputs.n_groups).clone()
    for rows in plan.row_slices:
        part, dstate = inputs.rows(rows), gradients[rows]
        for span in reversed(plan.spans):
            c = Channels(part, span)
            dy_scan = part.channels(dy[rows], span)
            if c.gate is not None:
                dy_scan = dy_scan * silu(c.gate)
            if inputs.dtype.is_complex:
                dy_scan = 2 * dy_scan  # y is twice the real part
            for k in reversed(range(span.n_blocks)):
                decay = scratch.product("decay", c.step[k], part.A).exp_()
                dh = scratch.product("dh", dy_scan[k], conj(c.C[k]))
                dstate = reverse_scan_(dh, decay, dstate, segment_decays(part.A, c.step[k], None, reverse=True))
        gradients[rows] = dstate
    return rearrange(gradients, "b g n p -> b (g p) n").contiguous()
