"""Tables of powers in one operation, as on a GPU, are those of repeated doubling, with their gradients."""

from __future__ import annotations

import pytest
import torch

from anymamba.layers.s4 import S4
from anymamba.layers.s4d import S4D
from anymamba.parts import diagonal


@pytest.mark.parametrize("n_blocks", [1, 5, 8])
@pytest.mark.parametrize("is_complex", [False, True])
def test_powers_at_once_are_those_of_doubling(is_complex, n_blocks):
    torch.manual_seed(0)
    size = 0.1 + 0.899 * torch.rand(5, 4, dtype=torch.float64)
    angle = torch.randn(5, 4, dtype=torch.float64)
    base = torch.polar(size, angle) if is_complex else size * torch.sign(angle)
    base.requires_grad_()
    found = []
    for powers in (diagonal._powers, diagonal._powers_at_once):
        fine, coarse = powers(base, 64, n_blocks, torch.float64)
        assert fine.shape == (5, 64, 4) and coarse.shape == (5, n_blocks, 4)
        loss = (fine * torch.arange(64)[:, None]).abs().sum() + coarse.abs().sum()
        found.append((fine, coarse, *torch.autograd.grad(loss, base)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_powers_of_zero_are_finite_with_finite_gradients(dtype):
    base = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
    fine, coarse = diagonal._powers_at_once(base, 4, 2, torch.float64)
    assert fine[0, :, 0].abs().tolist() == pytest.approx([1, 0, 0, 0])
    assert coarse[0, :, 0].abs().tolist() == pytest.approx([1, 0])
    (gradient,) = torch.autograd.grad(fine.abs().sum() + coarse.abs().sum(), base)
    assert gradient.isfinite().all()


def test_powers_of_tiny_numbers_have_finite_gradients():
    base = torch.tensor([[5e-324, 1e-310, 1e-300]], dtype=torch.complex128, requires_grad=True)
    fine, coarse = diagonal._powers_at_once(base, 4, 2, torch.float64)
    (gradient,) = torch.autograd.grad(fine.abs().sum() + coarse.abs().sum(), base)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "layer", [S4D(3, 8), S4D(3, 4, init="s4d-real"), S4D(3, 4, init="s4d-real", discretization="bilinear"), S4(3, 8)]
)
def test_layers_compute_the_same_with_them(monkeypatch, layer):
    layer, x = layer.double(), torch.randn(2, 37, 3, dtype=torch.float64)
    found = []
    for powers in (diagonal._powers, diagonal._powers_at_once):
        monkeypatch.setattr(diagonal, "_powers", powers)
        y, state = layer(x)
        found.append((y, state.h, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)
