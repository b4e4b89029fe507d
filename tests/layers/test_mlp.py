"""The MLP: the equation of each kind, its sizes, the contract."""

from __future__ import annotations

import math

import pytest
import torch
from contract import check_contract, check_gradients
from torch import Tensor

from anymamba.layers.mlp import MLP
from anymamba.parts.state import NoState

KINDS = ("gelu", "swiglu", "geglu", "glu")


def make(kind: str, **options) -> MLP:
    torch.manual_seed(0)
    layer = MLP(6, kind, **{"d_hidden": 10, **options}, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    return layer


def activation(kind: str, x: float) -> float:
    if kind in ("gelu", "geglu"):
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    sigmoid = 1 / (1 + math.exp(-x))
    return x * sigmoid if kind == "swiglu" else sigmoid


@torch.no_grad()
def naive(layer: MLP, x: Tensor) -> Tensor:
    """One token (d_model,)."""
    hidden = layer.in_proj.weight @ x
    if layer.in_proj.bias is not None:
        hidden = hidden + layer.in_proj.bias
    if layer.kind == "gelu":
        inside = [activation("gelu", float(h)) for h in hidden]
    else:
        u, gate = hidden[: layer.d_hidden], hidden[layer.d_hidden :]
        inside = [float(a) * activation(layer.kind, float(g)) for a, g in zip(u, gate, strict=True)]
    y = layer.out_proj.weight @ torch.tensor(inside, dtype=x.dtype)
    return y if layer.out_proj.bias is None else y + layer.out_proj.bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_equation(kind, bias):
    layer = make(kind, bias=bias)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = torch.stack([torch.stack([naive(layer, token) for token in row]) for row in x])
    torch.testing.assert_close(layer(x)[0].detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_contract_and_gradients(kind):
    check_contract(make(kind), 6)
    check_gradients(make(kind), 6)


def test_sizes_and_biases_by_default():
    assert MLP(64, "gelu").d_hidden == 256 and MLP(64, "gelu").in_proj.bias is not None
    for d_model, d_hidden in ((64, 256), (48, 128), (49, 256), (768, 2048), (1024, 2816)):
        layer = MLP(d_model, device="meta")
        assert (layer.kind, layer.d_hidden) == ("swiglu", d_hidden)
        assert layer.in_proj.weight.shape == (2 * d_hidden, d_model)
        assert layer.in_proj.bias is layer.out_proj.bias is None
    assert MLP(64, "gelu", bias=False).out_proj.bias is None
    assert MLP(64, "swiglu", bias=True).in_proj.bias is not None


def test_it_has_no_state():
    layer = make("swiglu")
    assert layer.init_state(3) == NoState() == layer(torch.zeros(1, 2, 6, dtype=torch.float64))[1]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32(kind):
    torch.manual_seed(0)
    layer = MLP(32, kind)
    x = torch.randn(2, 5, 32)
    y, _ = layer(x)
    narrow, _ = layer.to(torch.bfloat16)(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - y).abs().max() < 0.03 * y.abs().max()


def test_initialisation_is_that_of_linear_maps():
    torch.manual_seed(0)
    layer = MLP(64, "gelu")
    for projection, fan_in in ((layer.in_proj, 64), (layer.out_proj, 256)):
        assert 0.95 * fan_in**-0.5 < projection.weight.abs().max() <= fan_in**-0.5
    before = [p.clone() for p in layer.parameters()]
    torch.manual_seed(0)
    layer.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((8, "relu"), "kind must be one of gelu, swiglu, geglu, glu, got 'relu'"),
        ((8, "gelu", 0), "d_hidden must be at least 1, got 0"),
        ((0, "gelu", 4), "d_model must be at least 1, got 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLP(*arguments)
