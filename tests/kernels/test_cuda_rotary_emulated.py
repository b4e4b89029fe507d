"""Rotary positions of queries and keys, the CUDA kernel run on the processor."""

from __future__ import annotations

import pytest
import torch
from emulation import emulate
from torch.fx.experimental.proxy_tensor import make_fx

from anymamba.kernels.rotary import cuda
from anymamba.parts import rotary

if emulate.missing():
    pytest.skip(f"kernels cannot be emulated: {emulate.missing()}", allow_module_level=True)

SIZES = [(1, 1, 1, 1, 16), (2, 7, 4, 2, 32), (3, 20, 6, 1, 64)]
"""Rows, tokens, heads of queries and of keys, and channels; the last has more than a block."""


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate.patch(monkeypatch)
    monkeypatch.setattr(cuda, "serves", lambda t: t.dtype in cuda.DTYPES and not t.shape[-1] % (32 // t.itemsize))


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(packed: torch.Tensor, positions: torch.Tensor, n_keys: int) -> tuple[torch.Tensor, ...]:
    n_queries = packed.shape[2] - 2 * n_keys
    q, k, v = packed.split((n_queries, n_keys, n_keys), 2)
    return rotary.rotate(q, positions), rotary.rotate(k, positions), v


def check(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    one = max(torch.finfo(found.dtype).eps, 1e-6)
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=one, atol=one)


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("own", [False, True], ids=["shared positions", "own positions"])
def test_values_and_gradients(sizes, dtype, own):
    batch, length, n_queries, n_keys, d_head = sizes
    n_heads = n_queries + 2 * n_keys
    packed = numbers(batch, length, n_heads + 1, d_head, dtype=dtype, seed=0)[:, :, 1:].requires_grad_()
    positions = torch.arange(length)[None] + (100 * torch.arange(batch)[:, None] if own else 0)
    wide = packed.detach().double().requires_grad_()
    found, wanted = rotary.rotate_heads(packed, positions, n_keys), exact(wide, positions, n_keys)
    # gradients come as attention gives them: heads before tokens
    noise = [numbers(*t.transpose(1, 2).shape, dtype=dtype, seed=i + 1).transpose(1, 2) for i, t in enumerate(found)]
    for one, other in zip(found, wanted, strict=True):
        check(one, other)
    (gradient,) = torch.autograd.grad(found, packed, noise)
    (wanted_gradient,) = torch.autograd.grad(wanted, wide, [t.double() for t in noise])
    check(gradient, wanted_gradient)


def test_values_are_not_copied():
    packed = numbers(2, 3, 4, 16, dtype=torch.bfloat16, seed=0)
    v = rotary.rotate_heads(packed, torch.arange(3)[None], 1)[2]
    assert v.data_ptr() == packed[:, :, 3:].data_ptr()


def test_one_gradient_alone_is_enough():
    packed = numbers(2, 3, 3, 16, dtype=torch.float32, seed=0).requires_grad_()
    q = rotary.rotate_heads(packed, torch.arange(3)[None], 1)[0]
    (found,) = torch.autograd.grad(q.sum(), packed)
    wide = packed.detach().double().requires_grad_()
    check(found, torch.autograd.grad(exact(wide, torch.arange(3)[None], 1)[0].sum(), wide)[0])


def test_second_derivatives_come_from_operations():
    packed = numbers(1, 3, 3, 16, dtype=torch.float32, seed=0).requires_grad_()

    def second(packed: torch.Tensor, heads: tuple[torch.Tensor, ...]) -> torch.Tensor:
        loss = sum(t.pow(3).sum() for t in heads)
        (first,) = torch.autograd.grad(loss, packed, create_graph=True)
        return torch.autograd.grad(first.square().sum(), packed)[0]

    wide, positions = packed.detach().double().requires_grad_(), torch.arange(3)[None]
    found = second(packed, rotary.rotate_heads(packed, positions, 1))
    torch.testing.assert_close(found.double(), second(wide, exact(wide, positions, 1)), rtol=1e-4, atol=1e-4)


def test_tracers_see_operations(monkeypatch):
    monkeypatch.setattr(cuda, "_launch", None)
    packed, positions = numbers(2, 3, 4, 16, dtype=torch.bfloat16, seed=0), torch.arange(3)[None]
    graph = make_fx(lambda t: rotary.rotate_heads(t, positions, 1))(torch.zeros_like(packed))
    for one, other in zip(graph(packed), exact(packed.double(), positions, 1), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.02, atol=0.02)


def test_an_odd_head_cannot_be_rotated():
    with pytest.raises(ValueError, match="d_head must be even, got 7"):
        rotary.rotate_heads(torch.ones(1, 2, 3, 7), torch.arange(2)[None], 1)
