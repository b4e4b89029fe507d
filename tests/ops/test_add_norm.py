"""The norm of a sum: its definition, what models computed before it was one op, derivatives, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scan_cases import HERE, rms
from torch import Tensor

from anymamba.kernels.add_norm import reference
from anymamba.kernels.add_norm.arguments import NormArguments
from anymamba.kernels.backends import BACKENDS
from anymamba.ops.add_norm import add_norm

NAMES = [m.NAME for m in BACKENDS["add_norm"] if m.unavailable(HERE.type) is None]
SHORT = torch.bfloat16

EVERY = pytest.mark.parametrize("name", NAMES)
BOTH = pytest.mark.parametrize("subtract_mean", [False, True], ids=["rms", "layer"])


def inputs(
    *shape: int, dtype: torch.dtype = torch.float64, residual: bool = True, weight: bool = True, bias: bool = True
) -> dict[str, Any]:
    """Tensors of `add_norm`; a residual of short numbers is float32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(HERE)

    wide = torch.promote_types(dtype, torch.float32)
    return {
        "x": (normal(*shape) + 1).to(dtype),
        "residual": normal(*shape).to(wide) if residual else None,
        "weight": normal(shape[-1]).to(dtype) if weight else None,
        "bias": normal(shape[-1]).to(dtype) if bias else None,
    }


def run(tensors: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """y, the sum and every gradient, from fixed cotangents of both."""
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in tensors.items()}
    found = add_norm(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    shape = found.y.shape
    c = [torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(HERE) for _ in range(2)]
    loss = (found.y * c[0]).sum() + (found.total * c[1]).sum()
    present = [k for k, t in leaves.items() if t is not None]
    gradients = torch.autograd.grad(loss, [leaves[k] for k in present])
    return {"y": found.y.detach(), "total": found.total.detach()} | {
        f"d{k}": g for k, g in zip(present, gradients, strict=True)
    }


ABSENT: dict[str, dict[str, bool]] = {
    "all": {},
    "no residual": {"residual": False},
    "no bias": {"bias": False},
    "bare": {"residual": False, "weight": False, "bias": False},
}


@EVERY
@BOTH
@pytest.mark.parametrize("absent", ABSENT.values(), ids=ABSENT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, SHORT, torch.float16], ids=str)
def test_against_float64(name, subtract_mean, absent, dtype):
    tensors = inputs(3, 5, 24, dtype=dtype, **absent)
    got, peer = (run(tensors, subtract_mean=subtract_mean, backend=b) for b in (name, "reference"))
    wide = {k: None if t is None else t.double() for k, t in tensors.items()}
    exact = run(wide, subtract_mean=subtract_mean, backend="reference")
    for key, value in got.items():
        assert value.dtype == peer[key].dtype and value.shape == peer[key].shape, key
        error, peer_error = (rms(t.double() - exact[key]) for t in (value, peer[key]))
        rounding = (
            torch.finfo(value.dtype).eps
            * rms(exact[key])
            * (4 if value.ndim == 1 or value.dtype == torch.float64 else 1)
        )
        assert error <= 2 * peer_error + rounding, f"{key}: {error:.2e}, reference {peer_error:.2e}, {rounding:.2e}"


@pytest.mark.skipif(HERE.type != "cpu", reason="models on a GPU took torch's kernels before")
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, SHORT], ids=str)
def test_torch_operations_have_the_bits_of_separate_calls(subtract_mean, dtype):
    tensors = inputs(2, 7, 48, dtype=dtype, bias=subtract_mean)
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in tensors.items()}
    total = leaves["residual"] + leaves["x"]
    weight, bias = (None if leaves[k] is None else leaves[k].to(total.dtype) for k in ("weight", "bias"))
    layer_norm = subtract_mean and F.layer_norm(total, (48,), weight, bias, 1e-5)
    y = (layer_norm if subtract_mean else F.rms_norm(total, (48,), weight, 1e-5)).to(dtype)
    found = add_norm(**leaves, subtract_mean=subtract_mean, backend="portable")
    assert torch.equal(found.y, y) and torch.equal(found.total, total)
    present = [t for t in leaves.values() if t is not None]
    gradients = [torch.autograd.grad(a.sin().sum() + b.cos().sum(), present) for a, b in (found, (y, total))]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@EVERY
@BOTH
def test_derivatives_of_both_orders_and_forwards(name, subtract_mean):
    tensors = inputs(2, 5)
    leaves = [t.requires_grad_() for t in tensors.values()]

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(tensors, values, strict=True))
        return tuple(add_norm(**named, subtract_mean=subtract_mean, backend=name))  # type: ignore[return-value]

    torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    torch.autograd.gradgradcheck(call, leaves)


