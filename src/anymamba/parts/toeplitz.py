"""Causal convolution by matrix products with the Toeplitz matrix of the kernel, for many rows with the same kernel.

    y = T u,   T[t, s] = kernel[t - s],   u of shape (length, rows) for each channel

An FFT pads to twice the length in float32 and passes about ten times over that. The products read and write rows of 16
bits once, and run on the matrix units of a GPU. The matrix costs length^2 / 2 numbers a channel, however many rows
there are; H3 with heads of 8 has 64 rows for each sequence. Only blocks at or below the diagonal are made, a strip of
BLOCK outputs at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

BLOCK = 512
"""Outputs in a strip of the matrix: shorter strips skip more zeros, longer ones make larger products."""
ROWS_PER_LENGTH = 16
"""The products move fewer bytes than the FFT from length / ROWS_PER_LENGTH rows on: per channel, forward and backward
move about 10 length^2 bytes for matrices, and the FFT about 150 length rows."""
LONGEST = 8192
"""A strip of more columns would take much memory."""


def is_faster(device_type: str, dtype: torch.dtype, rows: int, length: int) -> bool:
    """Whether `convolve` is the faster way, by bytes, and as exact as other products: for numbers of 16 bits only."""
    short = dtype in (torch.bfloat16, torch.float16)
    return device_type == "cuda" and short and 0 < length <= LONGEST and rows * ROWS_PER_LENGTH >= length


def convolve(
    u: Float[Tensor, "rows length width"], kernel: Float[Tensor, "width kernel_length"]
) -> Float[Tensor, "rows length width"]:
    """The causal convolution of each channel with its own kernel, whose terms are rounded to u's dtype.

    The kernel has at most `length` terms. Inputs whose memory is ordered as (width, length, rows) are not copied, and
    outputs have that order.
    """
    return _Convolution.apply(u, kernel)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(u, kernel)
        x, whole = _columns(u), _extended(kernel, u)
        y = torch.empty_like(x)
        for start, stop in _strips(x.shape[1]):
            line = F.pad(whole[:, :stop].flip(1), (0, stop - start - 1))
            torch.bmm(_matrix(line, stop - start), x[:, :stop], out=y[:, start:stop])
        return y.permute(2, 1, 0)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        u, kernel = ctx.saved_tensors
        g = _columns(dy)
        du = _of_inputs(g, _extended(kernel, u)).permute(2, 1, 0) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return du, None
        return du, _of_kernel(g, _columns(u))[:, : kernel.shape[1]].to(kernel.dtype)


def _of_inputs(g: Float[Tensor, "width length rows"], whole: Float[Tensor, "width length"]) -> Tensor:
    """The transposed matrix times the gradient of the outputs."""
    length, dx = g.shape[1], torch.empty_like(g)
    for start, stop in _strips(length):
        line = F.pad(whole[:, : length - start], (stop - start - 1, 0))
        torch.bmm(_matrix(line, stop - start), g[:, start:], out=dx[:, start:stop])
    return dx


def _of_kernel(g: Float[Tensor, "width length rows"], x: Float[Tensor, "width length rows"]) -> Tensor:
    """The gradient of the kernel: the sums along the diagonals of g x^T, in float32 or wider."""
    width, length, _ = x.shape
    found = x.new_zeros(width, length, dtype=torch.promote_types(x.dtype, torch.float32))
    for start, stop in _strips(length):
        n = stop - start
        # row i of the product, bottom up, belongs i places further to the right; rows that are one number longer than
        # the sums have that shift when they are read as rows of the sums' length
        skewed = x.new_zeros(width, n, n + stop)
        torch.bmm(g[:, start:stop].flip(1), x[:, :stop].transpose(1, 2), out=skewed[:, :, :stop])
        sums = skewed.flatten(1)[:, : n * (n + stop - 1)].view(width, n, n + stop - 1)
        found[:, :stop] += sums.sum(1, dtype=found.dtype)[:, :stop].flip(1)
    return found


def _matrix(line: Float[Tensor, "width rows_plus_columns_minus_1"], rows: int) -> Float[Tensor, "width rows columns"]:
    """matrix[i, j] = line[rows - 1 - i + j]."""
    return line.unfold(1, line.shape[1] - rows + 1, 1).flip(1)


def _extended(kernel: Tensor, u: Tensor) -> Float[Tensor, "width length"]:
    """The kernel in u's dtype, with zeros up to the length."""
    return F.pad(kernel.to(u.dtype), (0, u.shape[1] - kernel.shape[1]))


def _columns(u: Float[Tensor, "rows length width"]) -> Float[Tensor, "width length rows"]:
    return u.permute(2, 1, 0).contiguous()


def _strips(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, BLOCK):
        yield start, min(start + BLOCK, length)
