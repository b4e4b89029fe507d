"""The long convolution by products of tiles in bfloat16 on the tensor cores of NVIDIA GPUs; see toeplitz.cuh.

Products of length^2 / 2 numbers a row and channel cost less than FFTs up to some thousand tokens. The terms of the
filters are rounded to bfloat16, sums are in float32. Nothing here waits for the GPU, and every sum has an order of its
own.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from anymamba.runtimes import nvrtc
from anymamba.runtimes.launching import Call, aligned, is_served, layout

TENSORS = {"x": 3, "y": 3}
"""Fields that are a struct of address, strides and dtype, and their dimensions."""
FIELDS = (
    *("filters", "ordered", "inputs", "outputs", "lines", "parts", "found"),
    *("rows", "length", "width", "taps", "padded_rows", "padded_length", "line", "order_blocks", "n_tiles"),
    *("n_groups", "n_parts", "rows_of_part", "adjoint", "aligned", "near", "first"),
)
LAYOUT = layout(TENSORS, FIELDS)
LONGEST = 4096
"""Tokens. The products grow with the square of the length."""
MOST_OF_ROW = 4096
"""Most tokens for each row, counting rows up to a multiple of 8: products of zeros cost as much as others."""

CHANNELS, SHARES, GROUP = 4, 2, 4
"""Channels of a block of `multiply`, the warps of a channel, and the blocks that write together, unless by time."""
CHUNK = 128
"""Outputs of a warp of `multiply`."""
TILE = CHUNK * SHARES
"""Outputs of a block."""
EARLY = True
"""Whether `finish` starts while the kernel before it ends, and `correlate` unless some multiprocessors get two of its
blocks and all run at once. They would get the multiprocessors as that kernel leaves them, so that blocks with most work
share one; `multiply`, which never starts early, took 36 in place of 29 us."""
ORDERED, ORDER_THREADS, LINE_START = 64, 256, 16
"""Sides of a block of `order`, threads, and words of zeros before a filter."""
CACHED = 1 << 25
"""Bytes of inputs that a GPU's cache holds. Where there are more, blocks of `correlate` that read the same follow each
other, and those of `multiply` unless inputs are by time; otherwise those that have most work come first."""
SPAN, WARPS, PAIR, SLOTS = 128, 4, 2, 9
"""Of `correlate`: lags of a warp, warps and channels of a block, and its chunks in shared memory."""
WAVES = 8
"""`correlate` shares rows out until there are so many blocks for each that a multiprocessor has at a time."""


def serves(u: Tensor, kernel: Tensor) -> bool:
    """Whether the kernels take these and are faster than FFTs: bfloat16, not too long, on a GPU that compiles them."""
    if u.dtype != torch.bfloat16 or not kernel.is_floating_point() or kernel.dtype == torch.float64:
        return False
    if not u.numel() or not suits(u.shape[0], u.shape[1]) or not is_served(u):
        return False
    return most_shared_bytes(u.shape[1]) <= nvrtc.device(u.device.index or 0).shared_of_block


def suits(rows: int, length: int) -> bool:
    """Whether products cost less than FFTs."""
    return length <= LONGEST and length * padded(rows, 8) <= MOST_OF_ROW * rows


class Ordered(NamedTuple):
    """Inputs as the products read them."""

    x: Tensor
    """(rows, length, width), the same numbers: a part of memory that is ordered (width, padded rows, padded length), or
    the tensor itself where it is `by_time`."""
    lines: Tensor
    """The filters in words, (width, 2, line); nothing if they were not asked for."""


def by_time(u: Tensor) -> bool:
    """Whether memory is ordered (width, length, rows), which is read, and written again, as it is."""
    neighbours = u.shape[0] % 8 == 0 and u.stride(0) == 1
    return neighbours and u.permute(2, 1, 0).is_contiguous() and u.data_ptr() % 16 == 0


def order(u: Tensor, kernel: Tensor, with_filters: bool = True, adjoint: bool = False) -> Ordered:
    """Copy inputs, or gradients of outputs, into the order of the products and round the filters.

    Args:
        u: (rows, length, width), in bfloat16.
        kernel: (width, taps), at most `length` taps.
        adjoint: whether the filters are for the gradient of the inputs.
    """
    u = u if by_time(u) else dense(u)
    call, x, blocks = _start(u, kernel), u, 0
    if not by_time(u):
        memory = u.new_empty(call["width"], call["padded_rows"], call["padded_length"])
        call.strided(x=u)
        call.dense(ordered=memory)
        x = memory[:, : u.shape[0], : u.shape[1]].permute(1, 2, 0)
        blocks = -(-call["width"] // ORDERED) * (call["padded_length"] // ORDERED) * call["padded_rows"]
    call.set(order_blocks=blocks, aligned=aligned(u, 8), adjoint=adjoint)
    lines = u.new_empty(0, dtype=torch.int32)
    if with_filters:
        call.dense(filters=kernel.float())
        lines = u.new_empty(call["width"], 2, call["line"], dtype=torch.int32)
        call.dense(lines=lines)
    n_blocks = blocks + (call["width"] if with_filters else 0)
    call.launch(variant(u, "order"), n_blocks, ORDER_THREADS, ORDERED * ORDERED * 2)
    return Ordered(x, lines)


def convolve(x: Tensor, lines: Tensor, kernel: Tensor, adjoint: bool = False) -> Tensor:
    """The convolution of each channel with its filter, or the transposed map, of what `order` returned for it."""
    call, (rows, length, width) = _start(x, kernel), x.shape
    call.dense(ordered=_memory(x), lines=lines)
    memory = x.new_empty((width, length, rows) if by_time(x) else x.shape)
    call.strided(y=memory)
    across = padded(-(-width // CHANNELS), 1 if by_time(x) else GROUP)
    n_blocks = call["n_tiles"] * across * (call["padded_rows"] // (8 * row_tiles(x)))
    near, together = x.numel() * 2 > CACHED and not by_time(x), 1 if by_time(x) else GROUP
    first = _first(n_blocks // together, call.n_multiprocessors // together)
    call.set(aligned=aligned(memory, CHANNELS), adjoint=adjoint, near=near, first=first)
    shared = multiply_bytes(row_tiles(x), call["line"])
    call.launch(variant(x, "multiply"), n_blocks, 32 * CHANNELS * SHARES, shared)
    return memory.permute(2, 1, 0) if by_time(x) else memory


def correlate(x: Tensor, dy: Tensor, kernel: Tensor) -> Tensor:
    """The gradient of the filters, (width, taps) in float32, from inputs and gradients that `order` returned."""
    call, (width, taps) = _start(x, kernel), kernel.shape
    n_groups = min(-(-(taps + 15) // SPAN), -(-call["length"] // SPAN))
    n_blocks, batches = -(-width // PAIR) * -(-n_groups // WARPS), call["padded_rows"] // (8 * row_tiles(x))
    of_part = -(-batches // min(batches, max(1, -(-WAVES * 2 * call.n_multiprocessors // n_blocks))))
    n_parts = -(-batches // of_part)
    first = _first(n_blocks * n_parts, call.n_multiprocessors)
    found = x.new_empty(width, taps, dtype=torch.float32)
    call.dense(inputs=_memory(x), outputs=_memory(dy), found=found)
    near = x.numel() * 2 > CACHED
    call.set(n_groups=n_groups, n_parts=n_parts, rows_of_part=of_part * 8 * row_tiles(x), near=near, first=first)
    call.scratch("parts", n_parts, width, n_groups, SPAN + 16, dtype=torch.float32)
    shared = correlate_bytes(row_tiles(x))
    call.launch(variant(x, "correlate"), n_blocks * n_parts, 32 * WARPS * PAIR, shared, early=EARLY and not first)
    call.launch(variant(x, "finish"), -(-width * taps // ORDER_THREADS), ORDER_THREADS, early=EARLY)
    return found


def _first(count: int, places: int) -> int:
    """`first` of the kernels: the places that get a first piece of work, if all run at once and some get a second."""
    return places if places < count <= 2 * places else 0


def gradients(
    x: Tensor, dy: Tensor, kernel: Tensor, ordered: bool = False, of_inputs: bool = True, of_filters: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the inputs, in their dtype, and of the filters, in float32, where they are wanted.

    Args:
        x: (rows, length, width).
        dy: (rows, length, width), in bfloat16.
        ordered: whether x is what `order` returned. It is not copied then, unless it has moved.
    """
    if by_time(x) != by_time(dy):
        dy = dy.permute(2, 1, 0).contiguous().permute(2, 1, 0) if by_time(x) else dy.contiguous()
    g, lines = order(dy, kernel, of_inputs, adjoint=True)
    du = convolve(g, lines, kernel, adjoint=True) if of_inputs else None
    if not of_filters:
        return du, None
    x = x if ordered and is_ordered(x) else order(x, kernel, with_filters=False).x
    return du, correlate(x, g, kernel)


