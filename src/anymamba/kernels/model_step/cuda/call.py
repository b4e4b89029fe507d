"""Which kernels a step takes, and the layout of their struct Parameters."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from anymamba.runtimes import launching, nvrtc

HERE = Path(__file__).parent

TENSORS = dict.fromkeys(("x", "u", "z", "y", "projected", "B", "C", "delta"), 2)
"""Fields that are a struct Rows, and their dimensions."""

FIELDS = (
    *("step", "layer", "bucket", "ids", "ids_are_long", "table", "table_dtype", "n_ids", "rows"),
    *("conv", "ssm", "new_conv", "new_ssm", "logits"),
    *("weight", "bias", "n_in", "size", "n_out", "ways", "target"),
    *("has_norm", "subtract_mean", "norm_weight", "norm_bias", "eps"),
    *("conv_weight", "conv_bias", "taps", "d_inner", "A", "D", "delta_bias", "constant_B", "constant_C"),
    *("d_state", "dt_rank", "inner_norms", "dt_norm", "B_norm", "C_norm"),
)

LAYOUT = launching.layout(TENSORS, FIELDS)

STEP_BYTES = 48
"""Of the struct Step."""
MOST_ROWS = 8
"""Of the products here; more rows take those of cuBLAS."""
BUCKETS = (1, 2, 4, 8)
"""Of the products here."""
MOST_TAPS = 8
MOST_STATES = 128
ALIGNMENT = 8
"""Columns of matrices and of activations are padded with zeros to a multiple of this."""
STORE, ADD, LOGITS = 0, 1, 2
THREADS, WARPS = 256, 8
"""Of products, `embed` and `convolve_rows`."""
RECURRENCE_THREADS, RECURRENCE_ROWS, WIDTH = 128, 2, 4
BLOCKS_OF_MULTIPROCESSOR = 2
"""Of products."""


@cache
def product(kernel: str, dtype: torch.dtype, rows: int) -> nvrtc.Variant:
    """`product` or `in_proj`, for a bucket of 1, 2, 4 or 8 rows."""
    options = (("WEIGHT", nvrtc.DTYPES[dtype]), ("ROWS", rows))
    return nvrtc.Variant(nvrtc.source(HERE / "product.cu"), kernel, options)


@cache
def rows(kernel: str, dtype: torch.dtype, taps: int = 4) -> nvrtc.Variant:
    """`embed`, or `convolve_rows` with the taps of the convolution."""
    options = (("DTYPE", nvrtc.DTYPES[dtype]), ("TAPS", taps))
    return nvrtc.Variant(nvrtc.source(HERE / "rows.cu"), kernel, options)


@cache
def recurrence(kernel: str, dtype: torch.dtype, d_state: int, zoh: bool, aligned: bool = True) -> nvrtc.Variant:
    """`recur` or `recur_rows`, with Euler's rule or zero-order hold; see recurrence.cu for `aligned`."""
    options = {"DTYPE": nvrtc.DTYPES[dtype], "D_STATE": d_state, "LANES": lanes(kernel, d_state)}
    options |= {"GROUPS": groups_of(kernel, d_state), "ZOH": int(zoh)}
    options["WHOLE"] = int(aligned and d_state % WIDTH == 0)
    return nvrtc.Variant(nvrtc.source(HERE / "recurrence.cu"), kernel, tuple(options.items()))


def lanes(kernel: str, d_state: int) -> int:
    """How many share a channel."""
    return 1 << (-(-d_state // (groups_of(kernel, d_state) * WIDTH)) - 1).bit_length()


def groups_of(kernel: str, d_state: int) -> int:
    """How many times four states a lane has: two where many rows make enough threads, which then execute less."""
    return 2 if kernel == "recur_rows" and d_state > WIDTH else 1


def outputs(rows: int) -> int:
    """Rows of the matrix that a warp works on at once."""
    return 2 if rows <= 2 else 4


def shared_of_product(dtype: torch.dtype, rows: int, n_in: int) -> int:
    """Bytes of shared memory: the record, the rows, their scales, and partial sums."""
    sums = rows + 2 * WARPS * rows + WARPS * outputs(rows) * rows
    return STEP_BYTES + rows * n_in * dtype.itemsize + 4 * sums


def ways(dtype: torch.dtype, rows: int, n_out: int, n_in: int, n_multiprocessors: int) -> int:
    """How many warps share rows of the matrix: more while that fills multiprocessors and each has a load to do."""
    found, chunk = 1, 32 * 16 // dtype.itemsize
    n_tasks = -(-n_out // outputs(rows))
    while found < WARPS and n_tasks * found < WARPS * n_multiprocessors and n_in >= 2 * found * chunk:
        found *= 2
    return found


def variants() -> list[nvrtc.Variant]:
    """Every compilation that some call for a published shape needs on some GPU."""
    dtypes = (torch.float32, torch.bfloat16)
    products = [product("product", dtype, n) for dtype in dtypes for n in BUCKETS]
    recurrences = [recurrence(kernel, dtype, 16, False) for dtype in dtypes for kernel in ("recur", "recur_rows")]
    return products + recurrences + [rows("embed", dtype) for dtype in dtypes]


def fused(dtypes: set[torch.dtype], rows: int, d_state: int, zoh: bool) -> list[nvrtc.Variant]:
    """What a step of a bucket of few rows needs, for matrices of these dtypes."""
    found = [product(kernel, dtype, rows) for dtype in dtypes for kernel in ("product", "in_proj")]
    return found + [recurrence("recur", dtype, d_state, zoh) for dtype in dtypes]
