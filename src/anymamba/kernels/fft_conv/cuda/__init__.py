"""The long convolution in CUDA C++ for NVIDIA GPUs: FFTs in shared memory, so that numbers are read and written once.

cuFFT passes over padded numbers in float32 about ten times; this takes sequences of up to 4,096 tokens. Nothing here
waits for the GPU, and every sum has an order of its own.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from anymamba.runtimes import nvrtc
from anymamba.runtimes.launching import Call, aligned, is_served, layout

TENSORS = {"u": 3, "y": 3, "g": 3}
"""Fields that are a struct of address, strides and dtype, and their dimensions."""
FIELDS = (
    *("filters", "spectra", "parts", "rows", "length", "width", "taps", "pairs_of_part", "n_parts"),
    *("adjoint", "aligned"),
)
LAYOUT = layout(TENSORS, FIELDS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOGARITHMS = range(9, 14)
"""Of the numbers of an FFT, to base 2. With more, a block's threads have too few registers, and cuFFT is as fast."""
POINTS = 16
"""Numbers of a thread."""
BLOCK_THREADS = 512
"""Threads of a multiprocessor at a time: what the kernels leave each other registers for (BLOCKS of fft.cuh)."""


def serves(u: Tensor, kernel: Tensor) -> bool:
    """Whether the kernels take these: numbers of up to 32 bits, at most 4,096 tokens, on a GPU that compiles them."""
    short = u.dtype in DTYPES and kernel.dtype in DTYPES
    if not short or not u.numel() or u.shape[1] > 1 << (LOGARITHMS[-1] - 1) or not is_served(u):
        return False
    return shared_bytes(logarithm(u.shape[1])) <= nvrtc.device(u.device.index or 0).shared_of_block


def convolve(u: Tensor, kernel: Tensor, adjoint: bool = False) -> Tensor:
    """The convolution of each channel with its filter, or the transposed map: a correlation.

    Args:
        u: (rows, length, width).
        kernel: (width, taps), at most `length` taps.
    Returns (rows, length, width) in u's dtype, computed in float32.
    """
    u = dense(u)
    call, log = _start(u, kernel), logarithm(u.shape[1])
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    call.strided(y=y)
    _spectra(call, kernel, adjoint)
    channels = 8 // u.itemsize
    grouped = u.shape[2] % channels == 0 and all(aligned(t, channels) for t in (u, y))
    call.set(aligned=grouped)
    n_groups = u.shape[2] // (channels if grouped else 1)
    call.launch(variant(log, "convolve"), -(-u.shape[0] // 2) * n_groups, threads(log), shared_bytes(log))
    return y


def correlate(u: Tensor, dy: Tensor, kernel: Tensor) -> Tensor:
    """The gradient of the filters, (width, taps) in float32, from inputs and gradients (rows, length, width)."""
    call = _start(dense(u), kernel)
    call.strided(g=dense(dy))
    return _correlate(call, kernel)


def gradients(u: Tensor, dy: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the inputs, in their dtype, and of the filters, as `correlate`: three FFTs for four."""
    call, du = _start(dense(u), kernel), torch.empty_like(u, memory_format=torch.contiguous_format)
    call.strided(g=dense(dy), y=du)
    _spectra(call, kernel, adjoint=True)
    return du, _correlate(call, kernel)


def _spectra(call: Call, kernel: Tensor, adjoint: bool) -> None:
    """Compute those of the filters."""
    log = logarithm(call["length"])
    call.dense(filters=kernel.float())
    call.scratch("spectra", call["width"], 2 << log, dtype=torch.float32)
    call.set(adjoint=adjoint)
    call.launch(variant(log, "spectra"), call["width"], threads(log), shared_bytes(log))


def _correlate(call: Call, kernel: Tensor) -> Tensor:
    log, pairs, width = logarithm(call["length"]), -(-call["rows"] // 2), call["width"]
    ffts = 3 if call["y"] else 2
    of_part = pairs_of_part(pairs, width, call.n_multiprocessors * (BLOCK_THREADS // threads(log) or 1), ffts)
    call.set(pairs_of_part=of_part, n_parts=-(-pairs // of_part))
    parts = call.scratch("parts", call["n_parts"], *kernel.shape, dtype=torch.float32)
    call.launch(variant(log, "correlate"), width * call["n_parts"], threads(log), shared_bytes(log))
    return parts.sum(0)


@cache
def pairs_of_part(pairs: int, width: int, places: int, ffts: int) -> int:
    """The pairs of rows that a block takes so that all are done soonest; a GPU has `places` blocks at a time.

    A pair takes so many FFTs, and a block one more.
    """

    def time(n: int) -> int:
        return -(-width * -(-pairs // n) // places) * (ffts * n + 1)

    return min(range(1, pairs + 1), key=time)


def _start(u: Tensor, kernel: Tensor) -> Call:
    call = Call(LAYOUT, u)
    call.strided(u=u)
    call.set(rows=u.shape[0], length=u.shape[1], width=u.shape[2], taps=kernel.shape[1])
    return call


def dense(t: Tensor) -> Tensor:
    """The tensor, or a copy whose channels are neighbours in memory."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def logarithm(length: int) -> int:
    """Of the numbers of the FFT, to base 2: at least twice the length."""
    return max(LOGARITHMS[0], (2 * length - 1).bit_length())


def threads(log: int) -> int:
    return (1 << log) // POINTS


def shared_bytes(log: int) -> int:
    """Of a block: fft.cuh has the numbers with one of padding for every 16, and a thread keeps 8 bytes for a point."""
    return ((1 << log) + threads(log)) * 8 + threads(log) * POINTS * 8


@cache
def variant(log: int, kernel: str) -> nvrtc.Variant:
    """A kernel for FFTs of 2^log numbers."""
    return nvrtc.Variant(nvrtc.source(Path(__file__).parent / "fft_conv.cu"), kernel, (("LOG_N", log),))


def variants() -> list[nvrtc.Variant]:
    """Every compilation that some call on some GPU needs."""
    return [variant(log, "convolve") for log in LOGARITHMS]
