"""Causal convolution by matrix products with the Toeplitz matrix of the kernel, for many rows with the same kernel.

    y = T u,   T[t, s] = kernel[t - s],   u of shape (length, rows) for each channel

An FFT pads to twice the length in float32 and passes about ten times over that. The products read and write rows of 16
bits once, and run on the matrix units of a GPU. The matrix costs length^2 / 2 numbers a channel, however many rows
there are; H3 with heads of 8 has 64 rows for each sequence. Only blocks at or below the diagonal are made, a strip of
BLOCK outputs at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from anymamba.parts.derivatives import in_operations

Gradients = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Computes the gradients of u and the kernel from those of y, u and the kernel, in operations that have derivatives."""
BLOCK = 512
"""Outputs in a strip of the matrix: shorter strips skip more zeros, longer ones make larger products."""
ROWS_PER_LENGTH = 16
"""The products move fewer bytes than the FFT from length / ROWS_PER_LENGTH rows on. Counted forward and backward: 12
length^2 bytes a channel for matrices and 40 for each number of u, against 250 for each number by FFT."""
LONGEST = 8192
"""A strip of more columns would take much memory."""


def is_faster(device_type: str, dtype: torch.dtype, rows: int, length: int) -> bool:
    """Whether `convolve` is the faster way, by bytes, and as exact as other products: for numbers of 16 bits only."""
    short = dtype in (torch.bfloat16, torch.float16)
    return device_type == "cuda" and short and 0 < length <= LONGEST and rows * ROWS_PER_LENGTH >= length


def in_order(u: Tensor) -> bool:
    """Whether `convolve` reads u where it lies: otherwise copies cost more than FFTs in shared memory."""
    return u.permute(2, 1, 0).is_contiguous()


def convolve(
    u: Float[Tensor, "rows length width"], kernel: Float[Tensor, "width kernel_length"], again: Gradients
) -> Float[Tensor, "rows length width"]:
    """The causal convolution of each channel with its own kernel, whose terms are rounded to u's dtype.

    The kernel has at most `length` terms. Inputs whose memory is ordered as (width, length, rows) are not copied, and
    outputs have that order. `again` computes the gradients where they are differentiated themselves.
    """
    return _Convolution.apply(u, kernel, again)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, kernel: Tensor, again: Gradients) -> Tensor:
        ctx.save_for_backward(u, kernel)
        ctx.again = again
        x, whole = _columns(u), _extended(kernel, u)
        y = torch.empty_like(x)
        for start, stop in _strips(x.shape[1]):
            line = F.pad(whole[:, :stop].flip(1), (0, stop - start - 1))
            torch.bmm(_matrix(line, stop - start), x[:, :stop], out=y[:, start:stop])
        return y.permute(2, 1, 0)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        u, kernel = ctx.saved_tensors
        if in_operations(dy, u, kernel):
            return *ctx.again(dy, u, kernel), None
        g = _columns(dy)
        du = _of_inputs(g, _extended(kernel, u)).permute(2, 1, 0) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return du, None, None
        return du, _of_kernel(g, _columns(u))[:, : kernel.shape[1]].to(kernel.dtype), None


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
        skewed = x.new_zeros(width, n, n + stop)
        torch.bmm(g[:, start:stop].flip(1), x[:, :stop].transpose(1, 2), out=skewed[:, :, :stop])
        found[:, :stop] += _sums_of_skewed(skewed, found.dtype)[:, :stop].flip(1)
    return found


def _sums_of_skewed(
    skewed: Float[Tensor, "width rows rows_plus_columns"], dtype: torch.dtype
) -> Float[Tensor, "width rows_plus_columns_minus_1"]:
    """The sums along the diagonals of a matrix whose rows are bottom up and are followed by zeros.

    Row i, counted from below, belongs i places further to the right. Rows that are one number longer than the sums have
    that shift when they are read as rows of the sums' length.
    """
    width, rows, length = skewed.shape
    return skewed.flatten(1)[:, : rows * (length - 1)].view(width, rows, length - 1).sum(1, dtype=dtype)


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


