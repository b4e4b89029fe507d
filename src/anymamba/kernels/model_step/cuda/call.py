"""Which kernels a step takes, and the layout of their struct Parameters."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from anymamba.kernels.packed_linear import cuda as packed_linear
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
    *("row_bytes", "x_stride"),
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
PACKED = ("q8_0", "q4_0")
"""Formats with blocks that products here read."""
BLOCKS_OF_CONVOLUTION = 4
"""Of a multiprocessor, of `convolve_rows`."""
STORE, ADD, LOGITS = 0, 1, 2
LEAST_WARPS = 4
"""Of products with weights in blocks."""
THREADS, WARPS = 256, 8
"""Of products, `embed` and `convolve_rows`."""
RECURRENCE_THREADS, WIDTH = 128, 4
"""Of `recur`, and of each set of `recur_rows`; neighbouring states of a lane."""
SETS, LEAST_LANES, MOST_STATES_OF_ONE_GROUP = 2, 4, 64
"""Of `recur_rows`: sets of threads in a block, lanes of a channel, and states where a lane has four."""
ROWS_OF_THREAD, ENOUGH_BLOCKS = (8, 4, 2), 2
"""Of `recur_rows`: the most rows with which a multiprocessor has this many blocks."""
BLOCKS_OF_MULTIPROCESSOR = 2
"""Of products."""


@cache
def product(kernel: str, dtype: torch.dtype, rows: int) -> nvrtc.Variant:
    """`product` or `in_proj`, for a bucket of 1, 2, 4 or 8 rows."""
    options = (("WEIGHT", nvrtc.DTYPES[dtype]), ("ROWS", rows))
    return nvrtc.Variant(nvrtc.source(HERE / "product.cu"), kernel, options)


@cache
def packed_product(kernel: str, format: str, n_in: int) -> nvrtc.Variant:
    """`product` or `in_proj` with a weight in blocks."""
    source = nvrtc.source(HERE / "packed_product.cu", packed_linear.HERE)
    return nvrtc.Variant(source, kernel, packed_linear.options(format, n_in))


@cache
def packed_launch(format: str, rows: int, n_in: int, n_out: int) -> packed_linear.Launch:
    """How `packed_product` is launched: each of the 128 sums of a tile has a thread."""
    launch = packed_linear.launch_of(format, rows, n_in, n_out)
    n_warps = max(LEAST_WARPS, launch.n_warps)
    of_warp = (launch.shared - rows * launch.x_stride - 16) // launch.n_warps
    before = STEP_BYTES + 4 * MOST_ROWS * (1 + packed_linear.MOST_WARPS)
    return launch._replace(n_warps=n_warps, shared=before + rows * launch.x_stride + n_warps * of_warp + 16)


@cache
def rows(kernel: str, dtype: torch.dtype, taps: int = 4, width: int = 4, rows_of_thread: int = 2) -> nvrtc.Variant:
    """`embed`, or `convolve_rows` with the taps of the convolution, and channels and rows of a thread."""
    options = (("DTYPE", nvrtc.DTYPES[dtype]), ("TAPS", taps), ("WIDTH", width), ("ROWS", rows_of_thread))
    return nvrtc.Variant(nvrtc.source(HERE / "rows.cu"), kernel, options)


@cache
def recurrence(
    kernel: str, dtype: torch.dtype, d_state: int, zoh: bool, aligned: bool = True, rows: int = 8
) -> nvrtc.Variant:
    """`recur` or `recur_rows`, with Euler's rule or zero-order hold; recurrence_rows.cu has `aligned` and `rows`."""
    options = {"DTYPE": nvrtc.DTYPES[dtype], "D_STATE": d_state, "LANES": lanes(kernel, d_state)}
    options |= {"GROUPS": groups_of(kernel, d_state), "ZOH": int(zoh)}
    options["WHOLE"] = int(aligned and d_state % WIDTH == 0)
    if kernel == "recur_rows":
        options["ROWS"] = rows
    file = "recurrence.cu" if kernel == "recur" else "recurrence_rows.cu"
    return nvrtc.Variant(nvrtc.source(HERE / file), kernel, tuple(options.items()))


def lanes(kernel: str, d_state: int) -> int:
    """How many share a channel."""
    wanted = 1 << (-(-d_state // (groups_of(kernel, d_state) * WIDTH)) - 1).bit_length()
    return max(LEAST_LANES, wanted) if kernel == "recur_rows" else wanted


def groups_of(kernel: str, d_state: int) -> int:
    """How many times four states a lane has: two where a block would have too few channels for copies of 16 bytes."""
    return 2 if kernel == "recur_rows" and d_state > MOST_STATES_OF_ONE_GROUP else 1


def outputs(rows: int) -> int:
    """Rows of the matrix that a warp works on at once."""
    return 2 if rows <= 2 else 4


def rows_of_convolution(rows: int, d_inner: int, width: int, n_multiprocessors: int) -> int:
    """Rows of a thread of `convolve_rows`: two share weights, where one would make more blocks than run at once."""
    n_blocks = rows * d_inner // (width * THREADS)
    return 2 if n_blocks >= BLOCKS_OF_CONVOLUTION * n_multiprocessors else 1


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


def dt_stride(channels: int, n_in: int) -> int:
    """Elements between rows of dt in the shared memory of `recur_rows`."""
    return max(channels, n_in + (0 if n_in % 64 else 32))


def rows_of_recurrence(rows: int, blocks_of_row: int, d_state: int, n_multiprocessors: int) -> int:
    """Rows of a thread of `recur_rows`: all are under way at once, and fewer make more blocks."""
    most = ROWS_OF_THREAD[0] // groups_of("recur_rows", d_state)
    fitting = [n for n in ROWS_OF_THREAD if n <= most]
    wanted = ENOUGH_BLOCKS * n_multiprocessors
    return next((n for n in fitting if -(-rows // (SETS * n)) * blocks_of_row >= wanted), fitting[-1])


def shared_of_recurrence(dtype: torch.dtype, rows: int, d_state: int, n_in: int) -> int:
    """Bytes of shared memory of `recur_rows`: the record, bias, D, delta, activations, and dt_proj's weight."""
    channels, rows = RECURRENCE_THREADS // lanes("recur_rows", d_state), SETS * rows
    of_row, stride = channels + 8, dt_stride(channels, n_in)
    numbers = rows * (2 * of_row + stride + 2 * d_state) + (channels * stride if n_in else 0)
    return STEP_BYTES + 4 * (2 * channels + rows * of_row) + numbers * dtype.itemsize


def variants() -> list[nvrtc.Variant]:
    """Every compilation that some call for a published shape needs on some GPU."""
    dtypes = (torch.float32, torch.bfloat16)
    products = [product("product", dtype, n) for dtype in dtypes for n in BUCKETS]
    recurrences = [recurrence("recur", dtype, 16, False) for dtype in dtypes]
    recurrences += [recurrence("recur_rows", dtype, 16, False, rows=n) for dtype in dtypes for n in ROWS_OF_THREAD]
    packed = [packed_product("product", format, 256) for format in PACKED]
    return products + recurrences + packed + [rows("embed", dtype) for dtype in dtypes]
