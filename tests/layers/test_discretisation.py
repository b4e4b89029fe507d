"""Zero-order hold's (exp(x) - 1) / x against mpmath, and how many operations a kernel takes on a GPU."""

from __future__ import annotations

import math

import mpmath  # comes with torch, through sympy
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from anymamba.layers.s4d import S4D, DiagonalSystem
from anymamba.parts import diagonal
from anymamba.parts.diagonal import expm1_ratio

EPS = 2.0**-53
KINDS = pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])


def arguments(is_complex: bool) -> Tensor:
    """Sizes from 1e-12 to 40, many of them around 1/2, in the left half plane, where stable systems are; and 0."""
    generator = torch.Generator().manual_seed(0)
    everywhere = torch.logspace(-12, math.log10(40), 200, dtype=torch.float64)
    size = torch.cat([everywhere, torch.linspace(0.45, 0.55, 101, dtype=torch.float64), torch.zeros(1)])
    angle = math.pi * (0.5 + torch.rand(len(size), generator=generator, dtype=torch.float64))
    return torch.polar(size, angle) if is_complex else -size


def exact(x: complex, order: int) -> mpmath.mpc:
    """The derivative of this order, the integral of s^order exp(s x) over s in [0, 1]: its series, or a recursion."""
    with mpmath.workdps(60):
        z = mpmath.mpc(x)
        if abs(z) < 1:
            return mpmath.fsum(z**k / mpmath.factorial(k) / (k + order + 1) for k in range(50))
        value = mpmath.expm1(z) / z
        for k in range(1, order + 1):
            value = (mpmath.exp(z) - k * value) / z
        return value


def worst(got: Tensor, x: Tensor, order: int) -> float:
    """The largest relative error in units of 2^-53."""
    pairs = zip(got.tolist(), x.tolist(), strict=True)
    return max(float(abs(a - exact(b, order)) / abs(exact(b, order))) for a, b in pairs) / EPS


@KINDS
def test_values_and_derivatives_are_exact(is_complex):
    x = arguments(is_complex).requires_grad_()
    derivatives = [expm1_ratio(x)]
    for _ in range(2):  # that of an analytic function is the conjugate of the gradient of the real part
        (gradient,) = torch.autograd.grad(derivatives[-1].real.sum(), x, create_graph=True)
        derivatives.append(gradient.conj() if is_complex else gradient)
    errors = [worst(value.detach().resolve_conj(), x.detach(), k) for k, value in enumerate(derivatives)]
    assert errors[0] < 8 and errors[1] < 40 and errors[2] < 200, errors  # a quotient's grow by 1 / |x| each time


@KINDS
def test_float32_is_as_exact(is_complex):
    x = arguments(is_complex)
    x = x.to(torch.complex64 if is_complex else torch.float32)
    assert worst(expm1_ratio(x), x, 0) * 2.0**-29 < 8


@KINDS
def test_derivatives_of_both_orders(is_complex):
    x = arguments(is_complex)[::30]
    x = torch.cat([x, 1e-3 * x, torch.zeros_like(x[:1])]).requires_grad_()
    assert gradcheck(expm1_ratio, x, check_forward_ad=True) and gradgradcheck(expm1_ratio, x)


@KINDS
def test_what_is_0_or_huge_is_finite(is_complex):
    x = torch.tensor([0.0, -0.0, -1e-320, 1e-320, -800.0, -1e300], dtype=torch.float64)
    x = (torch.complex(x, torch.zeros_like(x)) if is_complex else x).requires_grad_()
    value = expm1_ratio(x)
    (gradient,) = torch.autograd.grad(value.real.sum(), x)
    torch.testing.assert_close(value.real[:4], torch.ones(4, dtype=torch.float64), rtol=1e-15, atol=0)
    assert value.isfinite().all() and gradient.isfinite().all()


def test_no_memory_is_kept_for_it():
    """The values on the circles are computed again: what the backward pass keeps grows by few numbers a state."""
    kernel, kept = S4D(16, 64).kernel, {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        kernel.discretise()
    assert sum(kept.values()) < 8 * 16 * kernel.A_log.numel()


# ------------------------------------------------------------------------------------------------- operations

VIEWS = ("alias", "detach", "expand", "permute", "select", "slice", "split", "squeeze", "t", "transpose", "unbind")
VIEWS += ("unsqueeze", "view", "_unsafe_view", "view_as_real", "view_as_complex", "_conj", "_reshape_alias")


class Operations(TorchDispatchMode):
    """Counts operations that are not views: on a GPU each is a kernel or two."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def n_operations(system: DiagonalSystem | Tensor) -> int:
    """Those that the gradient of a sum takes, and the sum."""
    with Operations() as counted:
        sum(t.real.sum() for t in (system if isinstance(system, tuple) else (system,))).backward()
    return counted.n


@pytest.mark.parametrize("init", ["s4d-lin", "s4d-real"])
@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_a_system_and_its_kernel_take_few_operations(monkeypatch, init, rule):
    """On a GPU they are small, and hundreds of kernels for them were an eighth of a training step."""
    monkeypatch.setattr(diagonal, "_powers", diagonal._powers_at_once)
    layer = S4D(16, init=init, discretization=rule)
    with Operations() as forward:
        system = layer.kernel.discretise()
    n = forward.n + n_operations(system)
    assert n <= 85, f"{n} operations of discretise and its backward pass"
    system = DiagonalSystem(*(t.detach().requires_grad_() for t in system))
    with Operations() as forward:
        K = system.kernel(2048, torch.float32)
    n = forward.n + n_operations(K)
    assert n <= 60, f"{n} operations of the kernel and its backward pass"


def test_tables_that_are_small_next_to_the_input_are_not_computed_again():
    layer, counts = S4D(2, 8), []
    for rows in (8, 512):
        with Operations() as counted:
            layer(torch.randn(rows, 64, 2))[0].sum().backward()
        counts.append(counted.n)
    assert counts[1] < counts[0], counts
