"""The cross-entropy of a linear map: its definition, chunks, derivatives, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scan_cases import HERE
from torch import Tensor

from anymamba.kernels.backends import BACKENDS
from anymamba.ops.linear_cross_entropy import chunks, linear_cross_entropy

NAMES = [m.NAME for m in BACKENDS["linear_cross_entropy"] if m.unavailable(HERE.type) is None]
EVERY = pytest.mark.parametrize("name", NAMES)


def inputs(tokens: int = 7, vocab: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(n, 5, generator=generator, dtype=torch.float64, device="cpu").to(HERE, dtype)
        for n in (tokens, vocab)
    )
    labels = torch.randint(vocab, (tokens,), generator=generator, device="cpu").to(HERE)
    labels[1::3] = -100
    return x, weight, labels


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("most", [1 << 23, 25], ids=["whole", "chunks"])
def test_it_is_the_cross_entropy_of_the_logits(name, dtype, most, monkeypatch):
    monkeypatch.setattr(chunks, "MOST_LOGITS", most)
    x, weight, labels = inputs(dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, weight)]
    wide = torch.promote_types(dtype, torch.float32)
    want = F.cross_entropy(F.linear(x, weight).to(wide), labels, reduction="sum")
    got = linear_cross_entropy(*leaves, labels.int(), backend=name)
    assert got.dtype == wide and got.shape == ()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=0)
    for a, b in zip(*(torch.autograd.grad(3 * t, leaves) for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@EVERY
def test_derivatives_of_both_orders_and_forwards(name):
    x, weight, labels = inputs(3, 4)
    leaves = [t.requires_grad_() for t in (x, weight)]

    def call(*values: Tensor) -> Tensor:
        return linear_cross_entropy(*values, labels, backend=name)

    torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    torch.autograd.gradgradcheck(call, leaves)


@EVERY
def test_autocast_multiplies_short_numbers_and_gradients_have_the_dtype_of_their_tensors(name):
    x, weight, labels = inputs(dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight)]
    with torch.autocast(HERE.type, torch.bfloat16):
        loss = linear_cross_entropy(*leaves, labels, backend=name)
    short = linear_cross_entropy(*(t.detach().bfloat16() for t in leaves), labels, backend="portable")
    torch.testing.assert_close(loss, short, rtol=1e-5, atol=0)
    assert {g.dtype for g in torch.autograd.grad(loss, leaves)} == {torch.float32}


@EVERY
def test_per_sample_gradients(name):
    x, weight, labels = inputs(6)

    def loss(weight: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, labels, backend=name)

    rows, targets = x.view(3, 2, 5), labels.view(3, 2)
    got = torch.vmap(torch.func.grad(loss), (None, 0, 0))(weight, rows, targets)
    want = torch.stack([torch.func.grad(loss)(weight, *pair) for pair in zip(rows, targets, strict=True)])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("tokens", [0, 1])
@EVERY
def test_few_tokens(name, tokens):
    x, weight, labels = inputs(tokens)
    loss = linear_cross_entropy(x.requires_grad_(), weight, labels, backend=name)
    assert torch.autograd.grad(loss, x)[0].shape == (tokens, 5) and bool(loss == 0) == (tokens == 0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({0: torch.zeros(2, 3, 5)}, ValueError, r"x must be \(tokens, d_model\), got \(2, 3, 5\)"),
        ({1: torch.zeros(4, 6)}, ValueError, r"weight must be \(vocab, d_model\) = \(any, 5\), got \(4, 6\)"),
        ({2: torch.zeros(2).long()}, ValueError, r"labels must be \(tokens,\) = \(7\), got \(2,\)"),
        ({2: torch.zeros(7)}, TypeError, "labels must be integers, got torch.float32"),
        ({0: torch.zeros(7, 5).half()}, TypeError, "x and weight must have one dtype, got torch.float16 and torch.flo"),
    ],
)
def test_what_is_refused(change, error, words):
    arguments = [*inputs()]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(error, match=words):
        linear_cross_entropy(*arguments)