@EVERY
@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_dtype_of_its_own_is_one_rounding(name, subtract_mean, dtype):
    tensors = inputs(3, 24, dtype=torch.float32)
    found, wide = (add_norm(**tensors, subtract_mean=subtract_mean, dtype=d, backend=name) for d in (dtype, None))
    assert found.y.dtype == dtype and torch.equal(found.y, wide.y.to(dtype))
    assert torch.equal(found.total, wide.total)
    got, want = (run(tensors, subtract_mean=subtract_mean, dtype=dtype, backend=b) for b in (name, "reference"))
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-4)
    assert add_norm(**tensors, dtype=torch.float64, backend=name).y.dtype == torch.float64


class Opaque:
    """A backend that torch cannot look into, as compiled kernels are: derivatives come from its `backward`."""

    NAME, TRANSPARENT = "opaque", frozenset[str]()

    @staticmethod
    def unavailable(device_type: str) -> None:
        return None

    @staticmethod
    def refuses(arguments: NormArguments) -> None:
        return None

    @staticmethod
    @torch.no_grad()
    def forward(a: NormArguments, save: bool) -> tuple[Tensor, Tensor, None]:
        y, total, _ = reference.forward(a, save)
        return y, total.clone() if a.residual is not None else total.new_empty(0), None

    @staticmethod
    @torch.enable_grad()
    def backward(dy: Tensor, dtotal: Tensor | None, a: NormArguments, saved: Tensor) -> list[Tensor | None]:
        leaves = [None if t is None else t.detach().requires_grad_() for t in a.tensors]
        y, total, _ = reference.forward(NormArguments(*leaves, *a.options), False)
        outputs, cotangents = ((y, total), (dy, a.total_gradient(dtotal))) if a.residual is not None else ((y,), (dy,))
        found = iter(torch.autograd.grad(outputs, [t for t in leaves if t is not None], cotangents))
        return [None if t is None else next(found) for t in leaves]


@pytest.fixture
def opaque(monkeypatch) -> str:
    monkeypatch.setitem(BACKENDS, "add_norm", (*BACKENDS["add_norm"], Opaque))
    return Opaque.NAME


@BOTH
@pytest.mark.parametrize("absent", ABSENT.values(), ids=ABSENT)
def test_kernels_keep_the_sum_and_have_every_derivative(opaque, subtract_mean, absent):
    tensors = inputs(2, 5, **absent)
    names = [k for k, t in tensors.items() if t is not None]
    leaves = [tensors[k].requires_grad_() for k in names]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        found = add_norm(**dict(zip(names, values, strict=True)), subtract_mean=subtract_mean, backend=opaque)
        return (found.y, found.total) if "residual" in names else (found.y,)

    torch.autograd.gradcheck(call, leaves, fast_mode=True)
    torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        _, *total = call(*leaves)
    if total:
        assert total[0].data_ptr() in saved and not {t.data_ptr() for t in leaves[:2]} & set(saved)


@EVERY
def test_vmap_is_a_loop(name):
    tensors = inputs(3, 2, 8, dtype=torch.float32)
    weight = tensors["weight"]

    def one(x: Tensor, residual: Tensor) -> Tensor:
        return add_norm(x, weight, residual=residual, backend=name).y

    got = torch.vmap(one)(tensors["x"], tensors["residual"])
    want = torch.stack([one(*pair) for pair in zip(tensors["x"], tensors["residual"], strict=True)])
    torch.testing.assert_close(got, want)


def test_without_a_residual_the_sum_is_x_itself():
    x = inputs(2, 8)["x"]
    assert add_norm(x).total is x


@EVERY
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,)], ids=str)
def test_empty_and_small_shapes(name, shape):
    tensors = inputs(*shape, dtype=torch.float32)
    got, want = run(tensors, backend=name), run(tensors, backend="reference")
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(())}, ValueError, r"x must be \(..., size\) with a size of at least 1, got \(\)"),
        ({"residual": torch.zeros(3, 4)}, ValueError, r"residual must be like x = \(2, 4\), got \(3, 4\)"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must be \(size,\) = \(4\), got \(3,\)"),
        ({"bias": torch.zeros(4, dtype=torch.int32)}, TypeError, "bias must be floating point, got torch.int32"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
        (
            {"dtype": torch.int32},
            TypeError,
            "dtype must be a floating-point dtype of at least 16 bits, got torch.int32",
        ),
        (
            {"backend": "fast"},
            ValueError,
            "unknown backend 'fast' for add_norm; the backends are cpu, cuda, portable, reference",
        ),
    ],
)
def test_what_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        add_norm(**{"x": torch.zeros(2, 4)} | change)
