"""Which kernels a call of the norm takes, and the layout of their struct Parameters."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from anymamba.kernels.add_norm.arguments import NormArguments
from anymamba.runtimes import launching, nvrtc

HERE = Path(__file__).parent

TENSORS = dict.fromkeys(("x", "residual", "total", "y", "dy", "dtotal", "dx", "dresidual"), 2)
"""Fields that are a struct Rows, and their dimensions."""

FIELDS = (
    *("weight", "weight_dtype", "bias", "bias_dtype", "statistics", "parts"),
    *("dweight", "dweight_dtype", "dbias", "dbias_dtype", "rows", "size", "eps", "total_dtype", "subtract_mean"),
    *("warps", "n_parts", "rows_of_part"),
)

LAYOUT = launching.layout(TENSORS, FIELDS)

FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH, NUMBERS_OF_WARP, MOST_WARPS = 4, 512, 16
"""Of fast.cu: numbers of a lane that are read at once, and of a row's warps."""
THREADS = 256
THREADS_OF_MULTIPROCESSOR = {1: 1024, 2: 768, 4: 512}
"""Of the fast kernels whose blocks take many rows, for each number of chunks: they need 64 to 128 registers each."""
SLOTS = 4 * MOST_WARPS * 4
"""Bytes of shared memory in which warps add, of fast.cu."""
ROWS_OF_PART = 64
"""Of the general kernels."""
WAYS = 16
"""Of `sum_parts`: see runtimes/cuda/parts.cuh."""


def is_fast(a: NormArguments) -> bool:
    """Whether the fast kernels serve: by sizes and dtypes alone, a tensor that lies badly is copied."""
    dtypes = {a.y_dtype, *(t.dtype for t in a.tensors if t is not None)}
    return a.size % WIDTH == 0 and a.size <= NUMBERS_OF_WARP * MOST_WARPS and dtypes.issubset(FAST_DTYPES)


def warps_of_row(size: int) -> int:
    """A power of two."""
    return 1 << (-(-size // NUMBERS_OF_WARP) - 1).bit_length()


def chunks_of_lane(size: int) -> int:
    """CHUNKS of fast.cu: how often a lane has numbers of a row."""
    return next((chunks for chunks in (1, 2) if size <= 32 * WIDTH * chunks), 4)


@cache
def fast(kernel: str, chunks: int) -> nvrtc.Variant:
    """A kernel of fast.cu."""
    return nvrtc.Variant(nvrtc.source(HERE / "fast.cu"), kernel, (("CHUNKS", chunks),))


@cache
def general(kernel: str, dtype: torch.dtype) -> nvrtc.Variant:
    """A kernel of general.cu, by the dtype in which it computes."""
    return nvrtc.Variant(nvrtc.source(HERE / "general.cu"), kernel, (("DOUBLE", int(dtype == torch.float64)),))


def variants() -> list[nvrtc.Variant]:
    """Every compilation that some call on some GPU needs."""
    found = [fast("forward", chunks) for chunks in THREADS_OF_MULTIPROCESSOR]
    return found + [general("forward", dtype) for dtype in (torch.float32, torch.float64)]
