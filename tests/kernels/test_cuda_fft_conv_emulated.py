"""The CUDA kernels of the long convolution, run on the processor."""

from __future__ import annotations

import pytest
import torch
from emulation import emulate

from anymamba.kernels.fft_conv import cuda
from anymamba.parts.fft_conv import fft_conv

if emulate.missing():
    pytest.skip(f"kernels cannot be emulated: {emulate.missing()}", allow_module_level=True)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate.patch(monkeypatch)


def check(u: torch.Tensor, kernel: torch.Tensor, tolerance: float) -> None:
    """Values and both gradients against float64."""
    dy = torch.randn(u.shape, generator=torch.Generator().manual_seed(1)).to(u.dtype)
    wide, filters = (t.detach().double().requires_grad_() for t in (u, kernel))
    y = fft_conv(wide, filters)
    du, dkernel = torch.autograd.grad(y, (wide, filters), dy.double())
    alone = cuda.convolve(dy, kernel, adjoint=True), cuda.correlate(u, dy, kernel)
    found = (cuda.convolve(u, kernel), *alone, *cuda.gradients(u, dy, kernel))
    names = ("y", "du", "dkernel", "du", "dkernel")
    for name, got, want in zip(names, found, (y, du, dkernel, du, dkernel), strict=True):
        assert got.shape == want.shape, name
        assert got.dtype == (torch.float32 if name == "dkernel" else u.dtype), name
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < (tolerance if name != "dkernel" else 3e-6), (name, float(error))


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize(
    ("length", "log"),
    [(1, 9), (256, 9), (257, 10), (700, 11), (2048, 12), pytest.param(4000, 13, marks=pytest.mark.slow)],
)
def test_every_length(length, log):
    assert cuda.logarithm(length) == log
    check(numbers(3, length, 4), numbers(4, length), 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("rows", [1, 4])
def test_dtypes_widths_and_rows(dtype, width, rows):
    """Groups of channels, and one by one."""
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    check(numbers(rows, 130, width, dtype=dtype), numbers(width, 100), tolerance)


def test_strided_inputs():
    u = numbers(2, 6, 40, dtype=torch.bfloat16)
    for view in (u[..., 8:16], u[..., 1:9], u.transpose(1, 2)[:, :, :4]):
        check(view, numbers(view.shape[2], 5), 5e-3)


@pytest.mark.parametrize("of_part", [1, 2, 5])
def test_gradients_of_filters_are_sums_over_parts(of_part, monkeypatch):
    inputs = numbers(9, 50, 2), numbers(9, 50, 2) + 1, numbers(2, 50)
    du, dkernel = cuda.gradients(*inputs)
    monkeypatch.setattr(cuda, "pairs_of_part", lambda *call: of_part)
    again = cuda.gradients(*inputs)
    assert torch.equal(again[0], du)
    torch.testing.assert_close(again[1], dkernel)
    torch.testing.assert_close(cuda.correlate(*inputs), dkernel)


def test_parts_fill_a_gpu():
    """Blocks come in waves; in the last one of two parts half of the places would be empty."""
    assert cuda.pairs_of_part(8, 192, 264, 2) == cuda.pairs_of_part(8, 192, 264, 3) == 2
    assert cuda.pairs_of_part(8, 1 << 20, 264, 2) == 8 and cuda.pairs_of_part(1, 5, 264, 2) == 1