# ----------------------------------------------------------------------------------------------- filters of many taps

LEAST_TAPS = 16
"""With fewer taps the short convolution's own kernels are faster."""


def serves_taps(device_type: str, dtype: torch.dtype, taps: int) -> bool:
    """Whether `convolve_taps` is faster than one multiplication for each tap, and as exact as other products."""
    return device_type == "cuda" and dtype in (torch.bfloat16, torch.float16) and taps >= LEAST_TAPS


def convolve_taps(
    u: Float[Tensor, "rows length width"], kernel: Float[Tensor, "width taps"], again: Gradients
) -> Float[Tensor, "rows length width"]:
    """The causal convolution with a kernel of some dozens of terms, which are rounded to u's dtype.

    Time is cut into blocks as long as the kernel. A block of outputs is the product of a matrix of two blocks, the same
    for all, with this block of inputs and the one before. `again` is as in `convolve`.
    """
    return _Taps.apply(u, kernel, again)


class _Taps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, kernel: Tensor, again: Gradients) -> Tensor:
        ctx.save_for_backward(u, kernel)
        ctx.again = again
        size = _power_of_two(kernel.shape[1])
        y = torch.bmm(_windows(u, size), _two_blocks(kernel.to(u.dtype), size).transpose(1, 2))
        return _in_rows(y, u)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        u, kernel = ctx.saved_tensors
        if in_operations(dy, u, kernel):
            return *ctx.again(dy, u, kernel), None
        size, taps = _power_of_two(kernel.shape[1]), kernel.shape[1]
        g = _windows(dy.to(u.dtype), size)[..., size:]  # (width, rows blocks, size)
        du = _in_rows(_added(torch.bmm(g, _two_blocks(kernel.to(u.dtype), size)), u), u)
        skewed = u.new_zeros(u.shape[2], size, 3 * size)
        torch.bmm(g.flip(2).transpose(1, 2), _windows(u, size), out=skewed[:, :, : 2 * size])
        wide = torch.promote_types(u.dtype, torch.float32)
        dkernel = _sums_of_skewed(skewed, wide)[:, : 2 * size].flip(1)[:, :taps]
        return du, dkernel.to(kernel.dtype), None


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def _windows(u: Float[Tensor, "rows length width"], size: int) -> Float[Tensor, "width rows_blocks two_sizes"]:
    """Each block of time with the one before it, channel by channel; zeros before the first and after the last."""
    blocks = -(-u.shape[1] // size)
    padded = F.pad(u, (0, 0, size, blocks * size - u.shape[1]))
    return padded.unfold(1, 2 * size, size).permute(2, 0, 1, 3).flatten(1, 2)


def _two_blocks(kernel: Float[Tensor, "width taps"], size: int) -> Float[Tensor, "width size two_sizes"]:
    """The matrix [i, j] = kernel[size + i - j]."""
    return _matrix(F.pad(F.pad(kernel, (0, 2 * size - kernel.shape[1])).flip(1), (0, size - 1)), size)


def _added(d: Float[Tensor, "width rows_blocks two_sizes"], u: Tensor) -> Float[Tensor, "width rows_blocks size"]:
    """The gradient of each block: from its own window and from the next one, in which it comes first."""
    first, second = d.unflatten(1, (u.shape[0], -1)).chunk(2, dim=3)
    return (second + F.pad(first[:, :, 1:], (0, 0, 0, 1))).flatten(1, 2)


def _in_rows(y: Float[Tensor, "width rows_blocks size"], u: Tensor) -> Float[Tensor, "rows length width"]:
    """The blocks one after the other, without what is after the last token, in u's order of dimensions."""
    return y.reshape(u.shape[2], u.shape[0], -1)[:, :, : u.shape[1]].permute(1, 2, 0).contiguous()
