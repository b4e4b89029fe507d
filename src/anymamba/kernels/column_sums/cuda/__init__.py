"""The sums of a matrix's columns in CUDA C++ for NVIDIA GPUs: as fast as memory is read.

Sums are in float32. Their order depends on the sizes and the number of multiprocessors, so GPUs of one kind have the
same sums of the same numbers, bit for bit. Nothing here waits for the GPU.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from anymamba.runtimes import nvrtc
from anymamba.runtimes.launching import Call, aligned, is_served, layout, numbers_of_piece, resolved
from anymamba.runtimes.replaying import replayed

TENSORS = {"x": 2}
"""Fields that are a struct of address, strides and dtype, and their dimensions."""
FIELDS = ("parts", "sums", "rows", "width", "across", "rows_of_part", "n_parts", "aligned")
LAYOUT = layout(TENSORS, FIELDS)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
THREADS, BLOCKS, AT_ONCE = 256, 4, 8
"""Threads of a block, blocks of a multiprocessor, and rows that a thread has on their way."""
NARROWEST = 16
"""Vectors of a row that a block takes at least, if the row has more: fewer waste what memory gives at a time."""
FEWEST_ROWS = 64
"""Of a block, if there are as many."""
WAYS = 16
"""Of `sum_parts`: see runtimes/cuda/parts.cuh."""


class Split(NamedTuple):
    """How the matrix is shared out."""

    across: int
    """Vectors of a row that a block takes."""
    rows_of_part: int
    n_groups: int
    """Blocks that share a row."""
    n_parts: int
    """Blocks that share a column."""


def serves(x: Tensor) -> bool:
    """Whether the kernel takes this tensor: numbers of up to 4 bytes, on a GPU that compiles it."""
    return x.dtype in DTYPES and x.ndim > 0 and x.numel() > 0 and is_served(x)


def sums(x: Float[Tensor, "*rows width"]) -> Float[Tensor, " width"]:
    """The sums over all dimensions but the last, in float32. Leading dimensions without a common stride are copied."""
    x = resolved(x)
    x = x.reshape(-1, x.shape[-1])
    return replayed("column sums", (x,), (), lambda: (_sums(x),))[0]


def _sums(x: Float[Tensor, "rows width"]) -> Float[Tensor, " width"]:
    (rows, width), vector = x.shape, numbers_of_piece(x)
    made = x.new_empty(width, dtype=torch.float32)
    call = Call(LAYOUT, x)
    split = split_of(rows, -(-width // vector), call.n_multiprocessors)
    call.strided(x=x)
    call.dense(sums=made)
    call.set(rows=rows, width=width, aligned=aligned(x, vector))
    call.set(across=split.across, rows_of_part=split.rows_of_part, n_parts=split.n_parts)
    call.scratch("parts", split.n_parts, -(-width // vector) * vector, dtype=torch.float32)
    call.launch(
        variant("sum_columns", x.dtype), split.n_groups * split.n_parts, THREADS, THREADS * vector * 4, early=True
    )
    call.launch(variant("sum_parts", x.dtype), -(-width // 32), 32 * WAYS, 32 * WAYS * 4, early=True)
    return made


def split_of(rows: int, vectors: int, n_multiprocessors: int) -> Split:
    """All blocks run at the same time, and few of their threads are idle."""
    across = _across(vectors)
    n_groups, rows_at_once = -(-vectors // across), THREADS // across
    most_parts = max(1, BLOCKS * n_multiprocessors // n_groups)
    rows_of_part = max(-(-rows // most_parts), FEWEST_ROWS, AT_ONCE * rows_at_once)
    return Split(across, rows_of_part, n_groups, -(-rows // rows_of_part))


@cache
def _across(vectors: int) -> int:
    """The most vectors with which the fewest threads are idle. They are even: sectors of 32 bytes stay whole."""
    if vectors <= NARROWEST:
        return vectors
    return max(range(THREADS, NARROWEST - 1, -2), key=lambda n: THREADS // n / -(-vectors // n))


@cache
def variant(kernel: str, dtype: torch.dtype) -> nvrtc.Variant:
    source = nvrtc.source(Path(__file__).parent / "column_sums.cu")
    return nvrtc.Variant(source, kernel, (("DTYPE", nvrtc.DTYPES[dtype]),))


def variants() -> list[nvrtc.Variant]:
    """Every compilation that some call on some GPU needs."""
    return [variant("sum_columns", dtype) for dtype in DTYPES]
