"""The long convolution by FFT is the sum that defines it, forward and backward, in whatever blocks it runs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from contract import close
from torch import Tensor

from anymamba.layers.h3 import ShiftSSM
from anymamba.parts import fft_conv as module
from anymamba.parts import toeplitz
from anymamba.parts.fft_conv import fast_fft_size, fft_conv, gradients_in_operations

SHAPES = [(2, 1, 3, 1), (2, 2, 3, 2), (1, 7, 1, 3), (3, 33, 2, 33), (2, 8, 3, 20), (1, 101, 2, 64)]


def naive(u: Tensor, kernel: Tensor) -> Tensor:
    """The sum, term by term."""
    y = torch.zeros_like(u)
    for t in range(u.shape[1]):
        for j in range(min(t + 1, kernel.shape[1])):
            y[:, t] += kernel[:, j] * u[:, t - j]
    return y


@pytest.mark.parametrize(("batch", "length", "width", "kernel_length"), SHAPES)
@pytest.mark.parametrize("block", [1, 64, 2**20])
def test_it_is_the_causal_sum(batch, length, width, kernel_length, block, monkeypatch):
    monkeypatch.setattr(module, "CPU_BLOCK", block)
    u = torch.randn(batch, length, width, dtype=torch.float64)
    kernel = torch.randn(width, kernel_length, dtype=torch.float64)
    close(fft_conv(u, kernel), naive(u, kernel), "float64", 1e-13)
    close(fft_conv(u.float(), kernel.float()), naive(u, kernel).float(), "float32", 1e-5)
    strided = u.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(fft_conv(strided, kernel), fft_conv(u, kernel))


@pytest.mark.parametrize("block", [16, 2**20])
@pytest.mark.parametrize("kernel_length", [3, 6, 9])
def test_gradients(kernel_length, block, monkeypatch):
    monkeypatch.setattr(module, "CPU_BLOCK", block)
    u = torch.randn(3, 6, 2, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(2, kernel_length, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fft_conv, (u, kernel))
    assert torch.autograd.gradcheck(fft_conv, (u, kernel.detach()))
    assert torch.autograd.gradcheck(fft_conv, (u.detach(), kernel))


def test_nothing_but_the_inputs_is_kept_for_the_backward_pass():
    u, kernel = torch.randn(2, 50, 3, requires_grad=True), torch.randn(3, 50, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        fft_conv(u, kernel)
    assert sum(kept) == u.numel() + kernel.numel()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, of forward over reverse mode
@pytest.mark.parametrize("kernel_length", [3, 9])
def test_derivatives_of_any_mode_and_order(kernel_length):
    u = torch.randn(2, 6, 2, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(2, kernel_length, dtype=torch.float64, requires_grad=True)
    for inputs in ((u, kernel), (u, kernel.detach()), (u.detach(), kernel)):
        assert torch.autograd.gradcheck(fft_conv, inputs, check_forward_ad=True, check_backward_ad=False)
        assert torch.autograd.gradgradcheck(fft_conv, inputs, check_fwd_over_rev=True)
    third = torch.func.jacfwd(torch.func.jacrev(torch.func.grad(lambda u: fft_conv(u, u[0].T).pow(3).sum())))
    assert third(u[:1].detach()).isfinite().all()


def test_the_differentiable_backward_pass_is_the_fast_one():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        u = torch.randn(3, 33, 2, dtype=dtype, requires_grad=True)
        kernel = torch.randn(2, 20, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
        y, dy = fft_conv(u, kernel), torch.randn(3, 33, 2, dtype=dtype)
        fast = torch.autograd.grad(y, (u, kernel), dy, retain_graph=True)
        slow = torch.autograd.grad(y, (u, kernel), dy, create_graph=True)
        for a, b in zip(fast, slow, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b.detach(), rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-4)


def test_bfloat16_is_computed_in_float32():
    u, kernel = torch.randn(2, 300, 3).bfloat16(), torch.randn(3, 300)
    y = fft_conv(u, kernel)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, fft_conv(u.float(), kernel).bfloat16())


def test_empty():
    for shape in ((0, 5, 2), (2, 0, 2)):
        u = torch.zeros(shape, requires_grad=True)
        kernel = torch.randn(2, 5, requires_grad=True)
        fft_conv(u, kernel).sum().backward()
        assert u.grad is not None and u.grad.shape == shape
        assert not kernel.grad.any()
        for grads in (
            torch.autograd.grad(fft_conv(u, kernel).sum(), (u, kernel), create_graph=True),
            torch.func.grad(lambda u, kernel: fft_conv(u, kernel).sum(), (0, 1))(u, kernel),
        ):
            assert grads[0].shape == shape and not grads[1].any()


def test_fft_sizes_are_the_smallest_fast_ones():
    def is_fast(n: int) -> bool:
        for prime in (2, 3, 5):
            while n % prime == 0:
                n //= prime
        return n == 1

    for n in [*range(1, 300), 1999, 8191]:
        assert fast_fft_size(n) == next(m for m in range(n, 3 * n + 2) if m % 2 == 0 and is_fast(m))


def test_errors():
    with pytest.raises(ValueError, match=r"got \(2, 5, 3\) and \(4, 5\)"):
        fft_conv(torch.zeros(2, 5, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="at least 1"):
        fft_conv(torch.zeros(2, 5, 3), torch.zeros(3, 0))
    with pytest.raises(ValueError, match="convolve the real and imaginary parts"):
        fft_conv(torch.zeros(2, 5, 3), torch.zeros(3, 5, dtype=torch.complex64))


# ---------------------------------------------------------------------------------------------- matrix products


@pytest.mark.parametrize(
    ("rows", "length", "width", "kernel_length"), [(3, 1, 2, 1), (5, 37, 3, 37), (2, 64, 3, 20), (4, 16, 2, 16)]
)
def test_products_with_toeplitz_matrices_are_the_convolution(monkeypatch, rows, length, width, kernel_length):
    monkeypatch.setattr(toeplitz, "BLOCK", 16)
    torch.manual_seed(0)
    u = torch.randn(rows, length, width, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(width, kernel_length, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(rows, length, width, dtype=torch.float64)
    found = []
    for convolve in (fft_conv, partial(toeplitz.convolve, again=gradients_in_operations)):
        y = convolve(u, kernel)
        found.append((y, *torch.autograd.grad(y, (u, kernel), dy)))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    ordered = u.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0)
    same = toeplitz.convolve(ordered, kernel, gradients_in_operations)
    assert same.permute(2, 1, 0).is_contiguous() and torch.equal(same, found[1][0])


def test_products_of_short_numbers_are_as_exact_as_their_rounding(monkeypatch):
    monkeypatch.setattr(toeplitz, "BLOCK", 32)
    torch.manual_seed(0)
    u, kernel = torch.randn(8, 100, 3), torch.randn(3, 100) * 0.9 ** torch.arange(100)
    exact = fft_conv(u.double(), kernel.double())
    error = toeplitz.convolve(u.bfloat16(), kernel, gradients_in_operations).double() - exact
    assert error.norm() <= 2**-7 * exact.norm()


def test_products_serve_many_short_rows_on_a_gpu_only():
    assert toeplitz.is_faster("cuda", torch.bfloat16, 128, 2048)
    assert not toeplitz.is_faster("cuda", torch.bfloat16, 127, 2048)
    assert not toeplitz.is_faster("cuda", torch.float32, 128, 2048)
    assert not toeplitz.is_faster("cpu", torch.bfloat16, 128, 2048)
    assert not toeplitz.is_faster("cuda", torch.float16, 4096, 16384)


@pytest.mark.parametrize("taps", [1, 3, 4, 7, 16])
@pytest.mark.parametrize("length", [1, 2, 8, 13, 32])
def test_products_of_two_blocks_are_the_convolution(length, taps):
    torch.manual_seed(0)
    u = torch.randn(3, length, 2, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(2, taps, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, length, 2, dtype=torch.float64)
    found = []
    for convolve in (fft_conv, partial(toeplitz.convolve_taps, again=gradients_in_operations)):
        y = convolve(u, kernel)
        found.append((y, *torch.autograd.grad(y, (u, kernel), dy)))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("convolve", [toeplitz.convolve, toeplitz.convolve_taps])
def test_products_have_second_derivatives(convolve):
    torch.manual_seed(0)
    u = torch.randn(2, 3, 1, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(partial(convolve, again=gradients_in_operations), (u, kernel))


def test_taps_are_products_on_a_gpu_in_short_numbers_only():
    assert toeplitz.serves_taps("cuda", torch.bfloat16, 64)
    assert not toeplitz.serves_taps("cuda", torch.float32, 64)
    assert not toeplitz.serves_taps("cpu", torch.bfloat16, 64)
    assert not toeplitz.serves_taps("cuda", torch.bfloat16, 4)


def test_products_of_many_rows_compile_into_one_graph(monkeypatch):
    """torch.compile takes no `out=` that is a part of a tensor, so it sees transforms and multiplications."""
    torch.manual_seed(0)
    u, kernel = torch.randn(3, 20, 4, requires_grad=True), torch.randn(4, 20, requires_grad=True)
    shift = ShiftSSM(4, 20)
    monkeypatch.setattr(toeplitz, "is_faster", lambda *_: True)
    monkeypatch.setattr(toeplitz, "serves_taps", lambda *_: True)
    for function, leaves in (
        (lambda u: fft_conv(u, kernel), (u, kernel)),
        (lambda u: shift(u, None)[0], (u, *shift.parameters())),
    ):
        torch.compiler.reset()
        found = []
        for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
            y = run(u)
            found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
