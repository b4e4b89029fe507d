"""The gated attention unit: the equation with explicit loops, the contract, the cache as a value, precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import check_contract, check_gradients
from torch import Tensor

from anymamba.layers import gau
from anymamba.layers.gau import GAU, GAUState
from anymamba.parts.state import concatenate_rows, map_state, select_rows, state_bytes

WIDTH = 6
OPTIONS = {
    "short-table": {"max_distance": 4},
    "long-table": {"max_distance": 50},
    "narrow": {"expand": 0.5, "d_key": 3},
}


def make(**options) -> GAU:
    """A float64 layer moved away from its initialisation, where products hardly count."""
    torch.manual_seed(0)
    layer = GAU(WIDTH, **{"d_key": 5, **options}, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return layer


@pytest.fixture(params=["whole", "blocks"])
def blocks(request, monkeypatch):
    """The same with scores of a few queries at a time, so that short tests have several blocks."""
    if request.param == "blocks":
        monkeypatch.setattr(gau, "MOST_QUERIES", 5)


@torch.no_grad()
def naive(layer: GAU, x: Tensor) -> Tensor:
    """One row (length, d_model): every query with every key."""
    u, v, z = F.silu(x @ layer.in_proj.weight.T).split([layer.d_inner, layer.d_inner, layer.d_key], 1)
    y = torch.zeros_like(u)
    for t in range(x.shape[0]):
        q = z[t] * layer.q_scale + layer.q_offset
        for s in range(t + 1):
            k = z[s] * layer.k_scale + layer.k_offset
            score = float(q @ k) / (t + 1) + float(layer.relative_bias[min(t - s, layer.max_distance - 1)])
            y[t] += max(0.0, score) ** 2 * v[s]
    return (u * y) @ layer.out_proj.weight.T


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_the_equation(name, blocks):
    layer = make(**OPTIONS[name])
    for length in (1, 11):
        x = torch.randn(2, length, WIDTH, dtype=torch.float64)
        expected = torch.stack([naive(layer, row) for row in x])
        torch.testing.assert_close(layer(x)[0].detach(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OPTIONS)
def test_contract(name):
    check_contract(make(**OPTIONS[name]), WIDTH)


def test_contract_in_blocks(monkeypatch):
    monkeypatch.setattr(gau, "MOST_QUERIES", 5)
    check_contract(make(), WIDTH, lengths=(1, 13))


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name):
    check_gradients(make(**OPTIONS[name]), WIDTH)


@torch.no_grad()
def stepped(layer: GAU, x: Tensor, state: GAUState) -> tuple[Tensor, GAUState]:
    outputs = []
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


@torch.no_grad()
@pytest.mark.parametrize("uneven", [False, True])
def test_fork_rollback_and_reorder(uneven):
    layer = make()
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = not uneven
    _, state = layer(torch.randn(2, 6, WIDTH, dtype=torch.float64), attention_mask=mask)
    _, state = stepped(layer, torch.randn(2, 3, WIDTH, dtype=torch.float64), state)
    kept = map_state(Tensor.clone, state)
    futures = torch.randn(2, 2, 5, WIDTH, dtype=torch.float64)
    expected = [stepped(layer, x, map_state(Tensor.clone, kept))[0] for x in futures]
    states = [state, state]
    for t in range(5):
        for i in range(2):
            y, states[i] = layer.step(futures[i][:, t], states[i])
            torch.testing.assert_close(y, expected[i][:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stepped(layer, futures[0], state)[0], expected[0], rtol=1e-12, atol=1e-12)
    index = torch.tensor([1, 0, 1])
    y, _ = stepped(layer, futures[0][index], select_rows(state, index))
    torch.testing.assert_close(y, expected[0][index], rtol=1e-12, atol=1e-12)
    y, _ = stepped(layer, torch.cat([futures[0], futures[1]]), concatenate_rows([state, state]))
    torch.testing.assert_close(y, torch.cat(expected), rtol=1e-12, atol=1e-12)


def test_state_sizes():
    layer = GAU(16, d_key=8)
    _, state = layer(torch.randn(2, 9, 16))
    assert state.keys.shape == (2, 9, 8) and state.values.shape == (2, 9, 32)
    assert state_bytes(state) == 2 * (9 * (8 + 32) * 4 + 8)
    assert state_bytes(layer.init_state(3)) == 3 * 8


def test_initialisation():
    torch.manual_seed(0)
    layer = GAU(64)
    assert (layer.d_inner, layer.d_key, layer.max_distance) == (128, 128, 128)
    for vector in (layer.q_scale, layer.k_scale, layer.relative_bias):
        assert 0.015 < vector.std() < 0.025
    assert not layer.q_offset.any() and not layer.k_offset.any()
    assert layer.in_proj.bias is layer.out_proj.bias is None
    before = [p.clone() for p in layer.parameters()]
    torch.manual_seed(0)
    GAU.__init__(layer, 64)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    layer.reset_parameters()
    assert not any(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True) if a.any())


def test_the_first_gradients_are_not_lost():
    """At initialisation every parameter that is not multiplied by a zero gets a gradient."""
    torch.manual_seed(0)
    layer = GAU(16)
    layer(torch.randn(2, 40, 16))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


@torch.no_grad()
def test_bfloat16_is_near_float32():
    torch.manual_seed(0)
    layer = GAU(32)
    for vector in (layer.q_scale, layer.k_scale, layer.relative_bias):
        vector.mul_(20)
    x = torch.randn(2, 40, 32)
    y, _ = layer(x)
    whole, state = layer.to(torch.bfloat16)(x.bfloat16())
    assert whole.dtype == state.keys.dtype == torch.bfloat16
    assert (whole.float() - y).abs().max() < 0.03 * y.abs().max()
    assert layer.step(x[:, 0].bfloat16(), state)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"d_model": 4, "expand": 0.1}, "expand .* must be at least 1, got 0"),
        ({"d_model": 4, "d_key": 0}, "d_key must be at least 1, got 0"),
        ({"d_model": 4, "max_distance": 0}, "max_distance must be at least 1, got 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        GAU(**arguments)
