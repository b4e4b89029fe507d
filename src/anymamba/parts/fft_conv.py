"""Causal convolution by FFT with a kernel as long as the sequence. Every time-invariant layer trains with it.

    y[t] = sum over j <= t of kernel[j] u[t - j]

O(length log length) per channel. Sequence and kernel are padded with zeros so that the circular convolution of the
FFT is the causal one. On an NVIDIA GPU the FFTs of up to 4,096 tokens run in shared memory (`kernels/fft_conv`). Short
numbers are convolved by products on tensor cores instead: bfloat16 of up to 4,096 tokens in kernels of this package,
and many rows in those of torch (`toeplitz.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from anymamba.kernels.fft_conv import cuda
from anymamba.kernels.fft_conv.cuda import products
from anymamba.ops.observers import differentiable, plain
from anymamba.parts import toeplitz
from anymamba.parts.derivatives import as_operations, in_kernels, in_operations

CPU_BLOCK, GPU_BLOCK = 2**20, 2**26
"""Padded numbers per FFT call. On a CPU this is a few MB, which stay in its cache between the passes."""
FEW_ROWS = 5
"""With fewer rows the products' order, which has 8, would keep more than half of memory for zeros."""


def fft_conv(
    u: Float[Tensor, "batch length width"], kernel: Float[Tensor, "width kernel_length"]
) -> Float[Tensor, "batch length width"]:
    """Convolve each channel with its own kernel, causally.

    Args:
        u: (batch, length, width), real.
        kernel: (width, kernel_length), real; terms beyond the sequence length are not used.
    Returns (batch, length, width) in u's dtype, summed in float32 or wider. Where u has 16 bits, a GPU may round the
    terms of the kernel to u's dtype. Gradients flow to both arguments, in any mode and of any order. The backward pass
    transforms u again instead of keeping its spectrum.
    Raises ValueError when the shapes disagree or a tensor is complex.
    """
    if u.ndim != 3 or kernel.ndim != 2 or kernel.shape[0] != u.shape[-1] or kernel.shape[1] < 1:
        raise ValueError(
            "fft_conv needs u (batch, length, width) and kernel (width, kernel_length) with kernel_length at least 1, "
            f"got {tuple(u.shape)} and {tuple(kernel.shape)}"
        )
    if u.is_complex() or kernel.is_complex():
        raise ValueError(
            f"fft_conv takes real tensors, got u of {u.dtype} and kernel of {kernel.dtype}; convolve the real and "
            "imaginary parts separately"
        )
    kernel = kernel[:, : max(1, u.shape[1])]
    if as_operations(u, kernel):
        return _operations(u, kernel)
    if in_kernels(u, kernel) and products.serves(u, kernel):
        return _by_products(u, kernel)
    by_products = plain(u, kernel) and toeplitz.is_faster(u.device.type, u.dtype, u.shape[0], int(u.shape[1]))
    if by_products and (toeplitz.in_order(u) or not _in_shared_memory(u, kernel)):
        return toeplitz.convolve(u, kernel, gradients_in_operations)
    return _FFTConv.apply(u, kernel)


def conv_of_taps(
    u: Float[Tensor, "batch length width"], kernel: Float[Tensor, "width taps"]
) -> Float[Tensor, "batch length width"]:
    """`fft_conv` by products on a GPU, for filters of some dozens of terms and numbers of 16 bits."""
    terms = kernel[:, : u.shape[1]]
    if in_kernels(u, terms) and products.serves(u, terms):
        return _by_products(u, terms)
    return toeplitz.convolve_taps(u, kernel, gradients_in_operations)


