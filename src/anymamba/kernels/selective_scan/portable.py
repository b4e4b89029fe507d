"""The selective scan in plain PyTorch, chunked: the fallback on every device.

Notation. Time is cut into spans of k blocks of t steps in s segments. Inside a block every expanded tensor is
(t, s, b, g, n, p): t steps, s segments, b rows, g groups, n state, p channels of a group. Channels are last, so that
every operation runs along contiguous memory, and the recurrence is one fused multiply-add a step over all segments,
rows, states and channels. The segments of a block (more than one only where a row alone is too narrow to keep a step
busy) are scanned side by side from zero and joined by their running products of decays. What is not expanded by the
state is computed for a span at once, as (k, t, s, b, g, 1, p).

Only one block's expanded tensors exist at a time. Forward saves the state at the start of each block, backward
recomputes the states inside it. The split depends on shapes only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from anymamba.kernels.elementwise import SOFTPLUS_THRESHOLD, sigmoid, silu, softplus

NAME = "portable"

N_STEPS = 32  # of a segment: saved states cost d_state / 32 of u, and a block's calls are paid once in 32 tokens
STEP = 49152  # elements of a step up to which segments are set side by side: a call then costs its work
NARROW = 12288  # elements of a step of one row below which that pays for scanning twice
BLOCK = 1 << 20  # elements of an expanded tensor: a few of them fit the caches
SPAN = 1 << 18  # elements of a tensor that is not expanded
SERIES = range(14)  # powers in the series of (exp(x) - 1) / x for |x| < 1/2: exact to float64


# ------------------------------------------------------------------------------------------ how work is split


def split(batch: int, d_inner: int, d_state: int) -> tuple[int, int]:
    """(n_segments, n_steps) of a block; segments are for single rows, where several rows fill a step together."""
    n_segments, slab = 1, d_inner * d_state
    while batch == 1 and slab <= NARROW and n_segments < 32 and 2 * n_segments * slab <= STEP:
        n_segments *= 2
    return n_segments, N_STEPS


def n_saved_states(length: int, batch: int, d_inner: int, d_state: int) -> int:
    """How many states forward saves for backward (the last two may stay unused)."""
    n_segments, n_steps = split(batch, d_inner, d_state)
    return length // (n_segments * n_steps) + 2


class _Span(NamedTuple):
    start: int
    n_blocks: int
    n_segments: int
    n_steps: int
    first_block: int  # its number among the blocks of all spans

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.n_blocks * self.n_segments * self.n_steps)

    @property
    def sizes(self) -> dict[str, int]:
        """For einops: the span's time axis is (k s t)."""
        return {"k": self.n_blocks, "s": self.n_segments, "t": self.n_steps}

    def block_starts(self) -> range:
        return range(self.start, self.tokens.stop, self.n_segments * self.n_steps)


