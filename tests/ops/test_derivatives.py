"""Derivatives of every kind, of both ops and their steps: forward mode, `torch.func`, per sample, second ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scan_cases import HERE, TENSORS, scan_inputs
from test_scan_gradients import step_inputs
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from anymamba import ScanOutput, causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step
from anymamba.ops import dispatch

Call = Callable[..., tuple[Tensor, ...]]


def scan(**options: Any) -> tuple[Call, list[Tensor]]:
    """The scan of its tensors alone, and tensors."""
    inputs = scan_inputs(options.pop("batch", 1), 5, 2, 2, **options)
    names = [k for k in TENSORS if inputs[k] is not None]
    return (lambda *values, **more: selective_scan(**inputs | dict(zip(names, values, strict=True)), **more)), [
        inputs[k] for k in names
    ]


def scan_step(**options: Any) -> tuple[Call, list[Tensor]]:
    inputs = step_inputs(**options)
    names = [k for k, v in inputs.items() if isinstance(v, Tensor)]
    return (lambda *values, **more: selective_scan_step(**inputs | dict(zip(names, values, strict=True)), **more)), [
        inputs[k] for k in names
    ]


def conv(lengths: list[int] | None = None, activation: str | None = "silu") -> tuple[Call, list[Tensor]]:
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths], device=HERE).cumsum(0).int()
    rows = 1 if lengths is None else len(lengths)
    shapes = [(1, 5, 2), (2, 3), (2,), (rows, 2, 2)]

    def call(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, **more: Any) -> tuple[Tensor, ...]:
        options = {"activation": activation, "initial_state": state, "cu_seqlens": cu_seqlens}
        return causal_conv1d(x, weight, bias, **options, **more)

    return call, random(*shapes)


def conv_step() -> tuple[Call, list[Tensor]]:
    return functools.partial(causal_conv1d_step, activation="silu"), random((3, 2, 2), (3, 2), (2, 3), (2,))


def random(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(HERE) for shape in shapes]


CASES = {
    "scan": scan,
    "scan-zoh": functools.partial(scan, rule="zoh", B="constant"),
    "scan-complex": functools.partial(scan, is_complex=True, rule="zoh", C="constant"),
    "scan-packed": functools.partial(scan, lengths=[3, 0, 2]),
    "scan-groups": functools.partial(scan, B=2, C=1, softplus=False),
    "scan-step": scan_step,
    "scan-step-complex": functools.partial(scan_step, is_complex=True, rule="zoh"),
    "conv": conv,
    "conv-packed": functools.partial(conv, lengths=[3, 0, 2]),
    "conv-step": conv_step,
}
SERVING = {line.backend for line in dispatch.report(HERE.type) if line.available}
BACKENDS = [name for name in ("cpu", "cuda", "portable") if name in SERVING]
"""Every backend whose derivatives are not torch's own."""


def loss_of(call: Call, *values: Tensor) -> Tensor:
    """A real number through all outputs."""
    outputs = call(*values)
    return sum((torch.view_as_real(t) if t.is_complex() else t).square().sum() for t in outputs)


def reference_gradients(call: Call, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    loss = loss_of(functools.partial(call, backend="reference"), *leaves)
    return list(torch.autograd.grad(loss, leaves))


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


SERVED = [
    (case, backend) for case in CASES for backend in BACKENDS if not (case.endswith("complex") and backend == "cpu")
]


@pytest.fixture(params=SERVED, ids="-".join)
def served(request):
    """A case's function and tensors, of every backend that serves it: complex A is not for compiled kernels."""
    name, backend = request.param
    call, tensors = CASES[name]()
    return functools.partial(call, backend=backend), tensors


# ------------------------------------------------------------------------------------------ forward mode


def test_forward_mode_agrees_with_finite_differences(served):
    call, tensors = served
    leaves = [t.requires_grad_() for t in tensors]
    gradcheck(call, leaves, check_forward_ad=True, check_backward_ad=False, fast_mode=True)


def test_a_jvp_is_the_transpose_of_the_gradient(served):
    call, tensors = served
    tangents = [torch.randn_like(t) for t in tensors]
    _, got = jvp(functools.partial(loss_of, call), tuple(tensors), tuple(tangents))
    pairs = zip(reference_gradients(call, tensors), tangents, strict=True)
    close(got, sum((g.conj() * t).real.sum() for g, t in pairs))
    assert got.abs() > 1e-3


def test_dual_numbers_leave_a_tangent_on_every_output(served):
    call, tensors = served
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in tensors]
        outputs = call(*duals)
        tangents = [forward_ad.unpack_dual(t).tangent for t in outputs]
    assert all(t is not None and t.abs().max() > 0 for t in tangents)


