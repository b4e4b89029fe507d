"""Products with a gate, the CUDA kernels run on the processor."""

from __future__ import annotations

import pytest
import torch
from emulation import emulate
from torch.fx.experimental.proxy_tensor import make_fx

from anymamba.kernels.gated import cuda
from anymamba.parts import gated

if emulate.missing():
    pytest.skip(f"kernels cannot be emulated: {emulate.missing()}", allow_module_level=True)

SHAPES = [(8,), (3, 16), (2, 5, 24), (4, 129, 40)]
"""The last has more than a block."""


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate.patch(monkeypatch)
    monkeypatch.setattr(cuda, "serves", lambda x, g: x.dtype in cuda.DTYPES and not x.shape[-1] % (16 // x.itemsize))


def third(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A part of a wider tensor, as layers give it; some numbers are far out."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(*shape[:-1], 3 * shape[-1], generator=generator)
    return (wide * (1 + 40 * (wide > 1.5))).to(dtype).chunk(3, -1)[1]


def check(found: torch.Tensor, wanted: torch.Tensor, within: float = 1.0) -> None:
    assert found.shape == wanted.shape
    one = max(torch.finfo(found.dtype).eps, 1e-6) * within
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=one, atol=one)


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", cuda.FUNCTIONS)
def test_values_and_gradients(function, shape, dtype):
    x, g = (third(*shape, dtype=dtype, seed=i).requires_grad_() for i in range(2))
    wide = [t.detach().double().requires_grad_() for t in (x, g)]
    dy = third(*shape, dtype=dtype, seed=2)
    y, exact = gated.gated(x, g, function), wide[0] * gated.FUNCTIONS[function](wide[1])
    assert y.is_contiguous()
    check(y, exact)
    found = torch.autograd.grad(y, (x, g), dy)
    for one, wanted in zip(found, torch.autograd.grad(exact, wide, dy.double()), strict=True):
        check(one, wanted, within=4.0)


def test_the_gradient_of_halves_is_one_tensor(monkeypatch):
    both = third(7, 32, dtype=torch.bfloat16, seed=0).requires_grad_()
    made: list[torch.Tensor] = []
    gradient = cuda.gradient_of_halves
    monkeypatch.setattr(cuda, "gradient_of_halves", lambda *given: made.append(gradient(*given)) or made[-1])
    y = gated.gated_halves(both, "silu")
    (found,) = torch.autograd.grad(y, both, torch.ones_like(y))
    assert found.data_ptr() == made[0].data_ptr()
    wide = both.detach().double().requires_grad_()
    x, g = wide.chunk(2, -1)
    (wanted,) = torch.autograd.grad((x * torch.nn.functional.silu(g)).sum(), wide)
    check(found, wanted, within=4.0)


def test_what_is_not_aligned_is_copied():
    x, g = (torch.randn(5, 17)[:, 1:].to(torch.bfloat16) for _ in range(2))
    shifted = torch.randn(81).to(torch.bfloat16)[1:].view(5, 16)
    check(cuda.multiply(x, shifted, "identity"), x.double() * shifted.double())
    for found, other in zip(cuda.gradients(shifted, x, g, "identity"), (g, x), strict=True):
        check(found, shifted.double() * other.double())


def test_gates_far_out_have_finite_gradients():
    g = torch.tensor([-3e38, -1e20, -100.0, 0.0, 100.0, 1e20, 3e38, 1.0])
    for function in ("gelu", "silu", "sigmoid"):
        dx, dg = cuda.gradients(torch.ones(8), torch.ones(8), g, function)
        assert torch.cat([dx, dg]).isfinite().all()
        assert dx[0] == dx[1] == 0  # nothing gets through


def test_second_derivatives_come_from_operations():
    x, g = (torch.randn(3, 8, dtype=torch.float32).requires_grad_() for _ in range(2))
    y = gated.gated(x, g, "silu")
    first = torch.autograd.grad(y.square().sum(), (x, g), create_graph=True)
    found = torch.autograd.grad(sum(t.square().sum() for t in first), (x, g))
    wide = [t.detach().double().requires_grad_() for t in (x, g)]
    exact = wide[0] * torch.nn.functional.silu(wide[1])
    first = torch.autograd.grad(exact.square().sum(), wide, create_graph=True)
    for one, wanted in zip(found, torch.autograd.grad(sum(t.square().sum() for t in first), wide), strict=True):
        torch.testing.assert_close(one.double(), wanted, rtol=1e-4, atol=1e-4)


def test_tracers_see_operations(monkeypatch):
    monkeypatch.setattr(cuda, "_launch", None)
    both = third(2, 3, 16, dtype=torch.bfloat16, seed=0)
    graph = make_fx(lambda t: gated.gated_halves(t, "silu"))(torch.zeros_like(both))
    x, g = both.double().chunk(2, -1)
    torch.testing.assert_close(graph(both).double(), x * torch.nn.functional.silu(g), rtol=0.02, atol=0.02)
    compiled = torch.compile(lambda t: gated.gated_halves(t, "silu"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(both), graph(both))


def test_an_odd_width_has_no_halves():
    with pytest.raises(ValueError, match="even number of channels, got 7"):
        gated.gated_halves(torch.ones(7), "silu")
