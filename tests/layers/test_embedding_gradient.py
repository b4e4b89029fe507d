"""Embeddings whose gradient comes from sums in a fixed order; here a stand-in has the place of the kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from anymamba.kernels.embedding_gradient import cuda
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.ops.dispatch import backend
from anymamba.parts import embedding as embeddings
from anymamba.parts.embedding import embed, embedding

IDS = torch.tensor([[1, 4, 1], [0, 1, 4]])


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """The shapes that the stand-in of the kernel has summed."""
    summed: list[tuple[int, ...]] = []

    def sums(dy: torch.Tensor, ids: torch.Tensor, vocab: int) -> torch.Tensor:
        assert not torch.is_grad_enabled() and ids.shape == dy.shape[:-1]
        summed.append(tuple(dy.shape))
        wide = dy.double().reshape(-1, dy.shape[-1])
        return torch.zeros(vocab, dy.shape[-1]).double().index_add(0, ids.reshape(-1), wide).float()

    monkeypatch.setattr(embeddings, "_is_on_gpu", lambda x: True)
    monkeypatch.setattr(cuda, "serves", lambda dy: dy.dtype in cuda.DTYPES and dy.numel() > 0)
    monkeypatch.setattr(cuda, "sums", sums)
    return summed


def table(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("ids", [IDS, IDS[0], IDS[0, 0], IDS[:0], IDS.int()], ids=["2", "1", "0", "none", "int32"])
def test_values_and_gradients(ids, dtype, kernel):
    weight = table(dtype)
    y, wanted = embedding(ids, weight), F.embedding(ids, weight)
    assert y.equal(wanted) and y.grad_fn is not None
    dy, wide = torch.randn(y.shape).to(dtype), weight.detach().double().requires_grad_()
    (found,) = torch.autograd.grad(y, weight, dy)
    (exact,) = torch.autograd.grad(F.embedding(ids, wide), wide, dy.double())
    torch.testing.assert_close(found, exact.to(dtype))
    assert kernel == ([tuple(y.shape)] if ids.numel() and dtype in cuda.DTYPES else [])


def test_sums_of_short_numbers_are_rounded_once():
    weight = torch.randn(2, 3).bfloat16().requires_grad_()
    ids, dy = torch.arange(1000) % 2, torch.randn(1000, 3).bfloat16()
    (found,) = torch.autograd.grad(embedding(ids, weight), weight, dy)
    assert found.equal(torch.stack([dy[i::2].double().sum(0) for i in (0, 1)]).float().bfloat16())


def test_other_gpus_add_in_one_order_too(kernel, monkeypatch):
    monkeypatch.setattr(cuda, "serves", lambda dy: False)
    weight, dy = table(), torch.randn(2, 3, 3)
    found, wanted = (torch.autograd.grad(f(IDS, weight), weight, dy)[0] for f in (embedding, F.embedding))
    torch.testing.assert_close(found, wanted)
    assert kernel == []


def test_derivatives_of_any_order_and_mode(kernel):
    weight = table(torch.float64)
    assert gradcheck(lambda w: embedding(IDS, w).sin(), weight)
    assert gradgradcheck(lambda w: embedding(IDS, w).sin(), weight)
    assert kernel == []
    weight = table()
    of_rows = vmap(grad(lambda w, ids: embedding(ids, w).square().sum()), (None, 0))(weight.detach(), IDS)
    assert of_rows.shape == (2, 5, 3) and of_rows.sum(0).allclose(
        grad(lambda w: embedding(IDS, w).square().sum())(weight.detach())
    )
    _, slope = jvp(lambda w: embedding(IDS, w), (weight.detach(),), (torch.ones(5, 3),))
    assert slope.equal(torch.ones(2, 3, 3))


def test_graphs_checkpoints_and_backends(kernel):
    weight, dy = table(), torch.randn(2, 3, 3)
    (wanted,) = torch.autograd.grad(F.embedding(IDS, weight), weight, dy)
    compiled = torch.compile(lambda w: embedding(IDS, w), backend="aot_eager", fullgraph=True)
    assert torch.autograd.grad(compiled(weight), weight, dy)[0].allclose(wanted)
    with backend("portable"):
        assert torch.autograd.grad(embedding(IDS, weight), weight, dy)[0].allclose(wanted)
    assert kernel == []
    again = checkpoint(embedding, IDS, weight, use_reentrant=False)
    assert torch.autograd.grad(again, weight, dy)[0].allclose(wanted) and kernel == [(2, 3, 3)]


def test_without_gradients_nothing_is_kept():
    with torch.no_grad():
        assert embedding(IDS, table()).grad_fn is None
    assert embedding(IDS, table().detach()).grad_fn is None


class Doubled(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


@pytest.mark.parametrize(
    "module",
    [
        Doubled(5, 3),
        nn.Embedding(5, 3, padding_idx=1),
        nn.Embedding(5, 3, max_norm=0.1),
        nn.Embedding(5, 3, scale_grad_by_freq=True),
        nn.Embedding(5, 3, sparse=True),
    ],
    ids=["a subclass", "padding", "a norm", "frequencies", "sparse"],
)
def test_other_modules_do_what_they_say(module, kernel):
    y = embed(module, IDS)
    torch.testing.assert_close(y, module(IDS))  # a norm is divided by again
    dy = torch.randn(2, 3, 3)
    found, wanted = (torch.autograd.grad(t, module.weight, dy)[0].to_dense() for t in (y, module(IDS)))
    assert found.equal(wanted) and kernel == []


def test_hooks_are_called(kernel):
    module, seen = nn.Embedding(5, 3), []
    hook = module.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    embed(module, IDS).sum().backward()
    assert seen == [(2, 3, 3)] and kernel == []
    hook.remove()
    embed(module, IDS).sum().backward()
    assert kernel == [(2, 3, 3)]


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model(tied, kernel):
    config = ModelConfig(d_model=16, n_layers=1, vocab_size=24, tie_embeddings=tied)
    model, ids = LanguageModel(config), torch.randint(24, (2, 9))

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model.loss(ids, ids).loss, list(model.parameters())))

    found = gradients()
    assert kernel == [(2, 9, 16)]
    with backend("portable"):
        wanted = gradients()
    assert len(kernel) == 1
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    functional_call(model, weights, (ids,)).logits.sum().backward()
    assert len(kernel) == 2 and weights["embedding.weight"].grad is not None