@pytest.mark.parametrize("place", range(len(TENSORS)), ids=TENSORS)
def test_a_tangent_of_one_input_alone_is_not_lost(place):
    call, tensors = scan()
    with forward_ad.dual_level():
        tensors[place] = forward_ad.make_dual(tensors[place], torch.ones_like(tensors[place]))
        assert forward_ad.unpack_dual(call(*tensors)[0]).tangent.abs().max() > 0


def test_a_tangent_of_a_cotangent_is_not_lost():
    call, tensors = scan()
    leaves = [t.requires_grad_() for t in tensors]
    y, _ = call(*leaves)
    with forward_ad.dual_level():
        cotangent = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        (du,) = torch.autograd.grad(y, leaves[0], cotangent)
        primal, tangent = forward_ad.unpack_dual(du)
    close(tangent, primal)  # the pullback is linear


# ------------------------------------------------------------------------------------------ torch.func


def test_grad_of_every_input(served):
    call, tensors = served
    got = grad(functools.partial(loss_of, call), argnums=tuple(range(len(tensors))))(*tensors)
    close(list(got), reference_gradients(call, tensors))


@pytest.mark.parametrize("case", [scan, functools.partial(scan, lengths=[3, 2]), conv, scan_step, conv_step])
@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_jacobians(case, jacobian):
    call, tensors = case()
    for place in range(len(tensors)):
        got = jacobian(lambda t, p=place: call(*tensors[:p], t, *tensors[p + 1 :])[0])(tensors[place])
        want = torch.autograd.functional.jacobian(
            lambda t, p=place: call(*tensors[:p], t, *tensors[p + 1 :], backend="reference")[0], tensors[place]
        )
        close(got, want)


@pytest.mark.parametrize("case", [scan, conv, scan_step, conv_step])
def test_hessian_agrees_with_forward_over_reverse_of_the_reference(case):
    call, tensors = case()

    def loss(weight: Tensor, **more: Any) -> Tensor:
        return loss_of(functools.partial(call, **more), *tensors[:2], weight, *tensors[3:])

    want = torch.autograd.functional.hessian(functools.partial(loss, backend="reference"), tensors[2])
    for found in (hessian(loss), jacrev(jacrev(loss)), jacrev(jacfwd(loss)), jacfwd(jacfwd(loss))):
        close(found(tensors[2]), want)


def test_gradients_per_sample(served):
    """Of three samples of every input, and of three samples of the first input with the others shared."""
    call, tensors = served
    samples = [torch.stack([t, 2 * t, 0.5 * t]) for t in tensors]
    places = tuple(range(len(tensors)))
    loss = grad(functools.partial(loss_of, call), argnums=places)
    got = vmap(loss)(*samples)
    want = [reference_gradients(call, [s[i] for s in samples]) for i in range(3)]
    close(list(got), [torch.stack(column) for column in zip(*want, strict=True)])
    shared = vmap(loss, in_dims=(0, *[None] * (len(tensors) - 1)))(samples[0], *tensors[1:])
    want = [reference_gradients(call, [samples[0][i], *tensors[1:]]) for i in range(3)]
    close(list(shared), [torch.stack(column) for column in zip(*want, strict=True)])


