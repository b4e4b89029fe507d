"""Learned positions: a row of the table for each token, counted by the state."""

from __future__ import annotations

import pytest
import torch
from contract import check_contract, check_gradients

from anymamba.layers.positions import LearnedPositions


def make(max_positions: int = 40) -> LearnedPositions:
    torch.manual_seed(0)
    layer = LearnedPositions(max_positions, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.table.normal_()
    return layer


def test_contract():
    check_contract(make(), 5)


def test_it_adds_the_row_of_the_position():
    layer = make()
    x = torch.zeros(2, 6, 5, dtype=torch.float64)
    y, state = layer(x)
    for t in range(6):
        assert torch.equal(y[:, t], layer.table[t].expand(2, 5))
    mask = torch.tensor([[False, True, True], [True, True, False]])
    y, state = layer(x[:, :3], state, attention_mask=mask)
    assert torch.equal(y[0, 1:], layer.table[6:8]) and torch.equal(y[1, :2], layer.table[6:8])
    assert state.n_seen.tolist() == [8, 8]


def test_gradients():
    check_gradients(make(), 5)


def test_initialisation():
    torch.manual_seed(0)
    layer = LearnedPositions(200, 64)
    assert abs(layer.table.std().item() - 0.02) < 1e-3
    before = layer.table.clone()
    torch.manual_seed(0)
    layer.reset_parameters()
    assert torch.equal(before, layer.table)


def test_a_sequence_that_leaves_the_table_is_an_error_that_names_the_way_out():
    layer = make(8)
    x = torch.zeros(2, 9, 5, dtype=torch.float64)
    message = "9 tokens is longer than the table of 8 absolute positions; raise max_positions, .*rotary"
    with pytest.raises(ValueError, match=message):
        layer(x)
    _, state = layer(x[:, :8])
    with pytest.raises(ValueError, match=message):
        layer.step(x[:, 0], state)
    with pytest.raises(ValueError, match=message):
        layer(x[:, :1], state)


def test_padding_may_lie_past_the_end():
    layer = make(8)
    x = torch.zeros(2, 12, 5, dtype=torch.float64)
    mask = torch.arange(12) < torch.tensor([[8], [3]])
    y, state = layer(x, attention_mask=mask)
    assert torch.equal(y[0, :8], layer.table) and state.n_seen.tolist() == [8, 3]


def test_dtype_is_that_of_the_input():
    layer = LearnedPositions(8, 4)
    y, state = layer(torch.zeros(1, 3, 4, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert layer.step(torch.zeros(1, 4, dtype=torch.bfloat16), state)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("sizes, name", [((0, 4), "max_positions"), ((4, 0), "d_model")])
def test_sizes(sizes, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        LearnedPositions(*sizes)
