"""Both ops and their steps under everything that looks at tensors without values: none of these is read by pointer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scan_cases import HERE, scan_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functionalize, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import anymamba
from anymamba import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step
from anymamba.ops import dispatch, observers
from anymamba.runtimes import native


def scan(u, delta, A, B, C, z, state):
    return selective_scan(u, delta, A, B, C, z=z, delta_softplus=True, initial_state=state)


def scan_step(u, delta, A, B, C, z, state):
    return selective_scan_step(state, u[:, 0], delta[:, 0], A, B[:, :1], C[:, :1], z=z[:, 0], delta_softplus=True)


def conv(u, delta, A, B, C, z, state):
    return causal_conv1d(u, A, activation="silu", initial_state=z[:, : A.shape[1] - 1])


def conv_step(u, delta, A, B, C, z, state):
    return causal_conv1d_step(z[:, : A.shape[1] - 1], u[:, 0], A, activation="silu")


CALLS = [scan, scan_step, conv, conv_step]
every_call = pytest.mark.parametrize("call", CALLS)


def values(seed: int = 0) -> list[Tensor]:
    inputs = scan_inputs(2, 7, dtype=torch.float32, seed=seed)
    return [inputs[k] for k in ("u", "delta", "A", "B", "C", "z", "initial_state")]


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=[False, True], ids=["no_grad", "grad"])
def grad_mode(request):
    with torch.set_grad_enabled(request.param):
        yield request.param


def inputs_of(grad_mode: bool, seed: int = 0) -> list[Tensor]:
    return [t.requires_grad_(grad_mode) for t in values(seed)]


@every_call
def test_fake_tensors_give_fakes_of_the_right_shapes(call, grad_mode):
    want = call(*inputs_of(grad_mode))
    with FakeTensorMode() as mode:
        got = call(*(mode.from_tensor(t) for t in inputs_of(grad_mode)))
    assert all(isinstance(t, FakeTensor) for t in got)
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want]


@every_call
def test_fakes_outside_their_mode(call):
    mode = FakeTensorMode()
    got = call(*(mode.from_tensor(t) for t in values()))
    assert all(isinstance(t, FakeTensor) for t in got)


@every_call
def test_the_meta_device_gives_shapes(call, grad_mode):
    want = call(*inputs_of(grad_mode))
    got = call(*(t.detach().to("meta").requires_grad_(grad_mode) for t in values()))
    assert all(t.is_meta for t in got)
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want]
    if grad_mode:
        assert all(g.is_meta for g in torch.autograd.grad(got[0].sum(), got[0].grad_fn and [got[0]]))


@every_call
def test_functionalize(call, grad_mode):
    assert_same(functionalize(call)(*inputs_of(grad_mode)), call(*inputs_of(grad_mode)))
    outside = [torch._to_functional_tensor(t) for t in values()]
    assert_same([torch._from_functional_tensor(t) for t in call(*outside)], call(*values()))


@every_call
def test_functionalize_of_a_gradient(call):
    def loss(u, *others):
        return call(u, *others)[0].square().sum()

    assert_same([functionalize(grad(loss))(*values())], [grad(loss)(*values())])


class Marked(Tensor):
    """A subclass that changes nothing."""


class Doubled(Tensor):
    """A subclass whose values are not those of the memory that it was made of."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*(2 * a.inner if isinstance(a, cls) else a for a in args), **(kwargs or {}))


@every_call
def test_subclasses(call, grad_mode):
    want = call(*values())
    got = call(*(t.as_subclass(Marked).requires_grad_(grad_mode) for t in values()))
    assert_same([t.detach().as_subclass(Tensor) for t in got], want)


@every_call
@torch.no_grad()
def test_a_wrapper_subclass_is_asked_for_its_values(call):
    tensors = values()
    want = call(2 * tensors[0], *tensors[1:])
    assert_same(call(Doubled(tensors[0]), *tensors[1:]), want)


@every_call
@pytest.mark.filterwarnings("ignore")
def test_jit_trace_gives_right_values_of_other_inputs(call, grad_mode):
    traced = torch.jit.trace(lambda *tensors: tuple(call(*tensors)), tuple(inputs_of(grad_mode)))
    assert_same(traced(*inputs_of(grad_mode, seed=3)), call(*inputs_of(grad_mode, seed=3)))


@every_call
@pytest.mark.filterwarnings("ignore")
def test_gradients_through_a_trace(call):
    def loss(*tensors):
        return call(*tensors)[0].square().sum()

    traced = torch.jit.trace(loss, tuple(inputs_of(True)))
    got, want = inputs_of(True, seed=3), inputs_of(True, seed=3)
    traced(*got).backward()
    loss(*want).backward()
    assert_same([t.grad for t in got if t.grad is not None], [t.grad for t in want if t.grad is not None])


@every_call
def test_make_fx_gives_right_values_of_other_inputs(call, grad_mode):
    with torch.set_grad_enabled(grad_mode):
        graph = make_fx(lambda *tensors: tuple(call(*tensors)))(*inputs_of(grad_mode))
        assert_same(graph(*inputs_of(grad_mode, seed=3)), call(*inputs_of(grad_mode, seed=3)))


