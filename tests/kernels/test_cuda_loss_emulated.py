"""The CUDA kernel of the cross-entropy of a linear map, run on the processor."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
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
@pytest.mark.parametrize(("tokens", "vocab"), [(9, 101), (3, 1), (2, 4096 * 4 + 9), (1, 8), (9, 2011)])
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


@pytest.mark.parametrize("vocab", [101, cuda.FEW + 1])
def test_threads_may_run_in_any_order(vocab, monkeypatch):
    forwards = results(arguments(vocab=vocab))
    monkeypatch.setattr(emulate.Kernel, "backwards", True)
    backwards = results(arguments(vocab=vocab))
    assert all(torch.equal(backwards[k], forwards[k]) for k in forwards)


VOCABULARIES = (1, 7, 8, 9, 16, 17, 32, 33, 255, 256, 257, cuda.FEW, cuda.FEW + 1)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def rows_of(vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits and labels of a block of rows and a part of the next one; some labels are not counted."""
    generator = torch.Generator().manual_seed(vocab)
    rows = cuda.THREADS_OF_FEW // cuda.lanes_of(vocab) + 3
    logits = (3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[2::5] = -100
    return logits, labels


def kernel(logits: Tensor, labels: Tensor, gradients: bool = True) -> tuple[Tensor, Tensor]:
    """Losses and gradients of rows of logits. What lies between and after the rows is not a number."""
    (rows, vocab), dtype = logits.shape, logits.dtype
    stride = -(-vocab // cuda.WIDTH) * cuda.WIDTH
    memory = torch.full((rows + 4, stride), torch.nan, dtype=dtype)
    losses = torch.full((rows + 4,), torch.nan, dtype=torch.promote_types(dtype, torch.float32))
    given = memory[:rows, :vocab]
    given.copy_(logits)
    cuda._losses(given, labels, losses[:rows], gradients)
    assert memory[rows:].isnan().all() and losses[rows:].isnan().all(), "written after the last row"
    assert gradients or given.equal(logits)
    return losses[:rows], given


def torchs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    wide = leaf.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide, labels, ignore_index=-100, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_rows_of_few_logits(vocab, dtype, backwards, monkeypatch):
    """A warp takes several rows, one row or, above FEW, no row: errors against float64 are those of torch."""
    monkeypatch.setattr(emulate.Kernel, "backwards", backwards)
    logits, labels = rows_of(vocab, dtype)
    exact, peer, got = torchs(logits.double(), labels), torchs(logits, labels), kernel(logits, labels)
    for name, want, of_torch, value in zip(("losses", "gradients"), exact, peer, got, strict=True):
        assert value.dtype == of_torch.dtype, name
        error, peer_error = (rms(t.double() - want) for t in (value, of_torch))
        rounding = torch.finfo(value.dtype).eps * max(rms(want), 1e-3)
        assert error <= 2 * peer_error + 2 * rounding, f"{name}: {error:.3e}, torch {peer_error:.3e}, {rounding:.3e}"
    assert kernel(logits, labels, gradients=False)[0].equal(got[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_rows_with_values_that_are_not_finite(vocab, dtype):
    """Rows that are not counted have losses and gradients of 0 whatever they hold, and no row changes another."""
    logits, labels = rows_of(vocab, dtype)
    losses, gradients = kernel(logits, labels)
    ignored = labels == -100
    for value in (torch.nan, torch.inf, -torch.inf):
        changed = logits.clone()
        changed[ignored] = value
        found = kernel(changed, labels)
        assert found[0].equal(losses) and found[1].equal(gradients)
    assert not losses[ignored].any() and not gradients[ignored].any()
    changed, others = logits.clone(), torch.ones_like(ignored)
    others[[0, 1, 3]] = False
    changed[0] = -torch.inf
    changed[1, -1], changed[3, 0] = torch.nan, torch.inf
    found = kernel(changed, labels)
    assert found[0][~others].isnan().all() and found[1][~others].isnan().all()
    assert found[0][others].equal(losses[others]) and found[1][others].equal(gradients[others])


@pytest.mark.parametrize("vocab", [v for v in VOCABULARIES if v > 1])
def test_columns_of_minus_infinity_have_no_share(vocab):
    logits, labels = rows_of(vocab)
    labels[:] = vocab - 1
    logits[:, :-1] = -torch.inf
    losses, gradients = kernel(logits, labels)
    assert not losses.any() and not gradients.any()
    labels[0] = 0
    losses, gradients = kernel(logits, labels)
    assert losses[0] == torch.inf and gradients[0, 0] == -1 and gradients[0, -1] == 1


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_rows_whose_label_does_not_exist(vocab):
    logits, labels = rows_of(vocab)
    losses, gradients = kernel(logits, labels)
    for wrong in (vocab, -1, -99, 1 << 40, (1 << 32) - 100, -(1 << 32)):
        changed = labels.clone()
        changed[1::3] = wrong
        same = changed == labels
        found = kernel(logits, changed)
        assert found[0][~same].isnan().all() and found[1][~same].isnan().all()
        assert found[0][same].equal(losses[same]) and found[1][same].equal(gradients[same])


def test_a_warp_has_whole_rows():
    for vocab in range(1, cuda.FEW + 1):
        lanes = cuda.lanes_of(vocab)
        assert 32 % lanes == 0 and (lanes == 32 or vocab <= lanes * cuda.WIDTH < 2 * (vocab + cuda.WIDTH - 1))


def test_python_and_cuda_agree_about_the_parameters():
    (variant,) = cuda.variants()
    body = re.search(r"struct Parameters \{(.*?)\};", variant.source.text, re.DOTALL)
    names = re.findall(r"(\w+)\s*[,;]", re.sub(r"//.*", "", body[1])) if body else []
    assert [n for n in names if n not in ("stride", "dtype")] == [*cuda.TENSORS, *cuda.FIELDS]