def fast_fft_size(at_least: int) -> int:
    """The smallest even size of at least `at_least` with factors 2, 3 and 5 only, which FFT libraries are fast for."""
    best = 2 ** max(1, (at_least - 1).bit_length())
    five = 1
    while five < best:
        odd = five
        while odd < best:
            twos = max(1, (-(-at_least // odd) - 1).bit_length())
            best = min(best, odd << twos)
            odd *= 3
        five *= 5
    return best


def _operations(u: Tensor, kernel: Tensor) -> Tensor:
    """The convolution in plain torch operations, which keep whole spectra in memory."""
    if not u.numel():
        return u * kernel[:, 0].to(u.dtype)  # empty, but connected to both inputs
    length, size, wide = u.shape[1], _fft_size(u, kernel), _wide(u, kernel)
    product = torch.fft.rfft(u.transpose(1, 2).to(wide), size) * torch.fft.rfft(kernel.to(wide), size)
    return torch.fft.irfft(product, size)[..., :length].transpose(1, 2).to(u.dtype)


def _by_products(u: Tensor, kernel: Tensor) -> Tensor:
    """For the backward pass u is kept in the order of the products, unless zeros would make it much longer."""
    if u.shape[0] < FEW_ROWS or products.by_time(u) or not differentiable(u, kernel):
        return _Products.apply(u, None, kernel)
    x, lines = _Ordered.apply(u, kernel.detach())
    return _Products.apply(x, lines, kernel)


class _Ordered(torch.autograd.Function):
    """The same numbers in the order of the products, and the filters in their words."""

    @staticmethod
    def forward(ctx, u: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
        x, lines = products.order(u, kernel)
        ctx.mark_non_differentiable(lines)
        ctx.set_materialize_grads(False)
        return x, lines

    @staticmethod
    def backward(ctx, dx: Tensor | None, dlines: None) -> tuple[Tensor | None, None]:
        return dx, None


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, lines: Tensor | None, kernel: Tensor) -> Tensor:
        """`lines` is what `products.order` returned with x; None if x is in another order."""
        ctx.save_for_backward(x, kernel)
        ctx.ordered = lines is not None
        x, lines = products.order(x, kernel) if lines is None else (x, lines)
        return products.convolve(x, lines, kernel)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x, kernel = ctx.saved_tensors
        if in_operations(dy, x, kernel) or not in_kernels(dy, x, kernel):
            again = gradients_in_operations(dy, x, kernel)
            return again[0], None, again[1]
        du, dkernel = products.gradients(x, dy, kernel, ctx.ordered, *ctx.needs_input_grad[::2])
        return du, None, None if dkernel is None else dkernel.to(kernel.dtype)


class _FFTConv(torch.autograd.Function):
    """The convolution in blocks of rows and channels, so that the padded copies and spectra stay small."""

    @staticmethod
    def forward(ctx, u: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(u, kernel)
        if _in_shared_memory(u, kernel):
            return cuda.convolve(u, kernel)
        length, size, wide = u.shape[1], _fft_size(u, kernel), _wide(u, kernel)
        kernel_spectrum = torch.fft.rfft(kernel.to(wide), size, norm="forward")  # with the inverse's 1 / size
        y = torch.empty_like(u, memory_format=torch.contiguous_format)
        for rows, channels in _blocks(u, size):
            product = _spectrum(u[rows, :, channels], size, wide).mul_(kernel_spectrum[channels])
            y[rows, :, channels] = torch.fft.irfft(product, size, norm="forward")[..., :length].transpose(1, 2)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Both gradients are correlations: products with a conjugate spectrum."""
        u, kernel = ctx.saved_tensors
        if in_operations(dy, u, kernel):
            return gradients_in_operations(dy, u, kernel)
        if _in_shared_memory(u, kernel):
            return _gradients_in_shared_memory(dy, u, kernel, ctx.needs_input_grad)
        length, size, wide = u.shape[1], _fft_size(u, kernel), _wide(u, kernel)
        kernel_spectrum = torch.fft.rfft(kernel.to(wide), size, norm="forward").conj_physical()
        du = torch.empty_like(u, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        correlation = torch.zeros_like(kernel_spectrum)
        for rows, channels in _blocks(u, size):
            dy_spectrum = _spectrum(dy[rows, :, channels], size, wide)
            if ctx.needs_input_grad[1]:
                u_spectrum = _spectrum(u[rows, :, channels], size, wide)
                correlation[channels] += u_spectrum.conj_physical_().mul_(dy_spectrum).sum(0)
            if du is not None:
                product = dy_spectrum.mul_(kernel_spectrum[channels])
                du[rows, :, channels] = torch.fft.irfft(product, size, norm="forward")[..., :length].transpose(1, 2)
        if not ctx.needs_input_grad[1]:
            return du, None
        return du, torch.fft.irfft(correlation, size)[:, : kernel.shape[1]].to(kernel.dtype)


def gradients_in_operations(dy: Tensor, u: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients as convolutions, which can be differentiated again: a correlation is one with time reversed."""
    wide = _wide(u, kernel)
    reversed_dy = dy.to(wide).flip(1)
    du = fft_conv(reversed_dy, kernel).flip(1)
    if not u.numel():
        return du.to(u.dtype), torch.zeros_like(kernel)
    channels = u.to(wide).transpose(1, 2).flatten(0, 1)  # each channel of each row is the kernel for its dy
    dkernel = fft_conv(reversed_dy.transpose(1, 2).flatten(0, 1).T[None], channels)[0].flip(0)
    dkernel = dkernel[: kernel.shape[1]].T.unflatten(0, (u.shape[0], -1)).sum(0)
    return du.to(u.dtype), dkernel.to(kernel.dtype)


def _gradients_in_shared_memory(
    dy: Tensor, u: Tensor, kernel: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    if not wanted[1]:
        return cuda.convolve(dy, kernel, adjoint=True), None
    if not wanted[0]:
        return None, cuda.correlate(u, dy, kernel).to(kernel.dtype)
    du, dkernel = cuda.gradients(u, dy, kernel)
    return du, dkernel.to(kernel.dtype)


def _in_shared_memory(u: Tensor, kernel: Tensor) -> bool:
    """Whether one kernel does it all."""
    return in_kernels(u, kernel) and cuda.serves(u, kernel)


def _spectrum(x: Float[Tensor, "rows length width"], size: int, wide: torch.dtype) -> Tensor:
    """(rows, width, frequencies). One pass moves time to the last dimension, converts and pads."""
    padded = x.new_empty(x.shape[0], x.shape[2], size, dtype=wide)
    padded[..., : x.shape[1]] = x.transpose(1, 2)
    padded[..., x.shape[1] :] = 0
    return torch.fft.rfft(padded)


def _fft_size(u: Tensor, kernel: Tensor) -> int:
    return fast_fft_size(int(max(1, u.shape[1]) + kernel.shape[1] - 1))


def _wide(u: Tensor, kernel: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(u.dtype, kernel.dtype), torch.float32)


def _blocks(u: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and channels; they depend only on the shapes."""
    batch, _, width = u.shape
    limit = CPU_BLOCK if u.device.type == "cpu" else GPU_BLOCK
    channels = min(width, max(1, limit // size))
    rows = max(1, limit // (size * max(1, channels)))
    if u.numel():
        for row in range(0, batch, rows):
            for channel in range(0, width, channels):
                yield slice(row, row + rows), slice(channel, channel + channels)
