"""The CUDA kernels of the norm of a sum, run on the processor: their values, races, and how they are called."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from emulation import emulate
from scan_backends import same_bits
from scan_cases import rms
from torch import Tensor

from anymamba.kernels.add_norm import cuda, reference
from anymamba.kernels.add_norm.arguments import NormArguments
from anymamba.kernels.add_norm.cuda import call

if emulate.missing():
    pytest.skip(f"kernels cannot be emulated: {emulate.missing()}", allow_module_level=True)

BOTH = pytest.mark.parametrize("subtract_mean", [False, True], ids=["rms", "layer"])


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate.patch(monkeypatch, 2)


def arguments(
    rows: int = 11,
    size: int = 12,
    *,
    dtype: torch.dtype = torch.float32,
    residual: torch.dtype | None = torch.float32,
    weight: torch.dtype | None = torch.float32,
    bias: torch.dtype | None = torch.float32,
    subtract_mean: bool = False,
) -> NormArguments:
    """Random ones; the mean of a row is far from 0."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, of: torch.dtype | None) -> Tensor | None:
        return None if of is None else torch.randn(shape, generator=generator, dtype=torch.float64).to(of)

    x = normal(rows, size, of=dtype)
    assert x is not None
    tensors = (normal(rows, size, of=residual), normal(size, of=weight), normal(size, of=bias))
    return NormArguments(x + 2, *tensors, 1e-5, subtract_mean)


