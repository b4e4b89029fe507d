"""Outer products within heads and their sums, the CUDA kernel run on the processor."""

from __future__ import annotations

import pytest
import torch
from emulation import emulate
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from anymamba.kernels.head_products import cuda
from anymamba.parts import head_products

if emulate.missing():
    pytest.skip(f"kernels cannot be emulated: {emulate.missing()}", allow_module_level=True)

SHAPES = [(1, 1, 1), (2, 3, 5), (3, 50, 4)]
"""Rows, tokens and heads; the last has more than a block."""


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate.patch(monkeypatch)


def vectors(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A part of a wider tensor, as layers give it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 24, generator=generator).to(dtype)[..., 8:16]


def check(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    one = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=one, atol=one)


@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backwards", [False, True])
def test_values_and_gradients(shape, dtype, backwards, monkeypatch):
    monkeypatch.setattr(emulate.Kernel, "backwards", backwards)
    a, b = (vectors(*shape, dtype=dtype, seed=i) for i in range(2))
    products = cuda.outer(a, b)
    wide = [t.double().requires_grad_() for t in (a, b)]
    made = head_products.outer(*wide)
    check(products, made)
    noise = torch.randn(products.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    for found, wanted in zip(
        cuda.gradients_of_outer(noise, a, b), torch.autograd.grad(made, wide, noise.double()), strict=True
    ):
        check(found, wanted)
    wide[1] = noise.double().requires_grad_()
    sums = head_products.contract(*wide)
    check(cuda.contract(a, noise), sums)
    for found, wanted in zip(
        cuda.gradients_of_contract(b, a, noise), torch.autograd.grad(sums, wide, b.double()), strict=True
    ):
        check(found, wanted)


def test_vectors_that_are_not_aligned_are_copied():
    a = torch.randn(2, 3, 2, 9).to(torch.bfloat16)[..., 1:]
    check(cuda.outer(a, a), head_products.outer(a.double(), a.double()))


def test_tracers_see_operations(monkeypatch):
    """A graph and a tensor without memory know nothing of kernels."""
    monkeypatch.setattr(cuda, "serves", lambda x: x.dtype in cuda.DTYPES)
    monkeypatch.setattr(cuda, "_combine", None)

    def heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return head_products.contract(q, head_products.outer(k, v))

    given = [vectors(2, 3, 2, dtype=torch.bfloat16, seed=i) for i in range(3)]
    graph = make_fx(heads)(*map(torch.zeros_like, given))
    torch.testing.assert_close(graph(*given).double(), heads(*(t.double() for t in given)), rtol=0.02, atol=0.02)
    with FakeTensorMode() as mode:
        assert heads(*map(mode.from_tensor, given)).shape == given[0].shape
    compiled = torch.compile(heads, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given).double(), heads(*(t.double() for t in given)), rtol=0.02, atol=0.02)


def test_sizes_that_disagree():
    q, k = vectors(2, 3, 2, dtype=torch.bfloat16, seed=0), vectors(2, 3, 1, dtype=torch.bfloat16, seed=0)
    with pytest.raises(ValueError, match="one shape"):
        head_products.outer(q, k)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 2, 8, 8\), got \(1, 3, 2, 8, 8\)"):
        head_products.contract(q, head_products.outer(k, k))


def test_autograd_takes_the_kernel(monkeypatch):
    """Both functions, whose derivatives of second order are torch's operations."""
    monkeypatch.setattr(cuda, "serves", lambda x: x.dtype in cuda.DTYPES)
    calls = []
    combine = cuda._combine
    monkeypatch.setattr(cuda, "_combine", lambda *args, **kwargs: (calls.append(1), combine(*args, **kwargs))[1])
    q, k, v = (vectors(2, 3, 2, dtype=torch.bfloat16, seed=i).requires_grad_() for i in range(3))
    y = head_products.contract(q, head_products.outer(k, v))
    found = torch.autograd.grad(y.sum(), (q, k, v))
    assert len(calls) == 4
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact = head_products.contract(wide[0], head_products.outer(*wide[1:]))
    for got, want in zip(found, torch.autograd.grad(exact.sum(), wide), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.02)
