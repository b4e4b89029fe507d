"""Which kernels a call of the convolution takes, and the layout of their struct Parameters."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from anymamba.kernels.causal_conv1d.arguments import ConvArguments
from anymamba.runtimes import launching, nvrtc

HERE = Path(__file__).parent

TENSORS = {"x": 3, "y": 3, "dy": 3, "dx": 3, "weight": 3}
"""Fields that are a struct Rows, and their dimensions."""

FIELDS = (
    *("bias", "bias_dtype", "initial_state", "last_state", "dlast_state", "dinitial_state", "slopes", "parts"),
    *("dweight", "dweight_dtype", "dbias", "dbias_dtype", "offsets", "offsets_are_long"),
    *("batch", "length", "d_inner", "width", "n_sequences", "silu"),
    *("piece", "n_groups", "n_blocks", "n_parts", "taps", "aligned"),
)

LAYOUT = launching.layout(TENSORS, FIELDS)

FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TAPS = 4
"""Of the fast kernels."""
THREADS, WARPS, CHANNELS, BLOCK_CHANNELS = 128, 4, 4, 128
"""Of a block; channels of a lane and of a block of the fast kernels."""
WAYS = 16
"""Of `sum_parts`: see parameters.cuh."""
SHARED_OF_WEIGHTS = 4 * (TAPS + 1) * BLOCK_CHANNELS
SLOTS = 12
"""Of fast.cu: tokens of a tensor that a warp has in shared memory."""
RUN, GENERAL_PIECE = 8, 512
"""Of the general kernels: tokens or taps of a thread, and tokens of a part of the weights' gradients."""

FORWARD_BLOCKS, BACKWARD_BLOCKS = 5, 3
"""Blocks that share a multiprocessor, as the fast kernels declare."""
FORWARD_PIECES, BACKWARD_PIECES = range(8, 33, 4), range(8, 193, 4)
"""Tokens that a warp may take. With so few forward asks for most of them before it works on any."""
FORWARD_PIECES_OF_FLOATS, BACKWARD_PIECES_OF_FLOATS = range(8, 9), range(20, 21)
"""The same for tokens in float32."""
SHORT_PIECES, BLOCKS_OF_SHORT = range(8, 25, 4), 2
"""Of a short input: tokens of a warp, and the blocks for each multiprocessor."""
START = 12
"""What a piece costs beside its tokens, in tokens: what it reads twice, and its weights."""


def is_fast(a: ConvArguments) -> bool:
    """Whether the fast kernels serve; they read numbers of at most four bytes."""
    wide = a.bias is not None and a.bias.dtype == torch.float64
    return a.width <= TAPS and a.dtype == torch.float32 and a.x.dtype in FAST_DTYPES and not wide


@cache
def fast(kernel: str, dtype: torch.dtype) -> nvrtc.Variant:
    """A kernel of fast.cu."""
    return nvrtc.Variant(nvrtc.source(HERE / "fast.cu"), kernel, (("DTYPE", nvrtc.DTYPES[dtype]),))


@cache
def general(kernel: str, dtype: torch.dtype) -> nvrtc.Variant:
    """A kernel of general.cu, by the dtype of sums."""
    return nvrtc.Variant(nvrtc.source(HERE / "general.cu"), kernel, (("DOUBLE", int(dtype == torch.float64)),))


def variants() -> list[nvrtc.Variant]:
    """Every compilation that some call on some GPU needs."""
    found = [fast("forward", dtype) for dtype in FAST_DTYPES]
    return found + [general("forward", dtype) for dtype in (torch.float32, torch.float64)]


def shared_of_slots(dtype: torch.dtype, n_tensors: int) -> int:
    """Bytes of shared memory in which a block's warps have tokens of so many tensors."""
    return WARPS * n_tensors * SLOTS * BLOCK_CHANNELS * dtype.itemsize


@cache
def piece_of(length: int, rows: int, n_multiprocessors: int, held: int, pieces: range) -> int:
    """The tokens of a warp with which the blocks of all rows take the least time; a multiprocessor holds so many.

    A short input gets two blocks for each multiprocessor, so that all have the same work: at 2,048 tokens of 1,536
    channels that was 10 % faster in forward and 5 % in backward.
    """

    def blocks(piece: int) -> int:
        return rows * -(-length // (piece * WARPS))

    def cost(piece: int) -> int:
        return -(-blocks(piece) // (n_multiprocessors * held)) * (piece + START)

    short = (piece for piece in SHORT_PIECES if blocks(piece) <= BLOCKS_OF_SHORT * n_multiprocessors)
    return next(short, None) or min(pieces, key=cost)
