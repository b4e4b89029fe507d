"""The selective scan in plain PyTorch, chunked: the fallback on every device, and the fastest that PyTorch alone gives.

Notation. Time is cut into blocks of n_segments x n_steps tokens. Inside a block every expanded tensor is
(t, s, b, g, n, p): t steps, s segments of the block, b rows, g groups, n state, p channels of a group. Channels are last, so
that every operation runs along contiguous memory, and the recurrence is one fused multiply-add per step over all
segments, rows, states and channels. The segments of a block (more than one only where a row alone is too
narrow to keep a step busy) are scanned side by side from zero and joined by their running products of decays.

Only one block's expanded tensors exist at a time. Forward saves the state at the start of each block, backward
recomputes the states inside it. The split depends on shapes only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

NAME = "portable"

SLAB = (
    8192  # elements of one step below which a row's time is cut into segments: a step then costs its call, not its work
)
BLOCK = 1 << 19  # elements of an expanded tensor: a few of them fit the second-level caches
SERIES_TERMS = 14  # of the series of (exp(x) - 1) / x for |x| < 1/2: exact to float64


# ------------------------------------------------------------------------------------------------- how work is split


def split(batch: int, d_inner: int, d_state: int) -> tuple[int, int]:
    """(n_segments, n_steps) of a block; saved states cost d_state / (n_segments n_steps) of u."""
    n_steps = 16 if d_state <= 16 else 32
    if batch != 1:
        return 1, n_steps
    n_segments = 1
    while n_segments < 32 and 2 * n_segments * d_inner * d_state <= SLAB:
        n_segments *= 2
    return n_segments, n_steps


def n_saved_states(length: int, batch: int, d_inner: int, d_state: int) -> int:
    """How many states forward saves for backward (the last two may stay unused)."""
    n_segments, n_steps = split(batch, d_inner, d_state)
    return length // (n_segments * n_steps) + 2


class _Block(NamedTuple):
    start: int
    n_segments: int
    n_steps: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.n_segments * self.n_steps)


def _blocks(length: int, n_segments: int, n_steps: int) -> list[_Block]:
    """Whole blocks, then one of the whole segments that are left, then one of the steps that are left."""
    whole, rest = divmod(length, n_segments * n_steps)
    blocks = [_Block(i * n_segments * n_steps, n_segments, n_steps) for i in range(whole)]
    if rest >= n_steps:
        blocks.append(_Block(length - rest, rest // n_steps, n_steps))
    if rest % n_steps:
        blocks.append(_Block(length - rest % n_steps, 1, rest % n_steps))
    return blocks


# ------------------------------------------------------------------------------------------------- the scan's inputs


@dataclass(frozen=True)
class _Inputs:
    """The op's tensors for some rows of the batch; A, constant B and C as (g, n, p), vectors as (g, 1, p)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    zoh: bool
    initial_state: Tensor | None  # (rows or sequences, g, n, p)
    n_groups: int
    real: torch.dtype
    dtype: torch.dtype

    def rows(self, rows: slice) -> _Inputs:
        """The same for a slice of the batch."""

        def cut(M: Tensor) -> Tensor:
            return M if M.ndim == 3 else M[rows]

        return replace(
            self,
            u=self.u[rows],
            delta=self.delta[rows],
            B=cut(self.B),
            C=cut(self.C),
            z=None if self.z is None else self.z[rows],
            initial_state=None if self.initial_state is None else self.initial_state[rows],
        )

    def channels(self, x: Tensor, block: _Block) -> Tensor:
        """A block of (b, l, d) as (t, s, b, g, 1, p) in the working precision."""
        x = rearrange(x[:, block.tokens], "b (s t) (g p) -> t s b g 1 p", s=block.n_segments, g=self.n_groups)
        return x.to(self.real)

    def states(self, M: Tensor, block: _Block) -> Tensor:
        """A block of B or C as (t, s, b, g, n, 1), or (g, n, p) where it is constant."""
        if M.ndim == 3:
            return M
        return rearrange(M[:, block.tokens], "b (s t) g n -> t s b g n 1", s=block.n_segments).to(self.dtype)

    def step_size(self, block: _Block) -> tuple[Tensor, Tensor]:
        """Δ before and after the softplus, (t, s, b, g, 1, p)."""
        raw = self.channels(self.delta, block)
        if self.delta_bias is not None:
            raw = raw + self.delta_bias
        return raw, F.softplus(raw) if self.delta_softplus else raw


