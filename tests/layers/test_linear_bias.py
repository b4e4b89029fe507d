"""Linear layers whose bias has its gradient from a kernel; here a stand-in has its place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from anymamba.kernels.column_sums import cuda
from anymamba.ops.dispatch import backend
from anymamba.parts import linear as linears
from anymamba.parts.linear import linear


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """The shapes that the stand-in of the kernel has summed."""
    summed: list[tuple[int, ...]] = []

    def sums(x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        summed.append(tuple(x.shape))
        return x[None].double().flatten(0, -2).sum(0).float()

    monkeypatch.setattr(linears, "_is_on_gpu", lambda x: True)
    monkeypatch.setattr(cuda, "serves", lambda x: x.dtype in cuda.DTYPES and x.numel() > 0)
    monkeypatch.setattr(cuda, "sums", sums)
    return summed


def layer(width: int = 5, d_out: int = 7, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, d_out, dtype=dtype)


def gradients(call, module: nn.Linear, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(call(module, x), (x, *module.parameters()), dy))


def plain(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return module(x)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5), (2, 13, 5), (0, 5), (2, 0, 5)])
def test_values_and_gradients(shape, kernel):
    module, x = layer(), torch.randn(shape)
    y = linear(module, x)
    assert y.equal(module(x))
    dy = torch.randn(y.shape)
    for found, wanted in zip(gradients(linear, module, x, dy), gradients(plain, module, x, dy), strict=True):
        torch.testing.assert_close(found, wanted)
    assert kernel == ([tuple(y.shape)] if y.numel() else [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_short_numbers_are_rounded_once(dtype):
    module, x, dy = layer(dtype=dtype), torch.randn(1000, 5, dtype=dtype), torch.randn(1000, 7, dtype=dtype)
    *_, dbias = gradients(linear, module, x, dy)
    assert dbias.equal(dy.double().sum(0).float().to(dtype))


@pytest.mark.parametrize("served", [True, False])
def test_autocast(served, kernel, monkeypatch):
    """y and dy are bfloat16, the gradient of the bias has not been."""
    monkeypatch.setattr(cuda, "serves", lambda x: served)
    module, x, dy = layer(), torch.randn(1000, 5), torch.randn(1000, 7).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = linear(module, x), module(x)
    assert y.dtype == torch.bfloat16 and y.equal(wanted)
    found = torch.autograd.grad(y, list(module.parameters()), dy)
    assert [g.dtype for g in found] == [torch.float32] * 2 and kernel == [(1000, 7)] * served
    assert found[0].equal(torch.autograd.grad(wanted, module.weight, dy)[0])
    torch.testing.assert_close(found[1], dy.double().sum(0).float(), rtol=1e-5, atol=1e-4)


def test_derivatives_of_second_order(kernel):
    module, x = layer(dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        other = copy.copy(module)
        other._parameters = {"weight": weight, "bias": bias}
        return linear(other, x).sin()

    inputs = (x, *(p.detach().clone().requires_grad_() for p in module.parameters()))
    assert linears._by_kernel(x, module) and gradcheck(call, inputs) and gradgradcheck(call, inputs)
    assert not kernel


def test_a_backward_pass_that_is_differentiated_takes_operations(kernel):
    module, x = layer(), torch.randn(3, 5, requires_grad=True)
    (dbias,) = torch.autograd.grad(linear(module, x).pow(3).sum(), module.bias, create_graph=True)
    assert not kernel
    (found,) = torch.autograd.grad(dbias.sum(), x)
    (dbias,) = torch.autograd.grad(module(x).pow(3).sum(), module.bias, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(dbias.sum(), x)[0])


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
def test_the_result_may_be_changed_in_place(shape):
    module, x = layer(), torch.randn(shape)

    def in_place(call):
        def changed(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
            y = call(module, x)
            y[..., 2:4] = 1.0
            return y.mul_(2).sin()

        return changed

    dy = torch.randn(*shape[:-1], 7)
    assert in_place(linear)(module, x).equal(in_place(plain)(module, x))
    found, wanted = (gradients(in_place(call), module, x, dy) for call in (linear, plain))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, kernel):
    module, x, dy = layer(), torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 7)
    checkpoint(lambda x: linear(module, x), x, use_reentrant=reentrant).backward(dy)
    wanted = torch.autograd.grad(module(x), (x, *module.parameters()), dy)
    for found, want in zip((x.grad, module.weight.grad, module.bias.grad), wanted, strict=True):
        torch.testing.assert_close(found, want)
    assert kernel == [(2, 3, 7)]


def test_only_the_bias_or_all_but_the_bias_has_a_gradient(kernel):
    module, x = layer(), torch.randn(3, 5)
    module.weight.requires_grad_(False)
    linear(module, x).sum().backward()
    assert module.bias.grad.equal(torch.full((7,), 3.0)) and module.weight.grad is None
    module.weight.requires_grad_().grad = None
    module.bias.requires_grad_(False).grad = None
    linear(module, x).sum().backward()
    assert module.bias.grad is None and module.weight.grad is not None and len(kernel) == 1


@pytest.mark.parametrize("kind", ["forward hook", "pre hook", "backward hook", "subclass", "other class", "no bias"])
def test_what_is_not_bare_is_called(kind, kernel):
    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    module, x, called = layer(), torch.randn(3, 5, requires_grad=True), []
    if kind == "forward hook":
        module.register_forward_hook(lambda *_: called.append(1))
    elif kind == "pre hook":
        module.register_forward_pre_hook(lambda *_: called.append(1))
    elif kind == "backward hook":
        module.register_full_backward_hook(lambda *_: called.append(1))
    else:
        module = {"subclass": Adapted(5, 7), "other class": nn.Sequential(module)}.get(kind, nn.Linear(5, 7, False))
    y = linear(module, x)
    assert y.equal(module(x))
    called.clear()
    linear(module, x).sum().backward()
    assert not kernel and bool(called) == ("hook" in kind)


def test_where_operations_are_wanted(kernel, monkeypatch):
    """Without gradients, with another backend, and off the GPU."""
    module, x = layer(), torch.randn(3, 5)
    assert linears._by_kernel(x, module)
    with torch.no_grad():
        assert not linears._by_kernel(x, module)
    with backend("portable"):
        assert not linears._by_kernel(x, module)
        linear(module, x).sum().backward()
    monkeypatch.undo()
    assert not linears._by_kernel(x, module) and not kernel


def test_transforms(kernel):
    module, x, dy = layer(), torch.randn(3, 5), torch.randn(3, 7)
    given = dict(module.named_parameters())

    def loss(call):
        return lambda p: (functional_call(Caller(module, call), {f"module.{k}": v for k, v in p.items()}, x) * dy).sum()

    for transform in (grad, lambda f: lambda p: jvp(f, (p,), (p,))[1], lambda f: lambda p: grad(grad_sum(f))(p)):
        found, wanted = (transform(loss(call))(given) for call in (linear, plain))
        torch.testing.assert_close(found, wanted)
    batched = torch.randn(4, 3, 5)
    torch.testing.assert_close(vmap(lambda x: linear(module, x))(batched), module(batched))
    assert not kernel


def test_forward_mode():
    module, x, tangent = layer(), torch.randn(3, 5), torch.randn(3, 5)
    with forward_ad.dual_level():
        y = linear(module, forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, tangent @ module.weight.T)


def grad_sum(f):
    return lambda p: sum(g.sum() for g in grad(lambda p: f(p).sin())(p).values())


class Caller(nn.Module):
    def __init__(self, module: nn.Linear, call=linear) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.module, x)


def test_tracers_see_the_module(kernel):
    module, x = layer(), torch.randn(3, 5)
    caller, wanted = Caller(module), module(x)
    compiled = torch.compile(caller, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted)
    compiled(x).sum().backward()
    assert module.bias.grad.equal(torch.full((7,), 3.0))
    torch.testing.assert_close(torch.export.export(caller, (x,)).module()(x), wanted)
    torch.testing.assert_close(torch.jit.trace(caller, (x,))(x), wanted)
    assert not kernel