def results(module: Any, a: NormArguments) -> dict[str, Tensor]:
    """y, the sum and, from fixed cotangents, every gradient; those of the reference by automatic differentiation."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in a.tensors]
    y, total, saved = module.forward(a if module is cuda else NormArguments(*leaves, *a.options), True)
    generator = torch.Generator().manual_seed(1)
    shape = a.x.shape
    dy, dtotal = (torch.randn(shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (y, total))
    if module is cuda:
        gradients = module.backward(dy, dtotal, a, saved)
    else:
        outputs = (y,) if a.residual is None else (y, total)
        present = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(outputs, present, (dy, dtotal)[: len(outputs)]))
        gradients = [None if t is None else next(found) for t in leaves]
    named = {f"d{k}": g for k, g in zip(a._fields, gradients, strict=False) if g is not None}
    return {"y": y.detach()} | ({} if a.residual is None else {"total": total.detach()}) | named


def check(**options: Any) -> None:
    """Errors against float64 are at most twice those of the reference and one rounding."""
    a = arguments(**options)
    wide = NormArguments(*(None if t is None else t.double() for t in a.tensors), *a.options)
    got, peer, exact = results(cuda, a), results(reference, a), results(reference, wide)
    assert got.keys() == peer.keys()
    for name, value in got.items():
        assert value.dtype == peer[name].dtype and value.shape == peer[name].shape, name
        error, peer_error = (rms(t.double() - exact[name]) for t in (value, peer[name]))
        rounding = max(torch.finfo(a.dtype).eps, torch.finfo(value.dtype).eps) * rms(exact[name])
        rounding *= a.n_rows**0.5 if value.ndim == 1 else 1
        assert error <= 2 * peer_error + rounding, f"{name}: {error:.3e}, reference {peer_error:.3e}, {rounding:.3e}"


@BOTH
@pytest.mark.parametrize("size", [1, 4, 7, 12, 516, 1028, 2052, 8192, 8196])
def test_sizes(size, subtract_mean):
    check(rows=5, size=size, subtract_mean=subtract_mean)


@BOTH
@pytest.mark.parametrize("rows", [1, 8, 9, 70])
@pytest.mark.parametrize("size", [12, 13])
def test_rows(rows, size, subtract_mean):
    check(rows=rows, size=size, subtract_mean=subtract_mean)


SHORT = torch.bfloat16
MIXED: dict[str, dict[str, Any]] = {
    "as a model has them": {"dtype": SHORT, "weight": SHORT, "bias": None},
    "all short": {"dtype": SHORT, "residual": SHORT, "weight": SHORT, "bias": SHORT},
    "half": {"dtype": torch.float16, "residual": torch.float16, "weight": torch.float16},
    "two short ones make a long one": {"dtype": SHORT, "residual": torch.float16},
    "no residual": {"residual": None},
    "bare": {"residual": None, "weight": None, "bias": None},
    "a short one alone": {"dtype": SHORT, "residual": None, "weight": None, "bias": None},
    "float64": {"dtype": torch.float64, "residual": torch.float64, "weight": torch.float64, "bias": torch.float64},
    "a weight of float64": {"weight": torch.float64},
}


@BOTH
@pytest.mark.parametrize("case", MIXED)
def test_dtypes_and_what_is_absent(case, subtract_mean):
    check(**MIXED[case], subtract_mean=subtract_mean)


@pytest.mark.parametrize("size", [520, 13])
def test_threads_may_run_in_any_order(size, monkeypatch):
    """Between synchronisations the lanes of a warp run the other way round: a race would change what comes out."""
    a = arguments(rows=70, size=size, subtract_mean=True)
    forwards = results(cuda, a)
    monkeypatch.setattr(emulate.Kernel, "backwards", True)
    assert same_bits(results(cuda, a), forwards)


@pytest.mark.parametrize("size", [12, 13])
def test_tensors_lie_anywhere(size):
    dense = arguments(size=size)
    padded = torch.cat([dense.x, torch.full_like(dense.x, torch.nan)], -1)[..., :size]
    moved = torch.cat([torch.zeros(1), dense.x.flatten()])[1:].view(dense.x.shape)
    for x in (padded, moved, dense.x.T.contiguous().T):
        assert same_bits(results(cuda, dense._replace(x=x)), results(cuda, dense))
    expanded = dense._replace(residual=torch.ones(()).expand(dense.x.shape))
    assert same_bits(results(cuda, expanded), results(cuda, dense._replace(residual=torch.ones(dense.x.shape))))


def test_more_dimensions_are_rows():
    a = arguments(rows=12)
    folded = a._replace(x=a.x.view(2, 3, 2, 12), residual=a.residual.view(2, 3, 2, 12))
    got, want = results(cuda, folded), results(cuda, a)
    assert got["dx"].shape == folded.x.shape and torch.equal(got["dx"].view(12, 12), want["dx"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value):
    a = arguments()
    clean = results(cuda, a)
    a.x[3, 5] = value
    dirty = results(cuda, a)
    rows = [i for i in range(11) if i != 3]
    assert all(torch.equal(dirty[k][rows], clean[k][rows]) for k in ("y", "total", "dx", "dresidual"))
    assert dirty["y"][3].isnan().any() and not dirty["total"][3, 5].isfinite()


def test_nothing_to_do():
    got = results(cuda, arguments(rows=0))
    assert got["y"].shape == (0, 12) and not got["dweight"].any() and got["dweight"].shape == (12,)


def test_statistics_are_saved_for_a_backward_pass_alone():
    a = arguments(subtract_mean=True)
    assert cuda.forward(a, True)[2].shape == cuda.saved_shape(a) == (2, 11)
    assert cuda.forward(a, False)[2].numel() == 0


def test_python_and_cuda_agree_about_the_parameters():
    text = (call.HERE / "parameters.cuh").read_text()
    body = re.search(r"struct Parameters \{(.*?)\};", text, re.DOTALL)
    names = re.findall(r"(\w+)\s*[,;]", re.sub(r"//.*", "", body[1])) if body else []
    assert tuple(names) == (*call.TENSORS, *call.FIELDS)


def test_backends_have_the_same_functions():
    for name in ("unavailable", "refuses", "description"):
        assert getattr(cuda, name).__annotations__ == getattr(reference, name).__annotations__


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_none_in_place_of_a_gradient_of_zeros(dtype):
    a = arguments(dtype=dtype)
    y, total, saved = cuda.forward(a, True)
    want, got = (cuda.backward(torch.ones_like(y), d, a, saved) for d in (torch.zeros_like(total), None))
    assert all(torch.equal(w, g) for w, g in zip(want, got, strict=True) if w is not None)