def _spans(length: int, n_segments: int, n_steps: int, elements_per_token: int) -> list[_Span]:
    """Spans of whole blocks, then one of the whole segments that are left, then one of the steps that are left."""
    tokens = n_segments * n_steps
    whole, rest = divmod(length, tokens)
    per_span = max(1, SPAN // max(1, tokens * elements_per_token))
    spans = [_Span(i * tokens, min(per_span, whole - i), n_segments, n_steps, i) for i in range(0, whole, per_span)]
    number = whole
    if rest >= n_steps:
        spans.append(_Span(length - rest, 1, rest // n_steps, n_steps, number))
        number += 1
    if rest % n_steps:
        spans.append(_Span(length - rest % n_steps, 1, 1, rest % n_steps, number))
    return spans


# ------------------------------------------------------------------------------------------ the scan's inputs


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

    def channels(self, x: Tensor, span: _Span) -> Tensor:
        """A span of (b, l, d) as (k, t, s, b, g, 1, p) in the working precision."""
        x = x[:, span.tokens].to(self.real)
        return rearrange(x, "b (k s t) (g p) -> k t s b g 1 p", g=self.n_groups, **span.sizes)

    def states(self, M: Tensor, span: _Span) -> Tensor:
        """A span of B or C as (k, t, s, b, g, n, 1), or (k, g, n, p) views where it is constant."""
        if M.ndim == 3:
            return M.expand(span.n_blocks, *M.shape)
        return rearrange(M[:, span.tokens].to(self.dtype), "b (k s t) g n -> k t s b g n 1", **span.sizes)


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
    real = torch.promote_types(real, A.real.dtype)
    return real, torch.promote_types(real, A.dtype)


# ------------------------------------------------------------------------------------------ packed sequences


class _Places(NamedTuple):
    """Positions in one block at which packed sequences start or end."""

    where: tuple[Tensor, Tensor]  # (step, segment)
    sequence: Tensor


class _Sequences:
    """Where packed sequences start and end, by block. Empty sequences have neither."""

    def __init__(self, cu_seqlens: Tensor | None, spans: list[_Span]) -> None:
        self.n_sequences = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
        self.starts: dict[int, _Places] = {}
        self.ends: dict[int, _Places] = {}
        if cu_seqlens is not None and spans:
            blocks = [(start, span.n_steps) for span in spans for start in span.block_starts()]
            borders = cu_seqlens.long()
            filled = (borders[1:] > borders[:-1]).nonzero().flatten()
            self.starts = self._by_block(borders[filled], filled, blocks)
            self.ends = self._by_block(borders[filled + 1] - 1, filled, blocks)

    @staticmethod
    def _by_block(positions: Tensor, sequence: Tensor, blocks: list[tuple[int, int]]) -> dict[int, _Places]:
        """The places in each block that has any."""
        starts = torch.tensor([start for start, _ in blocks], device=positions.device)
        cuts = [*torch.searchsorted(positions, starts).tolist(), positions.numel()]
        places = {}
        for i, (start, n_steps) in enumerate(blocks):
            here = slice(cuts[i], cuts[i + 1])
            if here.start < here.stop:
                offset = positions[here] - start
                places[i] = _Places((offset % n_steps, offset // n_steps), sequence[here])
        return places


class _Plan:
    """How the work of a call is split: spans of time, slices of rows, and where packed sequences lie."""

    def __init__(self, batch: int, length: int, inputs: _Inputs, cu_seqlens: Tensor | None) -> None:
        n_groups, d_state, per_group = inputs.A.shape
        d_inner = n_groups * per_group
        n_segments, n_steps = split(batch, d_inner, d_state)
        rows = max(1, BLOCK // max(1, n_segments * n_steps * d_inner * d_state))  # that keep a block small
        self.row_slices = [slice(start, min(batch, start + rows)) for start in range(0, batch, rows)]
        self.spans = _spans(length, n_segments, n_steps, min(rows, batch) * d_inner)
        self.sequences = _Sequences(cu_seqlens, self.spans)


# ------------------------------------------------------------------------------------------ one block


class _Workspace:
    """Named scratch buffers that every block reuses: fresh large tensors would cost page faults each time."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, torch.Size, torch.Size], Tensor] = {}

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a * b in the buffer of that name."""
        view = self._views.get((name, a.shape, b.shape))
        if view is None:
            view = self._views[name, a.shape, b.shape] = self._view(name, torch.broadcast_shapes(a.shape, b.shape))
        return torch.mul(a, b, out=view)

    def _view(self, name: str, shape: torch.Size) -> Tensor:
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self._like.new_empty(size)
        return self._buffers[name][:size].view(shape)


def expm1_ratio(x: Tensor) -> Tensor:
    """(exp(x) - 1) / x and its limit 1 at 0, by a series near zero."""
    near = x.abs() < 0.5
    large = torch.where(near, 1, x)
    quotient = (torch.exp(large) - 1 if x.is_complex() else torch.expm1(large)) / large
    return torch.where(near, _series(torch.where(near, x, 0), [1 / math.factorial(k + 1) for k in SERIES]), quotient)


def expm1_ratio_derivative(x: Tensor, ratio: Tensor) -> Tensor:
    """Derivative of `expm1_ratio`, (exp(x) - ratio) / x, by a series near zero."""
    near = x.abs() < 0.5
    large = torch.where(near, 1, x)
    series = _series(torch.where(near, x, 0), [(k + 1) / math.factorial(k + 2) for k in SERIES])
    return torch.where(near, series, (torch.exp(large) - ratio) / large)


def _series(x: Tensor, coefficients: list[float]) -> Tensor:
    """sum over k of coefficients[k] x^k."""
    value = x * coefficients[-1]
    for coefficient in reversed(coefficients[1:-1]):
        value = value.add_(coefficient) * x
    return value.add_(coefficients[0])


def scan_(
    x: list[Tensor],
    coefficient: list[Tensor],
    carry: Tensor,
    *,
    reverse_segments: bool,
    fresh: list[Tensor] | None = None,
) -> Tensor:
    """In place x[i] += coefficient[i] * x[i - 1] in the order of the lists, the first one from the carry.

    Args:
        x, coefficient: one (s, ...) slab a step. Segments follow one another in the order of s, or against it.
        carry: (...) the value before the first step of the first segment.
        fresh: one boolean (s, 1, ...) a step, true where the coefficient is 0; there 0 is added even to a NaN's product.
    Returns the value after the last step of the last segment.
    """
    n_segments = x[0].shape[0]
    stops: list[Tensor | None] = [None] * len(x) if fresh is None else [*fresh]
    if n_segments == 1:
        previous = carry[None]
        for value, factor, stop in zip(x, coefficient, stops, strict=True):
            previous = value.addcmul_(factor, _unless(stop, previous))
        return previous[0].clone()  # x is a buffer that the next block reuses
    product, seen = [coefficient[0]], [stops[0]]
    for i in range(1, len(x)):
        x[i].addcmul_(coefficient[i], _unless(stops[i], x[i - 1]))
        product.append(_unless(stops[i], product[-1]) * coefficient[i])
        seen.append(_either(seen[-1], stops[i]))
    incoming = torch.empty_like(x[0])
    for s in reversed(range(n_segments)) if reverse_segments else range(n_segments):
        incoming[s] = carry
        carry = torch.addcmul(x[-1][s], product[-1][s], carry if seen[-1] is None else _unless(seen[-1][s], carry))
    for value, factor, stop in zip(x, product, seen, strict=True):
        value.addcmul_(factor, _unless(stop, incoming))
    return carry


def reverse_scan_(dh: Tensor, decay: Tensor, carry: Tensor, fresh: Tensor | None = None) -> Tensor:
    """In place dh[t] += conj(decay[t + 1]) dh[t + 1]; the carry is d loss / d (state after the block).

    Args:
        dh, decay: (t, s, ...).
        fresh: boolean (t, s, 1, ...), as in `scan_`.
    Returns d loss / d (state before the block).
    """
    decay = _conj(decay)
    after = torch.ones_like(decay[0])
    after[:-1] = decay[0, 1:]
    values, coefficients = list(dh)[::-1], [after, *list(decay)[:0:-1]]
    if fresh is None:
        return decay[0, 0] * scan_(values, coefficients, carry, reverse_segments=True)
    fresh_after = torch.zeros_like(fresh[0])
    fresh_after[:-1] = fresh[0, 1:]
    stops = [fresh_after, *list(fresh)[:0:-1]]
    first = scan_(values, coefficients, carry, reverse_segments=True, fresh=stops)
    return decay[0, 0] * _unless(fresh[0, 0], first)


def _unless(condition: Tensor | None, value: Tensor) -> Tensor:
    return value if condition is None else torch.where(condition, 0, value)


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a | b


def _leaks(state: Tensor) -> bool:
    """Whether a value that is not finite reached the end of a block, where a decay of 0 does not stop it."""
    return not bool(torch.isfinite(state).all())


def _fresh(decay: Tensor, starts: _Places) -> Tensor:
    """(t, s, 1, ...): true where a packed sequence starts."""
    fresh = torch.zeros(decay.shape[:2], dtype=torch.bool, device=decay.device)
    fresh[starts.where] = True
    return fresh[(..., *[None] * (decay.ndim - 2))]


class _Channels:
    """What a span of the scan holds without the state's factor, each (k, t, s, b, g, 1, p), and its B and C."""

    def __init__(self, inputs: _Inputs, span: _Span) -> None:
        self.x = inputs.channels(inputs.u, span)
        self.raw = inputs.channels(inputs.delta, span)  # Δ before the softplus
        if inputs.delta_bias is not None:
            self.raw = self.raw + inputs.delta_bias
        self.step = softplus(self.raw) if inputs.delta_softplus else self.raw
        self.drive = self.step * self.x
        self.gate = None if inputs.z is None else inputs.channels(inputs.z, span)
        self.B, self.C = inputs.states(inputs.B, span), inputs.states(inputs.C, span)


class _Expanded(NamedTuple):
    """What one block of the scan holds, each (t, s, b, g, n, p) unless said otherwise."""

    decay: Tensor  # exp(Δ A), 0 where a packed sequence starts
    start_decay: Tensor | None  # exp(Δ A) where packed sequences with a state start (m, b, g, n, p)
    ratio: Tensor | None  # (exp(Δ A) - 1) / (Δ A) under zero-order hold
    h: Tensor
    last: Tensor  # the state after the block (b, g, n, p)


def _expand(
    inputs: _Inputs, c: _Channels, k: int, sequences: _Sequences, block: int, before: Tensor, scratch: _Workspace
) -> _Expanded:
    """The states of block k of a span, number `block` of all, from the state before it."""
    delta_A = scratch.product("decay", c.step[k], inputs.A)
    ratio = expm1_ratio(delta_A) if inputs.zoh else None
    decay = delta_A.exp_()
    starts, start_decay = sequences.starts.get(block), None
    if starts is not None:
        start_decay = None if inputs.initial_state is None else decay[starts.where]
        decay[starts.where] = 0

    def driven() -> Tensor:
        h = scratch.product("h", c.drive[k], c.B[k])
        if ratio is not None:
            h.mul_(ratio)
        if starts is not None and start_decay is not None and inputs.initial_state is not None:
            h[starts.where] += start_decay * inputs.initial_state[starts.sequence][:, None]
        return h

    h = driven()
    last = scan_(list(h), list(decay), before, reverse_segments=False)
    if starts is not None and _leaks(last):
        h = driven()
        last = scan_(list(h), list(decay), before, reverse_segments=False, fresh=list(_fresh(decay, starts)))
    return _Expanded(decay, start_decay, ratio, h, last)


def _contract(C: Tensor, h: Tensor, scratch: _Workspace) -> Tensor:
    """sum over n of C h: (t, s, b, g, 1, p), twice the real part where it is complex."""
    y = scratch.product("product", C, h).sum(-2, keepdim=True) if C.ndim == 3 else torch.matmul(C.transpose(-1, -2), h)
    return y.real * 2 if y.is_complex() else y


# ------------------------------------------------------------------------------------------ forward


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
    packed = cu_seqlens is not None
    plan = _Plan(batch, length, inputs, cu_seqlens)
    y = _empty(u)
    saved = inputs.A.new_empty(n_saved_states(length, batch, d_inner, A.shape[1]), batch, *inputs.A.shape)
    saved[sum(span.n_blocks for span in plan.spans) :] = 0
    last_state = inputs.A.new_zeros(plan.sequences.n_sequences if packed else batch, *inputs.A.shape)
    if inputs.initial_state is not None:
        last_state.copy_(inputs.initial_state)
    scratch = _Workspace(inputs.A)
    for rows in plan.row_slices:
        part = inputs if packed else inputs.rows(rows)
        state = torch.zeros_like(saved[0]) if packed else last_state[rows]
        for span in plan.spans:
            c = _Channels(part, span)
            y_span = torch.empty_like(c.x)
            for k, block in enumerate(range(span.first_block, span.first_block + span.n_blocks)):
                saved[block, rows] = state
                e = _expand(part, c, k, plan.sequences, block, state, scratch)
                y_span[k] = _contract(c.C[k], e.h, scratch)
                state = e.last
                if (ends := plan.sequences.ends.get(block)) is not None:
                    last_state[ends.sequence] = e.h[ends.where][:, 0]
            _write_channels(y[rows], span, _output_(part, c, y_span))
        if not packed:
            last_state[rows] = state
    return y, rearrange(last_state, "b g n p -> b (g p) n").contiguous(), saved


def _output_(inputs: _Inputs, c: _Channels, y: Tensor) -> Tensor:
    """The skip and the gate, in place."""
    if inputs.D is not None:
        y.addcmul_(inputs.D, c.x)
    if c.gate is not None:
        y.mul_(silu(c.gate))
    return y


def _write_channels(target: Tensor, span: _Span, values: Tensor) -> None:
    """Write (k, t, s, b, g, 1, p) into a span of (b, l, d)."""
    target[:, span.tokens] = rearrange(values, "k t s b g 1 p -> b (k s t) (g p)")


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


# ------------------------------------------------------------------------------------------ backward


@dataclass
class _Gradients:
    """Gradients of the op's tensors; those of constants and vectors are summed in the order of the loop."""

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
    packed = cu_seqlens is not None
    plan = _Plan(u.shape[0], u.shape[1], inputs, cu_seqlens)
    dlast = rearrange(dlast_state.to(inputs.dtype), "b (g p) n -> b g n p", g=inputs.n_groups).contiguous()
    grads = _Gradients(
        du=_empty(u),
        ddelta=_empty(delta),
        dz=None if z is None else _empty(z),
        dB=torch.zeros_like(inputs.B, memory_format=torch.contiguous_format),
        dC=torch.zeros_like(inputs.C, memory_format=torch.contiguous_format),
        dA=torch.zeros_like(inputs.A),
        dD=None if inputs.D is None else torch.zeros_like(inputs.D),
        dbias=None if inputs.delta_bias is None else torch.zeros_like(inputs.delta_bias),
        dinitial=None if initial_state is None else dlast.clone(),  # what an empty sequence passes through
    )
    scratch = _Workspace(inputs.A)
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
    return _as_inputs(grads, A, B, C, D, delta_bias, initial_state)


class _BackwardSpan:
    """Backward through one span: its blocks from the last to the first, then what is not expanded by the state."""

    def __init__(
        self, inputs: _Inputs, span: _Span, dy: Tensor, rows: slice, grads: _Gradients, scratch: _Workspace
    ) -> None:
        self.inputs, self.span, self.rows, self.grads, self.scratch = inputs, span, rows, grads, scratch
        self.c = _Channels(inputs, span)
        self.dy = self.dy_scan = inputs.channels(dy, span)
        if self.c.gate is not None:
            self.dy_scan = self.dy * silu(self.c.gate)
            self.y = torch.empty_like(self.dy)  # before the gate
        self.ddrive, self.dstep = torch.empty_like(self.c.x), torch.empty_like(self.c.x)
        self.dB, self.dC = (self._matrix_buffer(M) for M in (inputs.B, inputs.C))

    def _matrix_buffer(self, M: Tensor) -> Tensor | None:
        """Where the gradient of a selective B or C is gathered, (k, t, s, b, g, n, 1); a constant one is summed."""
        if M.ndim == 3:
            return None
        return self.c.x.new_empty(*self.c.x.shape[:5], M.shape[-1], 1, dtype=self.inputs.dtype)

    def block(
        self, k: int, number: int, sequences: _Sequences, before: Tensor, dlast: Tensor, dafter: Tensor
    ) -> Tensor:
        """Gradients of block k; d loss / d (state after it) goes in, that of the state before it comes out."""
        inputs, c, scratch = self.inputs, self.c, self.scratch
        e = _expand(inputs, c, k, sequences, number, before, scratch)
        if c.gate is not None:
            self.y[k] = _contract(c.C[k], e.h, scratch)
        dy_state = 2 * self.dy_scan[k] if inputs.dtype.is_complex else self.dy_scan[k]  # y is twice the real part

        def driven() -> Tensor:
            dh = scratch.product("dh", dy_state, _conj(c.C[k]))
            if (ends := sequences.ends.get(number)) is not None:
                dh[ends.where] += dlast[ends.sequence][:, None]
            return dh

        dh = driven()
        dbefore = reverse_scan_(dh, e.decay, dafter)
        if (starts := sequences.starts.get(number)) is not None and _leaks(dbefore):
            dh = driven()
            dbefore = reverse_scan_(dh, e.decay, dafter, _fresh(e.decay, starts))
        self._accumulate_matrix(self.dC, self.grads.dC, k, _conj(e.h), dy_state)
        self._drive_backward(k, e, dh)
        dratio = None if e.ratio is None else dh * _conj(c.B[k]) * c.drive[k]
        ddelta_A = self._decay_backward(sequences, number, e, dh, before)
        if dratio is not None and e.ratio is not None:
            ddelta_A += dratio * _conj(expm1_ratio_derivative(c.step[k] * inputs.A, e.ratio))
        self.dstep[k] = _real(scratch.product("product", ddelta_A, _conj(inputs.A)).sum(-2, keepdim=True))
        self.grads.dA += scratch.product("product", ddelta_A, c.step[k]).sum((0, 1, 2))
        return dbefore

    def finish(self) -> None:
        """Gradients of u, delta, z, D and delta_bias."""
        inputs, c, grads = self.inputs, self.c, self.grads
        if c.gate is not None and grads.dz is not None:
            y = self.y if inputs.D is None else self.y.addcmul_(inputs.D, c.x)
            gate = sigmoid(c.gate)
            dgate = (1 - gate).mul_(c.gate).add_(1).mul_(gate).mul_(y).mul_(self.dy)
            _write_channels(grads.dz[self.rows], self.span, dgate)
        du = self.ddrive * c.step
        if inputs.D is not None and grads.dD is not None:
            du.addcmul_(inputs.D, self.dy_scan)
            grads.dD += (self.dy_scan * c.x).sum((0, 1, 2, 3))
        _write_channels(grads.du[self.rows], self.span, du)
        draw = self.dstep.addcmul_(self.ddrive, c.x)
        if inputs.delta_softplus:
            draw = torch.where(c.raw > SOFTPLUS_THRESHOLD, draw, draw * sigmoid(c.raw))
        if grads.dbias is not None:
            grads.dbias += draw.sum((0, 1, 2, 3))
        _write_channels(grads.ddelta[self.rows], self.span, draw)
        for target, values in ((grads.dB, self.dB), (grads.dC, self.dC)):
            if values is not None:
                target[self.rows, self.span.tokens] = rearrange(values, "k t s b g n 1 -> b (k s t) g n")

    def _drive_backward(self, k: int, e: _Expanded, dh: Tensor) -> None:
        """Through ratio B (Δ u): the gradient of Δ u, with that of B."""
        B = _conj(self.c.B[k])
        weighted = dh if e.ratio is None else dh * _conj(e.ratio)
        self._accumulate_matrix(self.dB, self.grads.dB, k, weighted, self.c.drive[k])
        if B.ndim == 3:
            ddrive = self.scratch.product("product", weighted, B).sum(-2, keepdim=True)
        else:
            ddrive = torch.matmul(B.transpose(-1, -2), weighted)
        self.ddrive[k] = _real(ddrive)

    def _decay_backward(self, sequences: _Sequences, number: int, e: _Expanded, dh: Tensor, before: Tensor) -> Tensor:
        """d loss / d (Δ A) through the decay, whose place it takes, with that of packed sequences' initial states."""
        ddelta_A = _conj(e.decay).mul_(dh)
        h = _conj(e.h)
        ddelta_A[1:].mul_(h[:-1])
        ddelta_A[0, 1:].mul_(h[-1, :-1])
        ddelta_A[0, 0].mul_(_conj(before))
        starts, initial_state = sequences.starts.get(number), self.inputs.initial_state
        if starts is not None:
            ddelta_A[starts.where] = 0  # which it is already, unless the sequence before ends in a NaN
            if e.start_decay is not None and initial_state is not None and self.grads.dinitial is not None:
                dinitial = dh[starts.where] * _conj(e.start_decay)
                self.grads.dinitial[starts.sequence] = dinitial[:, 0]
                ddelta_A[starts.where] = dinitial * _conj(initial_state[starts.sequence][:, None])
        return ddelta_A

    def _accumulate_matrix(
        self, gathered: Tensor | None, total: Tensor, k: int, states: Tensor, channels: Tensor
    ) -> None:
        """Gradient of B or C from (t, s, b, g, n, p) and (t, s, b, g, 1, p): over p where it is selective, else over
        time and rows."""
        if gathered is None:
            total += self.scratch.product("product", states, channels).sum((0, 1, 2))
        else:
            gathered[k] = torch.matmul(states, channels.to(states.dtype).transpose(-1, -2))


def _conj(x: Tensor) -> Tensor:
    return torch.conj_physical(x) if x.is_complex() else x


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


# ------------------------------------------------------------------------------------------ step


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
        step_size = softplus(step_size)
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
        y = y * silu(z.to(real))
    return y.to(u.dtype), state


def _step_matrix(M: Tensor, d_inner: int) -> Tensor:
    """B or C of one token, constant (d, n) or (b, g, n), so that it broadcasts over (b, d, n)."""
    if M.ndim == 2 or M.shape[1] == 1:
        return M
    return M.repeat_interleave(d_inner // M.shape[1], 1)
