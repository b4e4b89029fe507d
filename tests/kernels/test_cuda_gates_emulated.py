"""Derivatives, transforms and torch.compile of the ops whose CUDA kernels run on the processor: backend "cuda"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulation import emulate
from torch import Tensor

from anymamba import causal_conv1d, causal_conv1d_step
from anymamba.kernels.add_norm import cuda as norm
from anymamba.kernels.causal_conv1d import cuda as conv
from anymamba.kernels.linear_cross_entropy import cuda as loss
from anymamba.ops import dispatch
from anymamba.ops.add_norm import add_norm
from anymamba.ops.linear_cross_entropy import linear_cross_entropy

if emulate.missing():
    pytest.skip(f"kernels cannot be emulated: {emulate.missing()}", allow_module_level=True)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate.patch(monkeypatch)
    for module in (conv, norm, loss):
        monkeypatch.setattr(module, "unavailable", lambda device_type: None)
    dispatch.calls.clear()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def conv_of(backend: str, offsets: Tensor | None = None) -> Callable[..., Any]:
    def call(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        options: Any = {"initial_state": state, "cu_seqlens": offsets, "backend": backend}
        return tuple(causal_conv1d(x, weight, bias, activation="silu", **options))  # type: ignore[return-value]

    return call


def norm_of(backend: str, subtract_mean: bool = False) -> Callable[..., Any]:
    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        options: Any = {"residual": residual, "subtract_mean": subtract_mean, "backend": backend}
        return tuple(add_norm(x, weight, bias, **options))  # type: ignore[return-value]

    return call


def loss_of(backend: str) -> Callable[..., Any]:
    return lambda x, weight: linear_cross_entropy(x, weight, torch.tensor([1, -100, 3]), backend=backend)


OPS: dict[str, tuple[Callable[[str], Callable[..., Any]], tuple[Tensor, ...]]] = {
    "causal_conv1d": (conv_of, (normal(2, 5, 3), normal(3, 4), normal(3), normal(2, 3, 3))),
    "add_norm": (norm_of, (normal(2, 5), normal(2, 5) + 1, normal(5), normal(5))),
    "linear_cross_entropy": (loss_of, (normal(3, 4), normal(5, 4))),
}
EVERY = pytest.mark.parametrize("op", OPS)


@EVERY
def test_derivatives_of_both_orders(op):
    make, tensors = OPS[op]
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.autograd.gradcheck(make("cuda"), leaves)
    assert dispatch.calls[op, "cuda", "backward"]
    torch.autograd.gradgradcheck(make("cuda"), leaves, fast_mode=True)


def test_packed_derivatives():
    offsets = torch.tensor([0, 0, 2, 7], dtype=torch.int32)
    leaves = [t.requires_grad_() for t in (normal(1, 7, 3), normal(3, 4), normal(3), normal(3, 3, 3))]
    torch.autograd.gradcheck(conv_of("cuda", offsets), leaves)


@EVERY
def test_forward_mode_and_vmap(op):
    make, tensors = OPS[op]
    first = tensors[0]
    for f in (torch.func.jvp, lambda g, p, t: torch.func.vjp(g, *p)[1](torch.ones_like(g(*p)))):
        got, want = (
            f(lambda x, b=b: _first(make(b)(x, *tensors[1:])), (first,), (torch.ones_like(first),))
            for b in ("cuda", "reference")
        )
        torch.testing.assert_close(got, want)
    batched = torch.stack([first, 2 * first])
    got, want = (torch.vmap(lambda x, b=b: _first(make(b)(x, *tensors[1:])))(batched) for b in ("cuda", "reference"))
    torch.testing.assert_close(got, want)


@EVERY
def test_opcheck_and_compile(op):
    """The registered ops' shapes are true; compiled code calls them, forwards and backwards."""
    make, tensors = OPS[op]
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch._dynamo.reset()
    compiled = torch.compile(make("cuda"), backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(_sum(f(*leaves)), leaves) for f in (compiled, make("cuda")))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_step():
    state, x, weight, bias = normal(2, 3, 5), normal(2, 5), normal(5, 4), normal(5)
    got, want = (causal_conv1d_step(state, x, weight, bias, activation="silu", backend=b) for b in ("cuda", "portable"))
    torch.testing.assert_close(got, want)
    assert dispatch.calls["causal_conv1d", "cuda", "step"] == 1


def test_the_gradient_of_an_unused_output():
    x, residual, weight, _ = (t.clone().requires_grad_() for t in OPS["add_norm"][1])
    for pick in (0, 1):
        got, want = (
            torch.autograd.grad(
                add_norm(x, weight, residual=residual, backend=b)[pick].sum(), (x, residual), allow_unused=True
            )
            for b in ("cuda", "reference")
        )
        torch.testing.assert_close(got, want)


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _sum(result: Any) -> Tensor:
    return sum(t.sin().sum() for t in (result if isinstance(result, tuple) else (result,)))  # type: ignore[return-value]