@torch.no_grad()
def test_vmap_is_a_loop(served):
    call, tensors = served
    samples = [torch.stack([t, 2 * t], -1) for t in tensors]
    got = vmap(call, in_dims=-1)(*samples)
    want = [call(*(s[..., i] for s in samples)) for i in range(2)]
    close(list(got), [torch.stack(column) for column in zip(*want, strict=True)])


def test_per_sample_gradients_run_on_the_kernels(backend):
    call, tensors = scan()
    dispatch.calls.clear()
    vmap(grad(functools.partial(loss_of, functools.partial(call, backend=backend))), in_dims=(0, *[None] * 8))(
        torch.stack([tensors[0]] * 3), *tensors[1:]
    )
    assert dispatch.calls["selective_scan", backend, "forward"] == 3
    assert dispatch.calls["selective_scan", backend, "backward"] == 3
    assert not dispatch.calls["selective_scan", "reference", "forward"]


def test_packed_gradients_per_sample_share_their_offsets():
    call, tensors = scan(lengths=[3, 0, 2])
    _, pull = vjp(call, *tensors)
    outputs = call(*tensors)
    each = [torch.stack([torch.zeros_like(t), torch.ones_like(t)]) for t in outputs]
    got = vmap(lambda *cotangents: pull(ScanOutput(*cotangents)))(*each)
    want = pull(ScanOutput(*(torch.ones_like(t) for t in outputs)))
    close([g[1] for g in got], list(want))
    assert all(not g[0].any() for g in got)


# ------------------------------------------------------------------------------------------ second derivatives


def test_second_derivatives(served):
    call, tensors = served
    leaves = [t.requires_grad_() for t in tensors]
    gradgradcheck(call, leaves, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_a_third_derivative():
    call, tensors = scan()

    def third(**options: Any) -> Tensor:
        u = tensors[0].detach().requires_grad_()
        value = loss_of(functools.partial(call, **options), u, *tensors[1:])
        for _ in range(3):
            (g,) = torch.autograd.grad(value, u, create_graph=True)
            value = g.square().sum()
        return g.detach()

    close(third(), third(backend="reference"))


def test_only_one_output_may_have_a_gradient():
    for output in (0, 1):
        call, tensors = scan()
        leaves = [t.detach().requires_grad_() for t in tensors]
        got = torch.autograd.grad(call(*leaves)[output].square().sum(), leaves, materialize_grads=True)
        loss = call(*leaves, backend="reference")[output].square().sum()
        want = torch.autograd.grad(loss, leaves, materialize_grads=True)
        close(list(got), list(want))


# ------------------------------------------------------------------------------------------ compiled transforms


@pytest.mark.parametrize(
    "transform", [grad, jacrev, lambda f: vmap(grad(f)), lambda f: lambda u: jvp(f, (u,), (u,))[1]]
)
@pytest.mark.filterwarnings("ignore")
def test_a_transform_inside_compiled_code(transform):
    torch._dynamo.reset()
    call, tensors = scan()

    def loss(u: Tensor) -> Tensor:
        return loss_of(call, u, *tensors[1:])

    u = torch.stack([tensors[0], 2 * tensors[0]]) if "vmap" in transform.__code__.co_names else tensors[0]
    got = torch.compile(transform(loss), backend="aot_eager")(u)
    close(got, transform(loss)(u))


def test_a_module_per_sample():
    """As optimizers with differential privacy do it."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A = torch.nn.Parameter(-torch.rand(2, 2, dtype=torch.float64))

        def forward(self, u: Tensor) -> Tensor:
            matrix = torch.ones(*u.shape[:2], 2, dtype=u.dtype)
            return selective_scan(u, u.abs(), self.A, matrix, matrix).y

    model, u = Model(), torch.randn(3, 4, 2, dtype=torch.float64)
    values = dict(model.named_parameters())
    found = vmap(grad(lambda p, x: functional_call(model, p, (x[None],)).sum()), in_dims=(None, 0))(values, u)
    for i in range(3):
        (want,) = torch.autograd.grad(model(u[i : i + 1]).sum(), model.A)
        close(found["A"][i], want)
