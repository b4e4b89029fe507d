"""Backward: states are recomputed block by block, from the last to the first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from anymamba.kernels.elementwise import SOFTPLUS_THRESHOLD, conj, expm1_ratio_derivative, real_part, sigmoid, silu
from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.kernels.selective_scan.portable.block import Expanded, Workspace, contract, expand
from anymamba.kernels.selective_scan.portable.inputs import Channels, Inputs, contiguous_like, prepare, write_channels
from anymamba.kernels.selective_scan.portable.plan import Plan, Sequences
from anymamba.kernels.selective_scan.portable.recurrence import fresh_steps, leaks, reverse_scan_, segment_decays
from anymamba.kernels.selective_scan.portable.splitting import Span


@dataclass
class _Gradients:
    """Gradients of the op's tensors. Those of constant matrices and vectors are summed in the order of the loop."""

    du: Tensor
    ddelta: Tensor
    dz: Tensor | None
    dB: Tensor
    dC: Tensor
    dA: Tensor
    dD: Tensor | None
    dbias: Tensor | None
    dinitial: Tensor | None


def backward(dy: Tensor, dlast_state: Tensor | None, a: ScanArguments, saved: Tensor) -> list[Tensor | None]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and initial_state (None for an input that is not given)."""
    inputs = prepare(a)
    packed = a.cu_seqlens is not None
    plan = Plan(a.batch, a.length, inputs, a.cu_seqlens)
    dlast = rearrange(
        a.state_gradient(dlast_state).to(inputs.dtype), "b (g p) n -> b g n p", g=inputs.n_groups
    ).contiguous()
    grads = _Gradients(
        du=contiguous_like(a.u),
        ddelta=contiguous_like(a.delta),
        dz=None if a.z is None else contiguous_like(a.z),
        dB=torch.zeros_like(inputs.B, memory_format=torch.contiguous_format),
        dC=torch.zeros_like(inputs.C, memory_format=torch.contiguous_format),
        dA=torch.zeros_like(inputs.A),
        dD=None if inputs.D is None else torch.zeros_like(inputs.D),
        dbias=None if inputs.delta_bias is None else torch.zeros_like(inputs.delta_bias),
        dinitial=None if a.initial_state is None else dlast.clone(),  # as an empty sequence needs it
    )
    scratch = Workspace(inputs.A)
    for rows in plan.row_slices:
        part = inputs if packed else inputs.rows(rows)
        dstate = torch.zeros_like(saved[0]) if packed else dlast[rows]
        for span in reversed(plan.spans):
            backward_span = _BackwardSpan(part, span, dy[rows], rows, grads, scratch)
            for k in reversed(range(span.n_blocks)):
                block = span.first_block + k
                dstate = backward_span.block(k, block, plan.sequences, saved[block, rows], dlast, dstate)
            backward_span.finish()
        if grads.dinitial is not None and not packed:
            grads.dinitial[rows] = dstate
    return _as_inputs(grads, a)


class _BackwardSpan:
    """Backward through one span: its blocks from the last to the first, then the tensors without a state dimension."""

    def __init__(
        self, inputs: Inputs, span: Span, dy: Tensor, rows: slice, grads: _Gradients, scratch: Workspace
    ) -> None:
        self.inputs, self.span, self.rows, self.grads, self.scratch = inputs, span, rows, grads, scratch
        self.c = Channels(inputs, span)
        self.dy = self.dy_scan = inputs.channels(dy, span)
        if self.c.gate is not None:
            self.dy_scan = self.dy * silu(self.c.gate)
            self.y = torch.empty_like(self.dy)  # before the gate
        self.ddrive, self.dstep = torch.empty_like(self.c.x), torch.empty_like(self.c.x)
        self.dB, self.dC = (self._matrix_buffer(M) for M in (inputs.B, inputs.C))

    def _matrix_buffer(self, M: Tensor) -> Tensor | None:
        """A buffer for the gradient of a selective B or C, (k, t, s, b, g, n, 1); None for a constant one."""
        if M.ndim == 3:
            return None
        return self.c.x.new_empty(*self.c.x.shape[:5], M.shape[-1], 1, dtype=self.inputs.dtype)

    def block(self, k: int, number: int, sequences: Sequences, before: Tensor, dlast: Tensor, dafter: Tensor) -> Tensor:
        """Gradients of block k. Takes d loss / d (state after the block), returns d loss / d (state before it)."""
        inputs, c, scratch = self.inputs, self.c, self.scratch
        e = expand(inputs, c, k, sequences, number, before, scratch)
        if c.gate is not None:
            self.y[k] = contract(c.C[k], e.h, scratch)
        dy_state = 2 * self.dy_scan[k] if inputs.dtype.is_complex else self.dy_scan[k]  # y is twice the real part

        def driven() -> Tensor:
            dh = scratch.product("dh", dy_state, conj(c.C[k]))
            if (ends := sequences.ends.get(number)) is not None:
                dh[ends.where] += dlast[ends.sequence][:, None]
            return dh

        starts = sequences.starts.get(number)
        dh, through = driven(), segment_decays(inputs.A, c.step[k], starts, reverse=True)
        dbefore = reverse_scan_(dh, e.decay, dafter, through)
        if starts is not None and leaks(dbefore):
            dh = driven()
            dbefore = reverse_scan_(dh, e.decay, dafter, through, fresh_steps(e.decay, starts))
        self._accumulate_matrix(self.dC, self.grads.dC, k, conj(e.h), dy_state)
        self._drive_backward(k, e, dh)
        dratio = None if e.ratio is None else dh * conj(c.B[k]) * c.drive[k]
        ddelta_A = self._decay_backward(sequences, number, e, dh, before)
        if dratio is not None and e.ratio is not None:
            ddelta_A += dratio * conj(expm1_ratio_derivative(c.step[k] * inputs.A, e.ratio))
        self.dstep[k] = real_part(scratch.product("product", ddelta_A, conj(inputs.A)).sum(-2, keepdim=True))
        self.grads.dA += scratch.product("product", ddelta_A, c.step[k]).sum((0, 1, 2))
        return dbefore

    def finish(self) -> None:
        """Gradients of u, delta, z, D and delta_bias."""
        inputs, c, grads = self.inputs, self.c, self.grads
        if c.gate is not None and grads.dz is not None:
            y = self.y if inputs.D is None else self.y.addcmul_(inputs.D, c.x)
            gate = sigmoid(c.gate)
            dgate = (1 - gate).mul_(c.gate).add_(1).mul_(gate).mul_(y).mul_(self.dy)
            write_channels(grads.dz[self.rows], self.span, dgate)
        du = self.ddrive * c.step
        if inputs.D is not None and grads.dD is not None:
            du.addcmul_(inputs.D, self.dy_scan)
            grads.dD += (self.dy_scan * c.x).sum((0, 1, 2, 3))
        write_channels(grads.du[self.rows], self.span, du)
        draw = self.dstep.addcmul_(self.ddrive, c.x)
        if inputs.delta_softplus:
            draw = torch.where(c.raw > SOFTPLUS_THRESHOLD, draw, draw * sigmoid(c.raw))
        if grads.dbias is not None:
            grads.dbias += draw.sum((0, 1, 2, 3))
        write_channels(grads.ddelta[self.rows], self.span, draw)
        for target, values in ((grads.dB, self.dB), (grads.dC, self.dC)):
            if values is not None:
                target[self.rows, self.span.tokens] = rearrange(values, "k t s b g n 1 -> b (k s t) g n")

    def _drive_backward(self, k: int, e: Expanded, dh: Tensor) -> None:
        """Backward through ratio B (Δ u): the gradients of Δ u and of B."""
        B = conj(self.c.B[k])
        weighted = dh if e.ratio is None else dh * conj(e.ratio)
        self._accumulate_matrix(self.dB, self.grads.dB, k, weighted, self.c.drive[k])
        if B.ndim == 3:
            ddrive = self.scratch.product("product", weighted, B).sum(-2, keepdim=True)
        else:
            ddrive = torch.matmul(B.transpose(-1, -2), weighted)
        self.ddrive[k] = real_part(ddrive)

    def _decay_backward(self, sequences: Sequences, number: int, e: Expanded, dh: Tensor, before: Tensor) -> Tensor:
        """d loss / d (Δ A) through the decay, whose buffer it reuses; also the gradients of packed initial states."""
        ddelta_A = conj(e.decay).mul_(dh)
        h = conj(e.h)
        ddelta_A[1:].mul_(h[:-1])
        ddelta_A[0, 1:].mul_(h[-1, :-1])
        ddelta_A[0, 0].mul_(conj(before))
        starts, initial_state = sequences.starts.get(number), self.inputs.initial_state
        if starts is not None:
            ddelta_A[starts.where] = 0  # already 0, unless the sequence before ends in a NaN
            if e.start_decay is not None and initial_state is not None and self.grads.dinitial is not None:
                dinitial = dh[starts.where] * conj(e.start_decay)
                self.grads.dinitial[starts.sequence] = dinitial[:, 0]
                ddelta_A[starts.where] = dinitial * conj(initial_state[starts.sequence][:, None])
        return ddelta_A

    def _accumulate_matrix(
        self, gathered: Tensor | None, total: Tensor, k: int, states: Tensor, channels: Tensor
    ) -> None:
        """Gradient of B or C from (t, s, b, g, n, p) and (t, s, b, g, 1, p), summed over p for a selective one and
        over time and rows for a constant one."""
        if gathered is None:
            total += self.scratch.product("product", states, channels).sum((0, 1, 2))
        else:
            gathered[k] = torch.matmul(states, channels.to(states.dtype).transpose(-1, -2))


def _as_inputs(grads: _Gradients, a: ScanArguments) -> list[Tensor | None]:
    """The gradients in the shapes and dtypes of the op's tensors."""

    def matrix(gradient: Tensor, like: Tensor) -> Tensor:
        return rearrange(gradient, "g n p -> (g p) n").to(like.dtype).contiguous() if like.ndim == 2 else gradient

    def vector(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if gradient is None or like is None else gradient.reshape(-1).to(like.dtype)

    dinitial = grads.dinitial
    if dinitial is not None and a.initial_state is not None:
        dinitial = rearrange(dinitial, "b g n p -> b (g p) n").to(a.initial_state.dtype).contiguous()
    return [
        grads.du,
        grads.ddelta,
        matrix(grads.dA, a.A),
        matrix(grads.dB, a.B),
        matrix(grads.dC, a.C),
        vector(grads.dD, a.D),
        grads.dz,
        vector(grads.dbias, a.delta_bias),
        dinitial,
    ]