def _prepare(
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
) -> _Inputs:
    real, dtype = working_dtypes(u, delta, A)
    n_groups = next((M.shape[2] for M in (B, C) if M.ndim == 4), 1)

    def per_group(M: Tensor) -> Tensor:
        return rearrange(M.to(dtype), "(g p) n -> g n p", g=n_groups).contiguous()

    def vector(v: Tensor | None) -> Tensor | None:
        return None if v is None else rearrange(v.to(real), "(g p) -> g 1 p", g=n_groups)

    state = initial_state
    if state is not None:
        state = rearrange(state.to(dtype), "b (g p) n -> b g n p", g=n_groups).contiguous()
    B, C = (per_group(M) if M.ndim == 2 else M for M in (B, C))
    return _Inputs(
        u,
        delta,
        per_group(A),
        B,
        C,
        vector(D),
        z,
        vector(delta_bias),
        delta_softplus,
        b_discretization == "zoh",
        state,
        n_groups,
        real,
        dtype,
    )


def working_dtypes(u: Tensor, delta: Tensor, A: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Real and state dtype: float32 or wider, complex where A is."""
    real = torch.promote_types(torch.float32, torch.promote_types(u.dtype, delta.dtype))
    real = torch.promote_types(real, A.dtype.to_real())
    return real, torch.promote_types(real, A.dtype)


# ------------------------------------------------------------------------------------------------- packed sequences


class _Sequences:
    """Where packed sequences start and end, block by block, as index tensors. Empty sequences have neither."""

    def __init__(self, cu_seqlens: Tensor | None, blocks: list[_Block]) -> None:
        self.n_sequences = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
        self.starts, self.ends = [], []
        if cu_seqlens is not None:
            borders = cu_seqlens.long()
            filled = (borders[1:] > borders[:-1]).nonzero().flatten()
            self.starts = self._by_block(borders[filled], filled, blocks)
            self.ends = self._by_block(borders[filled + 1] - 1, filled, blocks)

    @staticmethod
    def _by_block(
        positions: Tensor, sequence: Tensor, blocks: list[_Block]
    ) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
        """For each block ((step, segment), sequence) of the positions that lie in it."""
        cuts = torch.searchsorted(positions, torch.tensor([b.start for b in blocks], device=positions.device)).tolist()
        parts = []
        for block, low, high in zip(blocks, cuts, [*cuts[1:], positions.numel()], strict=True):
            offset = positions[low:high] - block.start
            where = (offset % block.n_steps, offset // block.n_steps)
            parts.append((where, sequence[low:high]))
        return parts


# ------------------------------------------------------------------------------------------------- one block


class _Workspace:
    """Named scratch buffers that every block reuses: fresh large tensors would cost more in page faults than in work."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a * b in the buffer of that name."""
        shape = torch.broadcast_shapes(a.shape, b.shape)
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self._like.new_empty(size)
        return torch.mul(a, b, out=self._buffers[name][:size].view(shape))


def expm1_ratio(x: Tensor) -> Tensor:
    """(exp(x) - 1) / x and its limit 1 at 0, by a series near zero."""
    near = x.abs() < 0.5
    small = torch.where(near, x, 0)
    series = torch.zeros_like(x)
    for k in range(SERIES_TERMS, 0, -1):
        series.add_(1).mul_(small).div_(k + 1)
    large = torch.where(near, 1, x)
    quotient = torch.exp(large).sub_(1) if x.is_complex() else torch.expm1(large)
    return torch.where(near, series.add_(1), quotient.div_(large))


def expm1_ratio_derivative(x: Tensor, ratio: Tensor) -> Tensor:
    """Derivative of `expm1_ratio`, (exp(x) - ratio) / x, by the series sum (k+1) x^k / (k+2)! near zero."""
    near = x.abs() < 0.5
    small = torch.where(near, x, 0)
    series = torch.zeros_like(x)
    for k in range(SERIES_TERMS, 0, -1):  # term k over term k - 1 is x (k + 1) / (k (k + 2))
        series.add_(1).mul_(small).mul_((k + 1) / (k * (k + 2)))
    large = torch.where(near, 1, x)
    return torch.where(near, series.add_(1).mul_(0.5), torch.exp(large).sub_(ratio).div_(large))


def scan_(x: list[Tensor], coefficient: list[Tensor], carry: Tensor, *, reverse_segments: bool) -> Tensor:
    """In place x[i] += coefficient[i] * x[i - 1] in the order of the lists, the first one from the carry.

    Args:
        x, coefficient: one (s, ...) slab a step. Segments follow one another in the order of s, or against it.
        carry: (...) the value before the first step of the first segment.
    Returns the value after the last step of the last segment.
    """
    if x[0].shape[0] == 1:
        previous = carry[None]
        for value, factor in zip(x, coefficient, strict=True):
            previous = value.addcmul_(factor, previous)
        return previous[0].clone()  # x is a buffer that the next block reuses
    product = [coefficient[0]]
    for i in range(1, len(x)):
        x[i].addcmul_(coefficient[i], x[i - 1])
        product.append(product[-1] * coefficient[i])
    incoming = torch.empty_like(x[0])
    order = range(x[0].shape[0])
    for s in reversed(order) if reverse_segments else order:
        incoming[s] = carry
        carry = torch.addcmul(x[-1][s], product[-1][s], carry)
    for value, factor in zip(x, product, strict=True):
        value.addcmul_(factor, incoming)
    return carry


class _Expanded(NamedTuple):
    """What one block of the scan holds, each (t, s, b, g, n, p) unless said otherwise."""

    raw: Tensor  # Δ before the softplus (t, s, b, g, 1, p)
    step: Tensor  # Δ (t, s, b, g, 1, p)
    x: Tensor  # u (t, s, b, g, 1, p)
    B: Tensor
    C: Tensor
    decay: Tensor  # exp(Δ A), 0 where a packed sequence starts
    start_decay: Tensor  # exp(Δ A) where packed sequences start (k, b, g, n, p)
    ratio: Tensor | None  # (exp(Δ A) - 1) / (Δ A) under zero-order hold
    h: Tensor


def _expand(
    inputs: _Inputs, block: _Block, sequences: _Sequences, index: int, carry: Tensor, scratch: _Workspace
) -> tuple[_Expanded, Tensor]:
    """The states of a block from the state before it; returns them and the state after it."""
    raw, step = inputs.step_size(block)
    x = inputs.channels(inputs.u, block)
    B, C = inputs.states(inputs.B, block), inputs.states(inputs.C, block)
    delta_A = scratch.product("decay", step, inputs.A)
    ratio = expm1_ratio(delta_A) if inputs.zoh else None
    decay = delta_A.exp_()
    h = scratch.product("h", step * x, B)
    if ratio is not None:
        h.mul_(ratio)
    start_decay = decay[:0, 0]
    if sequences.starts:
        where, sequence = sequences.starts[index]
        start_decay = decay[where]
        if inputs.initial_state is not None:
            h[where] += start_decay * inputs.initial_state[sequence][:, None]
        decay[where] = 0
    carry = scan_(list(h), list(decay), carry, reverse_segments=False)
    return _Expanded(raw, step, x, B, C, decay, start_decay, ratio, h), carry


def _contract(M: Tensor, h: Tensor) -> Tensor:
    """sum over n of M h: (t, s, b, g, 1, p), doubled real part for complex."""
    y = (M * h).sum(-2, keepdim=True) if M.ndim == 3 else torch.matmul(M.transpose(-1, -2), h)
    return y.real * 2 if y.is_complex() else y


# ------------------------------------------------------------------------------------------------- forward


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
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, d), last_state (b or n_sequences, d, n), and the states before each block (blocks, b, g, n, p)."""
    inputs = _prepare(u, delta, A, B, C, D, z, delta_bias, delta_softplus, b_discretization, initial_state)
    batch, length, d_inner = u.shape
    n_segments, n_steps = split(batch, d_inner, A.shape[1])
    blocks = _blocks(length, n_segments, n_steps)
    sequences = _Sequences(cu_seqlens, blocks)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    n_saved = n_saved_states(length, batch, d_inner, A.shape[1])
    saved = inputs.A.new_empty(n_saved, batch, *inputs.A.shape)
    last_state = _first_state(inputs, batch if cu_seqlens is None else sequences.n_sequences).clone()
    saved[len(blocks) :] = 0
    scratch = _Workspace(inputs.A)
    for rows in _row_slices(batch, n_segments * n_steps * inputs.A.numel()):
        part = inputs.rows(rows) if cu_seqlens is None else inputs
        carry = last_state[rows] if cu_seqlens is None else torch.zeros_like(saved[0])
        for i, block in enumerate(blocks):
            saved[i, rows] = carry
            expanded, carry = _expand(part, block, sequences, i, carry, scratch)
            _write_channels(y[rows], block, _output(part, block, expanded))
            if sequences.ends:
                where, sequence = sequences.ends[i]
                last_state[sequence] = expanded.h[where][:, 0]
        if cu_seqlens is None:
            last_state[rows] = carry
    return y, rearrange(last_state, "b g n p -> b (g p) n").contiguous(), saved


def _output(inputs: _Inputs, block: _Block, e: _Expanded) -> Tensor:
    y = _contract(e.C, e.h)
    if inputs.D is not None:
        y = torch.addcmul(y, inputs.D, e.x)
    if inputs.z is not None:
        y = y * F.silu(inputs.channels(inputs.z, block))
    return y


def _first_state(inputs: _Inputs, n_rows: int) -> Tensor:
    if inputs.initial_state is not None:
        return inputs.initial_state
    return inputs.A.new_zeros(n_rows, *inputs.A.shape)


def _row_slices(batch: int, elements_per_row: int) -> Iterator[slice]:
    """Rows that are scanned together: as many as keep a block's expanded tensors small."""
    rows = max(1, BLOCK // max(1, elements_per_row))
    for start in range(0, batch, rows):
        yield slice(start, min(batch, start + rows))


def _write_channels(target: Tensor, block: _Block, values: Tensor) -> None:
    """Write (t, s, b, g, 1, p) into a block of (b, l, d)."""
    target[:, block.tokens] = rearrange(values, "t s b g 1 p -> b (s t) (g p)")


# ------------------------------------------------------------------------------------------------- backward


@dataclass
class _Gradients:
    """Gradients of the op's tensors; those of constants and vectors are summed over blocks in the order of the loop."""

    du: Tensor
    ddelta: Tensor
    dz: Tensor | None
    dB: Tensor
    dC: Tensor
    dA: Tensor
    dD: Tensor | None
    dbias: Tensor | None
    dinitial: Tensor | None


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
    inputs = _prepare(u, delta, A, B, C, D, z, delta_bias, delta_softplus, b_discretization, initial_state)
    batch, length, d_inner = u.shape
    n_segments, n_steps = split(batch, d_inner, A.shape[1])
    blocks = _blocks(length, n_segments, n_steps)
    sequences = _Sequences(cu_seqlens, blocks)
    dlast = rearrange(dlast_state.to(inputs.dtype), "b (g p) n -> b g n p", g=inputs.n_groups).contiguous()
    grads = _Gradients(
        du=torch.empty_like(u, memory_format=torch.contiguous_format),
        ddelta=torch.empty_like(delta, memory_format=torch.contiguous_format),
        dz=None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format),
        dB=_zeros_for(inputs.B),
        dC=_zeros_for(inputs.C),
        dA=torch.zeros_like(inputs.A),
        dD=None if inputs.D is None else torch.zeros_like(inputs.D),
        dbias=None if inputs.delta_bias is None else torch.zeros_like(inputs.delta_bias),
        dinitial=None if initial_state is None else dlast.clone(),  # what an empty sequence passes through
    )
    packed = cu_seqlens is not None
    scratch = _Workspace(inputs.A)
    for rows in _row_slices(batch, n_segments * n_steps * inputs.A.numel()):
        part = inputs if packed else inputs.rows(rows)
        carry = torch.zeros_like(saved[0]) if packed else dlast[rows]
        for i in reversed(range(len(blocks))):
            expanded, _ = _expand(part, blocks[i], sequences, i, saved[i, rows], scratch)
            carry = _backward_block(
                part,
                blocks[i],
                sequences,
                i,
                expanded,
                saved[i, rows],
                dy[rows],
                dlast,
                carry,
                grads,
                rows,
                scratch,
            )
        if grads.dinitial is not None and not packed:
            grads.dinitial[rows] = carry
    return _as_inputs(grads, A, B, C, D, delta_bias, initial_state)


