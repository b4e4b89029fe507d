"""The CUDA kernel of the cross-entropy of a linear map, run on the processor."""

from __future__ import annotations

import re

import pytest
import torch
from emulation import emulate
from scan_cases import rms
from torch import Tensor

from anymamba.kernels.linear_cross_entropy import cuda, portable
from anymamba.kernels.linear_cross_entropy.arguments import LossArguments

if emulate.missing():
    pytest.skip(f"kernels cannot be emulated: {emulate.missing()}", allow_module_level=True)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate.patch(monkeypatch)
    monkeypatch.setattr(cuda, "MOST_LOGITS", 400)  # chunks of few tokens


def arguments(
    tokens: int = 9, vocab: int = 101, dtype: torch.dtype = torch.float32, products: torch.dtype | None = None
) -> LossArguments:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 5, generator=generator, dtype=torch.float64).to(dtype) for n in (tokens, vocab))
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[1::4] = -100
    return LossArguments(x, weight, labels, products)


def results(a: LossArguments) -> dict[str, Tensor]:
    loss, _, saved = cuda.forward(a, True)
    dx, dweight, _ = cuda.backward(torch.tensor(0.7, dtype=loss.dtype), loss.new_empty(0), a, saved)
    assert dx is not None and dweight is not None
    return {"loss": loss, "dx": dx, "dweight": dweight}


def expected(a: LossArguments) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in a[:2]]
    loss, _, _ = portable.forward(LossArguments(*leaves, *a[2:]), False)
    dx, dweight = torch.autograd.grad(loss * 0.7, leaves)
    return {"loss": loss.detach(), "dx": dx, "dweight": dweight}


@pytest.mark.parametrize(("dtype", "products"), [(torch.float32, torch.bfloat16), *((d, None) for d in (
    torch.float32, torch.float64, torch.bfloat16, torch.float16))], ids=str)  # fmt: skip
@pytest.mark.parametrize(("tokens", "vocab"), [(9, 101), (3, 1), (2, 4096 * 4 + 9), (1, 8)])
def test_values(tokens, vocab, dtype, products):
    """Errors against float64 are at most twice those of torch's own operations and a rounding, of sums in any order."""
    a = arguments(tokens, vocab, dtype, products)
    got, peer = results(a), expected(a)
    exact = expected(LossArguments(a.x.double(), a.weight.double(), a.labels))
    for name, value in got.items():
        assert value.dtype == peer[name].dtype and value.shape == peer[name].shape, name
        error, peer_error = (rms(t.double() - exact[name]) for t in (value, peer[name]))
        rounding = torch.finfo(a.logits_dtype).eps * max(rms(exact[name]), 1e-3)
        rounding *= vocab**0.5 if dtype.itemsize >= 4 else 1  # torch adds up in another order on each processor
        assert error <= 2 * peer_error + 2 * rounding, f"{name}: {error:.3e}, torch {peer_error:.3e}, {rounding:.3e}"


def test_no_gradients_unless_they_are_wanted():
    a = arguments()
    loss, _, saved = cuda.forward(a, False)
    assert saved.numel() == 0 and loss.equal(cuda.forward(a, True)[0])


def test_labels_that_are_not_counted_and_those_that_do_not_exist():
    a = arguments()
    none = a._replace(labels=torch.full_like(a.labels, -100))
    assert all(not t.any() for t in results(none).values())
    for wrong in (101, -1, 1 << 40):
        labels = a.labels.clone()
        labels[2] = wrong
        found = results(a._replace(labels=labels))
        assert found["loss"].isnan() and found["dx"][2].isnan().all() and found["dx"][3:].isfinite().all()


def test_logits_of_any_size():
    a = arguments()
    for factor in (1e4, 1e30):
        got, want = (f(a._replace(x=a.x * factor)) for f in (results, expected))
        for name in got:
            torch.testing.assert_close(got[name], want[name])
    weight = a.weight.clone()
    weight[7] = torch.inf
    assert results(a._replace(weight=weight))["loss"].isnan()


def test_nothing_to_do():
    found = results(arguments(0))
    assert found["loss"] == 0 and found["dx"].shape == (0, 5) and not found["dweight"].any()


def test_threads_may_run_in_any_order(monkeypatch):
    forwards = results(arguments())
    monkeypatch.setattr(emulate.Kernel, "backwards", True)
    backwards = results(arguments())
    assert all(torch.equal(backwards[k], forwards[k]) for k in forwards)


def test_python_and_cuda_agree_about_the_parameters():
    (variant,) = cuda.variants()
    body = re.search(r"struct Parameters \{(.*?)\};", variant.source.text, re.DOTALL)
    names = re.findall(r"(\w+)\s*[,;]", re.sub(r"//.*", "", body[1])) if body else []
    assert [n for n in names if n not in ("stride", "dtype")] == [*cuda.TENSORS, *cuda.FIELDS]
