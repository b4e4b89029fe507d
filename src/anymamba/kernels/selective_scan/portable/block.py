"""The states of one block."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from anymamba.kernels.elementwise import expm1_ratio
from anymamba.kernels.selective_scan.portable.inputs import Channels, Inputs
from anymamba.kernels.selective_scan.portable.plan import Sequences
from anymamba.kernels.selective_scan.portable.recurrence import fresh_steps, leaks, scan_, segment_decays

PAGE, PAGE_STEP = 4096, 832  # bytes


class Workspace:
    """Named scratch buffers that every block reuses: fresh large tensors would cost page faults each time."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, torch.Size, torch.Size], Tensor] = {}
        self._steps: dict[Tensor, list[Tensor]] = {}

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a * b in the buffer of that name."""
        view = self._views.get((name, a.shape, b.shape))
        if view is None:
            view = self._views[name, a.shape, b.shape] = self._view(name, torch.broadcast_shapes(a.shape, b.shape))
        return torch.mul(a, b, out=view)

    def steps(self, product: Tensor) -> list[Tensor]:
        """The slabs of a product along its first dimension."""
        if product not in self._steps:
            self._steps[product] = list(product)
        return self._steps[product]

    def _view(self, name: str, shape: torch.Size) -> Tensor:
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self._allocate(size, len(self._buffers))
        return self._buffers[name][:size].view(shape)

    def _allocate(self, size: int, number: int) -> Tensor:
        """Allocate a buffer at an offset in its memory page that no other buffer has.

        Large tensors normally all begin at the same offset. Then the rows that step i reads and writes have the same
        low address bits. Processors take such accesses for dependent ones and wait; a step takes ten times as long.
        """
        item = self._like.element_size()
        buffer = self._like.new_empty(size + PAGE // item)
        start = ((number + 1) * PAGE_STEP - buffer.data_ptr()) % PAGE // item
        return buffer[start : start + size]


class Expanded(NamedTuple):
    """The tensors of one block of the scan, each (t, s, b, g, n, p) unless noted."""

    decay: Tensor  # exp(Δ A), 0 where a packed sequence starts
    start_decay: Tensor | None  # exp(Δ A) where packed sequences with an initial state start (m, b, g, n, p)
    ratio: Tensor | None  # (exp(Δ A) - 1) / (Δ A) under zero-order hold
    h: Tensor
    last: Tensor  # the state after the block (b, g, n, p)


def expand(
    inputs: Inputs, c: Channels, k: int, sequences: Sequences, block: int, before: Tensor, scratch: Workspace
) -> Expanded:
    """Compute the states of block k of a span from the state before it. `block` is its number among all blocks."""
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

    h, through = driven(), segment_decays(inputs.A, c.step[k], starts)
    last = scan_(scratch.steps(h), scratch.steps(decay), before, through, reverse_segments=False)
    if starts is not None and leaks(last):
        h, fresh = driven(), list(fresh_steps(decay, starts))
        last = scan_(list(h), list(decay), before, through, reverse_segments=False, fresh=fresh)
    return Expanded(decay, start_decay, ratio, h, last)


def contract(C: Tensor, h: Tensor, scratch: Workspace) -> Tensor:
    """sum over n of C h, (t, s, b, g, 1, p); twice the real part if it is complex."""
    y = scratch.product("product", C, h).sum(-2, keepdim=True) if C.ndim == 3 else torch.matmul(C.transpose(-1, -2), h)
    return y.real * 2 if y.is_complex() else y