def _zeros_for(M: Tensor) -> Tensor:
    return torch.zeros_like(M, memory_format=torch.contiguous_format)


def _backward_block(
    inputs: _Inputs,
    block: _Block,
    sequences: _Sequences,
    index: int,
    e: _Expanded,
    h_before: Tensor,
    dy: Tensor,
    dlast: Tensor,
    carry: Tensor,
    grads: _Gradients,
    rows: slice,
    scratch: _Workspace,
) -> Tensor:
    """Add a block's gradients; carry is d loss / d (state after the block), returned for the state before it."""
    dy_scan = _output_backward(inputs, block, e, inputs.channels(dy, block), grads, rows)
    dy_state = 2 * dy_scan if inputs.dtype.is_complex else dy_scan  # y is twice the real part
    dh = scratch.product("dh", dy_state, _conj(e.C))
    if sequences.ends:
        where, sequence = sequences.ends[index]
        dh[where] += dlast[sequence][:, None]
    carry = _reverse_scan_(dh, e.decay, carry)
    _accumulate_matrix(grads.dC, block, rows, _conj(e.h), dy_state, scratch)
    dx = _drive_backward(block, e, dh, grads, rows, scratch)
    ddelta_A = _decay_backward(inputs, sequences, index, e, dh, h_before, grads)
    if e.ratio is not None:
        dratio = dh * _conj(e.B) * (e.step * e.x)
        delta_A = e.step * inputs.A
        ddelta_A += dratio * _conj(expm1_ratio_derivative(delta_A, e.ratio))
    dstep = dx * e.x + _real(scratch.product("product", ddelta_A, _conj(inputs.A)).sum(-2, keepdim=True))
    grads.dA += scratch.product("product", ddelta_A, e.step).sum((0, 1, 2))
    du = dx * e.step
    if inputs.D is not None:
        du = torch.addcmul(du, inputs.D, dy_scan)
    draw = torch.where(e.raw > 20, dstep, dstep * torch.sigmoid(e.raw)) if inputs.delta_softplus else dstep
    if grads.dbias is not None:
        grads.dbias += draw.sum((0, 1, 2))
    _write_channels(grads.du[rows], block, du)
    _write_channels(grads.ddelta[rows], block, draw)
    return carry


