"""Gates, rotary positions, biases and embeddings on a GPU: kernels against torch's operations."""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import anymamba
from anymamba.kernels.column_sums import cuda as cuda_column_sums
from anymamba.kernels.embedding_gradient import cuda as cuda_embedding_gradient
from anymamba.kernels.gated import cuda as cuda_gated
from anymamba.kernels.rotary import cuda as cuda_rotary
from anymamba.layers.attention import Attention
from anymamba.layers.mlp import MLP
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.parts.embedding import embedding
from anymamba.parts.gated import FUNCTIONS, gated, gated_halves
from anymamba.parts.linear import linear
from anymamba.parts.rotary import rotate, rotate_heads
from anymamba.training.repeating import CUBLAS, repeatable

os.environ.setdefault(CUBLAS, ":4096:8")  # before the first product

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    one = max(torch.finfo(found.dtype).eps, 1e-6)
    assert (found.double() - wanted).norm() <= one * wanted.norm()


@pytest.mark.parametrize("dtype", cuda_gated.DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gates(function, dtype):
    torch.manual_seed(0)
    both = (3 * torch.randn(3, 517, 2 * 136, device="cuda")).to(dtype).requires_grad_()
    x, g = both.chunk(2, -1)
    assert cuda_gated.serves(x, g)
    wide = both.detach().double().requires_grad_()
    a, b = wide.chunk(2, -1)
    exact = a * FUNCTIONS[function](b)
    dy = torch.randn(exact.shape, device="cuda").to(dtype)
    (wanted,) = torch.autograd.grad(exact, wide, dy.double())
    for y in (gated_halves(both, function), gated(x, g, function)):
        close(y, exact.detach())
        close(torch.autograd.grad(y, both, dy, retain_graph=True)[0], wanted)


@pytest.mark.parametrize("dtype", cuda_rotary.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3], ids=["shared positions", "own positions"])
def test_rotary_positions(rows, dtype):
    torch.manual_seed(0)
    packed = torch.randn(3, 200, 8, 64, device="cuda").to(dtype).requires_grad_()
    assert cuda_rotary.serves(packed)
    positions = torch.arange(200, device="cuda")[None] + 1000 * torch.arange(rows, device="cuda")[:, None]
    found = rotate_heads(packed, positions, 2)
    wide = packed.detach().double().requires_grad_()
    q, k, v = wide.split((4, 2, 2), 2)
    wanted = rotate(q, positions), rotate(k, positions), v
    noise = [torch.randn(3, t.shape[2], 200, 64, device="cuda").to(dtype).transpose(1, 2) for t in found]
    for one, other in zip(found, wanted, strict=True):
        close(one, other.detach())
    exact = torch.autograd.grad(wanted, wide, [t.double() for t in noise])
    close(torch.autograd.grad(found, packed, noise)[0], exact[0])


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (1000, 64), (30_000, 1168), (5000, 77)])
def test_biases(rows, width):
    torch.manual_seed(0)
    layer = nn.Linear(16, width, device="cuda")
    x, dy = torch.randn(rows, 16, device="cuda"), torch.randn(rows, width, device="cuda").to(torch.bfloat16)
    assert cuda_column_sums.serves(dy)
    with torch.autocast("cuda", torch.bfloat16):
        found, plain = linear(layer, x), layer(x)
    assert torch.equal(found, plain)
    bias, weight = torch.autograd.grad(found, (layer.bias, layer.weight), dy)
    assert torch.equal(weight, torch.autograd.grad(plain, layer.weight, dy)[0])
    error = (bias.double() - dy.double().sum(0)).abs().max()
    assert bias.dtype == torch.float32 and error <= 1e-6 * dy.double().abs().sum(0).max()


@pytest.mark.parametrize(("vocab", "tokens", "width"), [(256, 32_768, 256), (5, 5000, 37), (50_280, 8192, 768)])
def test_the_gradient_of_an_embedding_has_the_same_bits_each_time(vocab, tokens, width):
    torch.manual_seed(0)
    weight = torch.randn(vocab, width, device="cuda", requires_grad=True)
    ids = (torch.randn(8, tokens // 8, device="cuda").abs() * vocab / 4).long().clamp(max=vocab - 1)
    dy = torch.randn(*ids.shape, width, device="cuda")
    assert cuda_embedding_gradient.serves(dy)
    found = [torch.autograd.grad(embedding(ids, weight), weight, dy)[0] for _ in range(10)]
    assert all(torch.equal(one, found[0]) for one in found)
    rows, wide = ids.flatten(), dy.double().flatten(0, 1)
    wanted, sizes = (
        torch.zeros(vocab, width, device="cuda").double().index_add(0, rows, x) for x in (wide, wide.abs())
    )
    assert ((found[0] - wanted).abs() <= 1e-5 * sizes).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixer", ["mamba", "h3-s4", "hyena", "attention"])
def test_a_training_step_repeats_bit_for_bit(mixer, precision):
    """Many tokens of few ids, where torch's gradient of an embedding does not. Attention needs torch's switch."""
    config = ModelConfig(d_model=128, n_layers=2, vocab_size=256, mixers=(mixer,))
    ids = (torch.randn(16, 2048, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) * 12).long() + 100
    found = []
    for _ in range(3):
        torch.manual_seed(0)
        model = LanguageModel(config, device="cuda")
        parameters = list(model.parameters())
        for _ in range(3):
            with repeatable(mixer == "attention"):
                with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                    out = model.loss(ids, ids)
                gradients = torch.autograd.grad(out.loss / out.n_tokens, parameters)
            with torch.no_grad():
                for p, g in zip(parameters, gradients, strict=True):
                    p -= 0.1 * g
        found.append((out.loss.detach(), *gradients))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("kind", ["gelu", "swiglu", "rotary", "rotary with shared keys"])
def test_layers_with_kernels_are_those_of_operations(kind):
    """Also as one graph: a compiler sees operations."""
    torch.manual_seed(0)
    keys = {"rotary": 4, "rotary with shared keys": 2}
    if kind in keys:
        layer = Attention(64, 4, n_kv_heads=keys[kind], positions="rotary", bias=True).cuda()
    else:
        layer = MLP(64, kind, 176).cuda()
    x, dy = torch.randn(2, 4, 300, 64, device="cuda")
    found = []
    for run in ("kernels", "operations", "compiled"):
        layer_of_run = torch.compile(layer, backend="aot_eager", fullgraph=True) if run == "compiled" else layer
        backend = anymamba.backend("portable") if run == "operations" else nullcontext()
        with torch.autocast("cuda", torch.bfloat16), backend:
            y = layer_of_run(x)[0]
            found.append((y, *torch.autograd.grad(y, list(layer.parameters()), dy.to(y.dtype))))
    for others in found[1:]:
        for got, want in zip(found[0], others, strict=True):
            assert (got.double() - want.double()).norm() <= 2**-5 * want.double().norm()