@every_call
@torch.no_grad()
def test_vmap(call):
    samples = [torch.stack([a, b]) for a, b in zip(values(), values(3), strict=True)]
    got = vmap(call)(*samples)
    assert_same([t[1] for t in got], call(*values(3)))


@every_call
def test_a_zero_tensor_has_no_memory(call):
    tensors = values()
    want = call(torch.zeros_like(tensors[0]), *tensors[1:])
    with torch.no_grad():
        assert_same(call(torch._efficientzerotensor(tensors[0].shape), *tensors[1:]), want)


@pytest.mark.skipif(native.load() is None, reason="the package was built without compiled kernels")
def test_compiled_code_gets_no_pointer_of_what_has_no_memory():
    """The last line: whatever path a call takes, pointers come from one function."""
    fake = FakeTensorMode().from_tensor(torch.ones(3))
    for tensor in (fake, Doubled(torch.ones(3)), torch.ones(3, device="meta"), torch.ones(3).to_mkldnn()):
        with pytest.raises(TypeError, match=r'x must be a dense tensor .* use backend "portable"'):
            native.address("x", tensor)
    for tensor in (torch.ones(3, dtype=torch.complex64).conj().imag, torch._efficientzerotensor((3,))):
        with pytest.raises(TypeError, match="x must be a dense tensor"):
            native.address("x", tensor)
    assert native.address("x", torch.ones(3)) and native.address("x", torch.nn.Parameter(torch.ones(3)))
    assert native.address("x", torch.ones(3).as_subclass(Marked))


@torch.no_grad()
def test_steps_run_on_kernels_while_nobody_looks_at_tensors():
    best = dispatch.resolve("selective_scan", HERE.type, None)
    dispatch.calls.clear()
    scan_step(*values())
    with torch.device(HERE), torch.autograd.profiler.profile():  # neither changes what a tensor is
        scan_step(*values())
    assert dispatch.calls["selective_scan", best, "step"] == 2


# ------------------------------------------------------------------------------------------ backend()


def backends_that_ran(call: Callable[[], object]) -> set[str]:
    dispatch.calls.clear()
    call()
    return {backend for _, backend, _ in dispatch.calls}


@pytest.mark.parametrize("name", ["portable", "reference"])
def test_a_context_insists_on_a_backend(name):
    layer, x = anymamba.Mamba(8), torch.randn(2, 5, 8)

    def use_the_layer():
        layer(x)[0].sum().backward()
        with torch.no_grad():
            layer.step(x[:, 0], layer(x)[1])

    with anymamba.backend(name):
        assert backends_that_ran(use_the_layer) == {name}
        assert backends_that_ran(lambda: causal_conv1d(x, torch.ones(8, 4), backend="portable")) == {"portable"}
        with anymamba.backend("portable"):
            assert backends_that_ran(use_the_layer) == {"portable"}
        assert backends_that_ran(use_the_layer) == {name}
    assert dispatch.resolve("selective_scan", HERE.type, None) == dispatch.resolve("causal_conv1d", HERE.type, None)
    assert backends_that_ran(lambda: layer(x)) == {dispatch.resolve("selective_scan", HERE.type, None)}


def test_a_context_ends_with_an_error_too():
    before = dispatch.resolve("selective_scan", HERE.type, None)
    with pytest.raises(ZeroDivisionError), anymamba.backend("reference"):
        raise ZeroDivisionError
    assert dispatch.resolve("selective_scan", HERE.type, None) == before


def test_a_context_says_what_it_cannot():
    with pytest.raises(ValueError, match="unknown backend 'fast'; the backends are cpu,"), anymamba.backend("fast"):
        pass
    with anymamba.backend("cpu"), pytest.raises(RuntimeError, match="'cpu' cannot serve selective_scan on meta"):
        scan(*(t.to("meta") for t in values()))
    with anymamba.backend("reference"):
        assert all(line.chosen for line in dispatch.report() if line.backend == "reference")


def test_compiled_code_follows_the_context():
    torch._dynamo.reset()
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    assert backends_that_ran(lambda: compiled(*values())) != {"reference"}
    with anymamba.backend("portable"):
        assert backends_that_ran(lambda: compiled(*values())) == {"portable"}


PRIVATE = ["_top_transform", "_dispatch_modes", "_function_modes", "_profiler", "_is_functional", "_is_zero"]


@every_call
@pytest.mark.parametrize("name", [*PRIVATE, "_all_transforms"])
def test_without_a_private_function_of_torch_the_registered_op_runs(call, name, grad_mode, monkeypatch):
    want = call(*inputs_of(grad_mode))
    monkeypatch.setattr(observers, name, None)
    assert_same(call(*inputs_of(grad_mode)), want)
    assert observers.way(torch.ones(3)) == ("op" if name in PRIVATE else "kernel")


def test_the_ways_to_run():
    x = torch.ones(3)
    assert observers.way(x) == "kernel"
    assert observers.way(x.clone().requires_grad_()) == "function"
    assert observers.way(x.to("meta")) == "op"
    assert grad(lambda t: t.sum() * (observers.way(t) == "function"))(x).all()
    with torch.no_grad():
        assert observers.way(x.clone().requires_grad_()) == "kernel"