def _output_backward(
    inputs: _Inputs, block: _Block, e: _Expanded, dy: Tensor, grads: _Gradients, rows: slice
) -> Tensor:
    """Through the gate and the skip: d loss / d (C . h), with the gradients of z and D."""
    if inputs.z is not None:
        gate = inputs.channels(inputs.z, block)
        sigmoid = torch.sigmoid(gate)
        y = _contract(e.C, e.h)
        if inputs.D is not None:
            y = torch.addcmul(y, inputs.D, e.x)
        dgate = dy * y * sigmoid * (1 + gate * (1 - sigmoid))
        _write_channels(grads.dz[rows], block, dgate)  # type: ignore[index]
        dy = dy * gate * sigmoid
    if grads.dD is not None:
        grads.dD += (dy * e.x).sum((0, 1, 2))
    return dy


def _reverse_scan_(dh: Tensor, decay: Tensor, carry: Tensor) -> Tensor:
    """In place dh[t] += conj(decay[t + 1]) dh[t + 1]; the carry is d loss / d (state after the block)."""
    decay = _conj(decay)
    after = torch.ones_like(decay[0])
    after[:-1] = decay[0, 1:]
    dh_list, steps = list(dh), range(dh.shape[0] - 1, -1, -1)
    coefficient = [after, *(decay[t] for t in steps[:-1])]
    before = scan_([dh_list[t] for t in steps], coefficient, carry, reverse_segments=True)
    return decay[0, 0] * before