def is_ordered(x: Tensor) -> bool:
    """Whether memory has the strides of what `order` makes; whether there are zeros around x is not seen."""
    rows, length = _padded(x)
    strides = tuple(s for n, s in zip(x.shape, (length, 1, rows * length), strict=True) if n > 1)
    found = tuple(s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1)
    whole = x.storage_offset() + x.shape[2] * rows * length <= x.untyped_storage().nbytes() // x.itemsize
    return by_time(x) or (found == strides and whole and x.data_ptr() % 16 == 0)


def _memory(x: Tensor) -> Tensor:
    """All that `order` has written, with its zeros, or the tensor itself."""
    rows, length = _padded(x)
    return x.permute(2, 1, 0) if by_time(x) else x.as_strided((x.shape[2], rows, length), (rows * length, length, 1))


def _padded(x: Tensor) -> tuple[int, int]:
    """Rows and tokens with those that are zeros."""
    return padded(x.shape[0], 8 * row_tiles(x)), padded(x.shape[1], ORDERED)


def _start(u: Tensor, kernel: Tensor) -> Call:
    rows, length, width = u.shape
    call = Call(LAYOUT, u)
    call.set(rows=rows, length=length, width=width, taps=kernel.shape[1])
    call.set(padded_rows=_padded(u)[0], padded_length=_padded(u)[1])
    call.set(n_tiles=-(-length // TILE), line=line(length, kernel.shape[1]))
    return call


def dense(t: Tensor) -> Tensor:
    """The tensor, or a copy whose channels are neighbours in memory."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ------------------------------------------------------------------------------------------ sizes of the kernels


def row_tiles(x: Tensor) -> int:
    """Tiles of 8 rows in a block of `multiply`."""
    return 1 if x.shape[0] <= 8 and not by_time(x) else 2


def line(length: int, taps: int) -> int:
    """Words of a copy of a filter, for the outputs that are furthest from their first input."""
    return LINE_START + min(padded(length, TILE), TILE + padded(taps - 1, CHUNK)) // 2


def multiply_bytes(tiles: int, line: int) -> int:
    """Shared memory of a block: filters and two chunks of inputs, then outputs."""
    rows = 8 * tiles
    return max(CHANNELS * (8 * line + 2 * rows * (2 * CHUNK + 16)), rows * (TILE * CHANNELS + 16) * 2)


def correlate_bytes(tiles: int) -> int:
    return PAIR * SLOTS * 8 * tiles * (2 * SPAN + 16)


def most_shared_bytes(length: int) -> int:
    return max(multiply_bytes(2, line(length, length)), correlate_bytes(2))


def variant(x: Tensor, kernel: str) -> nvrtc.Variant:
    """A kernel for inputs."""
    return _variant(kernel, row_tiles(x), by_time(x))


@cache
def _variant(kernel: str, tiles: int, by_time: bool) -> nvrtc.Variant:
    name = "correlate" if kernel == "finish" else kernel
    options = (("ROW_TILES", tiles), ("BY_TIME", int(by_time)))
    source = nvrtc.source(Path(__file__).parent / f"toeplitz_{name}.cu")
    return nvrtc.Variant(source, kernel, () if kernel == "order" else options)


def variants() -> list[nvrtc.Variant]:
    """Every compilation that some call on some GPU needs."""
    kinds = ((1, False), (2, False), (2, True))
    others = [_variant(kernel, *kind) for kernel in ("multiply", "correlate") for kind in kinds]
    return [_variant("order", *kinds[0]), *others]
