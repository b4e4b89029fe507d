"""The long convolution by products of tiles, its CUDA kernels run on the processor."""

from __future__ import annotations

import pytest
import torch
from emulation import emulate
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import anymamba
from anymamba.kernels.fft_conv.cuda import products
from anymamba.layers.h3 import ShiftSSM
from anymamba.parts import toeplitz
from anymamba.parts.fft_conv import conv_of_taps, fft_conv

if emulate.missing():
    pytest.skip(f"kernels cannot be emulated: {emulate.missing()}", allow_module_level=True)

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate.patch(monkeypatch)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def check(u: torch.Tensor, kernel: torch.Tensor, tolerance: float = 5e-3) -> None:
    """Values and both gradients against float64, with the filter as it was rounded."""
    dy = numbers(*u.shape, seed=1).to(BF16)
    wide, filters = u.double().requires_grad_(), kernel.to(BF16).double().requires_grad_()
    exact = fft_conv(wide, filters)
    wanted = (exact, *torch.autograd.grad(exact, (wide, filters), dy.double()))
    x, lines = products.order(u, kernel)
    assert torch.equal(x, u) and products.is_ordered(x)
    found = (products.convolve(x, lines, kernel), *products.gradients(x, dy, kernel, ordered=True))
    assert [t.dtype for t in found] == [BF16, BF16, torch.float32]
    for name, got, want in zip(("y", "du", "dkernel"), found, wanted, strict=True):
        assert got.shape == want.shape, name
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < (tolerance if name != "dkernel" else 3e-6), (name, float(error))
    alone = (
        products.gradients(u, dy, kernel, of_filters=False)[0],
        products.gradients(u, dy, kernel, of_inputs=False)[1],
    )
    for a, b in zip(found[1:], alone, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("length", [1, 17, 64, 130, 257, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", [3, 16])
def test_every_length(length, rows):
    check(numbers(rows, length, 3).to(BF16), numbers(3, length))


@pytest.mark.parametrize("rows", [5, 17])
def test_threads_in_the_other_order(rows, monkeypatch):
    """What lacks a synchronisation has other results then."""
    monkeypatch.setattr(emulate.Kernel, "backwards", True)
    check(numbers(rows, 270, 5).to(BF16), numbers(5, 270))


@pytest.mark.parametrize("first", [1, 3, 7])
def test_the_order_of_the_pieces_of_work_changes_no_bit(first, monkeypatch):
    """Where all of them run at once, the multiprocessors' second pieces come in the other order."""
    u, kernel, dy = numbers(20, 530, 18).to(BF16), numbers(18, 530), numbers(20, 530, 18, seed=2).to(BF16)
    found, counts = [], []

    def fake(count: int, places: int) -> int:
        counts.append(count)
        return min(first, count)

    for choose in (lambda count, places: 0, fake):
        monkeypatch.setattr(products, "_first", choose)
        found.append((products.convolve(*products.order(u, kernel), kernel), *products.gradients(u, dy, kernel)))
    assert min(counts) > first
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_only_work_that_runs_at_once_is_ordered_for_it():
    assert [products._first(count, 132) for count in (1, 132, 133, 264, 265)] == [0, 0, 132, 132, 0]


@pytest.mark.parametrize("width", [1, 8, 13, 16, 66])
@pytest.mark.parametrize("rows", [1, 17])
def test_rows_and_widths(rows, width):
    """Pieces of channels, and one by one where those do not fit."""
    check(numbers(rows, 30, width).to(BF16), numbers(width, 30))


@pytest.mark.parametrize("taps", [1, 2, 100, 115, 129])
def test_shorter_filters(taps):
    """Inputs further away than the filter's last term are left out."""
    check(numbers(9, 400, 1).to(BF16), numbers(1, taps))


def test_long_rows():
    """Beyond 2,048 tokens, with few taps to keep it short."""
    check(numbers(8, 2100, 1).to(BF16), numbers(1, 150))


def test_blocks_fit_into_the_shared_memory_of_smaller_gpus():
    assert products.most_shared_bytes(products.LONGEST) <= 99 << 10


def test_more_rows_than_a_product_takes_are_parts(monkeypatch):
    u, dy, kernel = numbers(40, 140, 2).to(BF16), numbers(40, 140, 2, seed=1).to(BF16), numbers(2, 140)
    parts = products.gradients(u, dy, kernel)[1]
    monkeypatch.setattr(products, "WAVES", 0)
    torch.testing.assert_close(products.gradients(u, dy, kernel)[1], parts, rtol=0, atol=1e-4)


def test_strided_inputs():
    u = numbers(2, 6, 40).to(BF16)
    for view in (u[..., 8:16], u[..., 1:9], u.transpose(1, 2)[:, :, :4], u[:1].expand(3, 6, 40)[..., :8]):
        check(view, numbers(view.shape[2], 5))


@pytest.fixture
def served(monkeypatch):
    """Have `fft_conv` take the products, on the processor."""
    monkeypatch.setattr(products, "serves", lambda u, kernel: u.dtype == BF16 and u.numel() > 0)


@pytest.mark.parametrize("rows", [2, 9])
def test_gradients_flow(rows, served):
    u, kernel = numbers(rows, 20, 8).to(BF16).requires_grad_(), numbers(8, 20).requires_grad_()
    dy, exact_kernel = numbers(rows, 20, 8, seed=1).to(BF16), kernel.detach().to(BF16).double().requires_grad_()
    wide = u.detach().double().requires_grad_()
    exact = fft_conv(wide, exact_kernel)
    wanted = (exact, *torch.autograd.grad(exact, (wide, exact_kernel), dy.double()))
    y = fft_conv(u, kernel)
    found = (y, *torch.autograd.grad(y, (u, kernel), dy, retain_graph=True))
    again = torch.autograd.grad(y, (u, kernel), dy, create_graph=True)
    for got, other, want in zip(found, (y, *again), wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(other.double(), want, rtol=2e-2, atol=2e-2)
    second = torch.autograd.grad(again[1].square().sum(), u)[0]
    exact_first = torch.autograd.grad(fft_conv(wide, exact_kernel), exact_kernel, dy.double(), create_graph=True)[0]
    exact_second = torch.autograd.grad(exact_first.square().sum(), wide)[0]
    assert (second.double() - exact_second).norm() < 2e-2 * exact_second.norm()


def test_tracers_see_operations(served, monkeypatch):
    """A graph, a tensor without memory and an exported layer know nothing of kernels."""
    monkeypatch.setattr(products, "Call", None)
    monkeypatch.setattr(toeplitz, "serves_taps", lambda *given: True)
    u, kernel = numbers(9, 20, 8).to(BF16), numbers(8, 20)
    for convolve in (fft_conv, conv_of_taps):
        with anymamba.backend("portable"):
            wanted = convolve(u, kernel)
        graph = make_fx(convolve)(torch.zeros_like(u), kernel)
        torch.testing.assert_close(graph(u, kernel), wanted, rtol=0.02, atol=0.02)
        with FakeTensorMode() as mode:
            assert convolve(mode.from_tensor(u), mode.from_tensor(kernel)).shape == u.shape
    shift = ShiftSSM(8, 20).to(BF16)
    exported = torch.export.export(shift, (u, None)).module()
    torch.testing.assert_close(exported(torch.ones_like(u), None)[0].shape, u.shape)


@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("of_inputs", [True, False])
def test_only_wanted_gradients(rows, of_inputs, served, monkeypatch):
    u, kernel = numbers(rows, 20, 8).to(BF16).requires_grad_(of_inputs), numbers(8, 20).requires_grad_(not of_inputs)
    y, leaf = fft_conv(u, kernel), u if of_inputs else kernel
    monkeypatch.setattr(products, "correlate" if of_inputs else "convolve", None)
    y.sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype and leaf.grad.abs().sum() > 0


def test_a_part_of_memory_with_other_numbers_around(served):
    """Its strides are those of the products' order, but what follows are no zeros."""
    whole, dy = numbers(8, 64, 1).to(BF16), numbers(2, 64, 1, seed=1).to(BF16)
    u, kernel = whole[:2], numbers(1, 64)
    assert products.is_ordered(u)
    found = []
    for part in (u, u.clone()):
        leaves = part.detach().requires_grad_(), kernel.clone().requires_grad_()
        found.append(torch.autograd.grad(fft_conv(*leaves), leaves, dy))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_products_serve_where_they_are_faster():
    assert products.suits(16, 2048) and products.suits(4, 2048) and products.suits(1, 512)
    assert products.suits(8, 4096) and not products.suits(12, 4096) and not products.suits(16, 4097)
    assert not products.suits(3, 2048) and not products.suits(1, 513)


def test_inputs_are_kept_once(served):
    """In the order of the products instead of the caller's, but for rows that would be padded to many times as many."""
    for rows, own in ((16, True), (8, True), (2, False)):
        u, kernel = numbers(rows, 64, 8).to(BF16).requires_grad_(), numbers(8, 64).requires_grad_()
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            fft_conv(u, kernel)
        assert sum(t.numel() for t in kept) == u.numel() + kernel.numel()
        assert any(products.is_ordered(t) for t in kept if t.ndim == 3) == own


def test_what_is_kept_may_move(served):
    """Tensors that hooks give back in another order are ordered again."""
    u, kernel = numbers(9, 20, 8).to(BF16).requires_grad_(), numbers(8, 20).requires_grad_()
    dy = numbers(9, 20, 8, seed=1).to(BF16)
    found = torch.autograd.grad(fft_conv(u, kernel), (u, kernel), dy)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().contiguous(), lambda t: t):
        moved = torch.autograd.grad(fft_conv(u, kernel), (u, kernel), dy)
    assert all(torch.equal(a, b) for a, b in zip(found, moved, strict=True))


@pytest.mark.parametrize("length", [1, 17, 130, 300])
@pytest.mark.parametrize("rows", [8, 24])
def test_rows_that_are_neighbours_in_memory_stay_so(rows, length, served):
    u = numbers(3, length, rows).to(BF16).permute(2, 1, 0)
    check(u, numbers(3, length))
    assert products.order(u, numbers(3, length)).x is u
    assert fft_conv(u, numbers(3, length)).permute(2, 1, 0).is_contiguous()


def test_gradients_in_another_order_than_inputs():
    u, dy, kernel = numbers(8, 40, 5).to(BF16), numbers(8, 40, 5, seed=1).to(BF16), numbers(5, 40)
    u_by_time, dy_by_time = (t.permute(2, 1, 0).contiguous().permute(2, 1, 0) for t in (u, dy))
    found = [products.gradients(a, b, kernel) for a in (u, u_by_time) for b in (dy, dy_by_time)]
    for du, dkernel in found[1:]:
        assert torch.equal(du, found[0][0]) and torch.equal(dkernel, found[0][1])


def test_blocks_in_another_order_have_the_same_bits(monkeypatch):
    u, dy, kernel = numbers(17, 300, 5).to(BF16), numbers(17, 300, 5, seed=1).to(BF16), numbers(5, 300)
    found = []
    for cached in (1 << 20, 0):
        monkeypatch.setattr(products, "CACHED", cached)
        x, lines = products.order(u, kernel)
        found.append((products.convolve(x, lines, kernel), *products.gradients(x, dy, kernel)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