def _drive_backward(
    block: _Block, e: _Expanded, dh: Tensor, grads: _Gradients, rows: slice, scratch: _Workspace
) -> Tensor:
    """Through (ratio) B (Δ u): the gradient of Δ u, with that of B."""
    weighted = dh if e.ratio is None else dh * _conj(e.ratio)
    _accumulate_matrix(grads.dB, block, rows, weighted, e.step * e.x, scratch)
    if e.B.ndim == 3:
        return _real(scratch.product("product", weighted, _conj(e.B)).sum(-2, keepdim=True))
    return _real(torch.matmul(_conj(e.B).transpose(-1, -2), weighted))


def _decay_backward(
    inputs: _Inputs,
    sequences: _Sequences,
    index: int,
    e: _Expanded,
    dh: Tensor,
    h_before: Tensor,
    grads: _Gradients,
) -> Tensor:
    """d loss / d (Δ A) through the decay (whose place it takes), with that of the initial states of packed sequences."""
    ddecay = e.decay.mul_(dh) if not dh.is_complex() else _conj(e.decay).mul_(dh)
    h = _conj(e.h)
    ddecay[1:].mul_(h[:-1])
    ddecay[0, 1:].mul_(h[-1, :-1])
    ddecay[0, 0].mul_(_conj(h_before))
    if sequences.starts and inputs.initial_state is not None:
        where, sequence = sequences.starts[index]
        dinitial = dh[where] * _conj(e.start_decay)
        grads.dinitial[sequence] = dinitial[:, 0]  # type: ignore[index]
        ddecay[where] = dinitial * _conj(inputs.initial_state[sequence][:, None])
    return ddecay


def _accumulate_matrix(
    target: Tensor, block: _Block, rows: slice, states: Tensor, channels: Tensor, scratch: _Workspace
) -> None:
    """Gradient of B or C from (t, s, b, g, n, p) and (t, s, b, g, 1, p): summed over p where it is selective."""
    if target.ndim == 3:
        target += scratch.product("product", states, channels).sum((0, 1, 2))
    else:
        product = torch.matmul(states, channels.to(states.dtype).transpose(-1, -2))
        target[rows, block.tokens] = rearrange(product, "t s b g n 1 -> b (s t) g n").to(target.dtype)


def _conj(x: Tensor) -> Tensor:
    return x.conj().resolve_conj() if x.is_complex() else x


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x


def _as_inputs(
    grads: _Gradients,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> list[Tensor | None]:
    """The gradients in the shapes and dtypes of the op's tensors."""

    def matrix(gradient: Tensor, like: Tensor) -> Tensor:
        return rearrange(gradient, "g n p -> (g p) n").to(like.dtype).contiguous() if like.ndim == 2 else gradient

    def vector(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if gradient is None or like is None else gradient.reshape(-1).to(like.dtype)

    dinitial = grads.dinitial
    if dinitial is not None and initial_state is not None:
        dinitial = rearrange(dinitial, "b g n p -> b (g p) n").to(initial_state.dtype).contiguous()
    return [
        grads.du,
        grads.ddelta,
        matrix(grads.dA, A),
        matrix(grads.dB, B),
        matrix(grads.dC, C),
        vector(grads.dD, D),
        grads.dz,
        vector(grads.dbias, delta_bias),
        dinitial,
    ]


# ------------------------------------------------------------------------------------------------- step


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
    """One token: y (b, d) and the new state (b, d, n); B and C (d, n) or (b, g, n). Plain operations, for export."""
    real, dtype = working_dtypes(u, delta, A)
    x, step_size = u.to(real), delta.to(real)
    if delta_bias is not None:
        step_size = step_size + delta_bias.to(real)
    if delta_softplus:
        step_size = F.softplus(step_size)
    B, C = (_step_matrix(M.to(dtype), u.shape[1]) for M in (B, C))
    delta_A = step_size[..., None] * A.to(dtype)
    drive = (step_size * x)[..., None] * B
    if b_discretization == "zoh":
        drive = drive * expm1_ratio(delta_A)
    state = torch.exp(delta_A) * state.to(dtype) + drive
    y = (state * C).sum(-1)
    y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = y + D.to(real) * x
    if z is not None:
        y = y * F.silu(z.to(real))
    return y.to(u.dtype), state


def _step_matrix(M: Tensor, d_inner: int) -> Tensor:
    """B or C of one token, constant (d, n) or (b, g, n), so that it broadcasts over (b, d, n)."""
    if M.ndim == 2 or M.shape[1] == 1:
        return M
    return M.repeat_interleave(d_inner // M.shape[1], 1)
