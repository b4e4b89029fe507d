"""What one does with a state: map, select, join, choose, detach, count."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from anymamba.parts.state import (
    MambaState,
    concatenate_rows,
    detach_state,
    map_state,
    select_rows,
    state_bytes,
    state_tensors,
    where_rows,
)


class Nest(NamedTuple):
    layers: tuple
    extra: torch.Tensor


def nest(rows: int, start: float = 0.0) -> Nest:
    """A state of two layers, one of them complex, and a tensor beside them."""

    def filled(*shape, dtype=torch.float32):
        n = int(torch.tensor(shape).prod())
        return (torch.arange(n, dtype=torch.float32).view(shape) + start).to(dtype)

    layers = (
        MambaState(filled(rows, 3, 5), filled(rows, 5, 2)),
        MambaState(filled(rows, 0, 5), filled(rows, 5, 2, dtype=torch.complex64)),
    )
    return Nest(layers, filled(rows))


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(state_tensors(a), state_tensors(b), strict=True))


def test_map_keeps_the_types_and_takes_the_same_places_of_others():
    result = map_state(lambda a, b: a + b, nest(2), nest(2, 1.0))
    assert isinstance(result, Nest) and isinstance(result.layers, tuple) and isinstance(result.layers[1], MambaState)
    assert torch.equal(result.layers[0].conv, nest(2).layers[0].conv * 2 + 1)


def test_map_refuses_what_is_no_state():
    with pytest.raises(TypeError, match="a state is made of nested tuples of tensors, got list inside it"):
        map_state(torch.clone, Nest(([],), torch.zeros(1)))


def test_map_refuses_states_of_different_depth():
    with pytest.raises(ValueError):
        map_state(lambda a, b: a, nest(2), nest(2)._replace(layers=nest(2).layers[:1]))


def test_tensors_come_in_order():
    state = nest(2)
    assert [t.shape for t in state_tensors(state)] == [(2, 3, 5), (2, 5, 2), (2, 0, 5), (2, 5, 2), (2,)]


def test_select_rows_reorders_repeats_and_drops():
    picked = select_rows(nest(3), torch.tensor([2, 0, 0, 2]))
    assert picked.extra.tolist() == [2, 0, 0, 2]
    assert torch.equal(picked.layers[0].ssm[1], nest(3).layers[0].ssm[0])
    assert picked.layers[1].conv.shape == (4, 0, 5)


def test_concatenate_is_the_inverse_of_select():
    whole = nest(3)
    parts = [select_rows(whole, torch.tensor(rows)) for rows in ([0], [1, 2])]

    assert same(concatenate_rows(parts), whole)


def test_concatenate_wants_a_state():
    with pytest.raises(ValueError, match="concatenate_rows needs at least one state, got none"):
        concatenate_rows([])


def test_where_chooses_row_by_row():
    a, b = nest(3), nest(3, 100.0)
    chosen = where_rows(torch.tensor([True, False, True]), a, b)
    assert same(select_rows(chosen, torch.tensor([0, 2])), select_rows(a, torch.tensor([0, 2])))
    assert same(select_rows(chosen, torch.tensor([1])), select_rows(b, torch.tensor([1])))


def test_where_keeps_a_nan_of_the_other_row_out():
    bad = map_state(lambda t: torch.full_like(t, torch.nan), nest(2))
    assert same(where_rows(torch.tensor([True, True]), nest(2), bad), nest(2))


def test_detach_cuts_the_history():
    leaf = torch.ones(2, requires_grad=True)
    state = MambaState(leaf * 2, leaf * 3)
    assert all(not t.requires_grad for t in state_tensors(detach_state(state)))
    assert state.conv.requires_grad


def test_bytes():
    assert state_bytes(nest(2)) == 4 * (2 * 3 * 5 + 2 * 5 * 2 + 2) + 8 * (2 * 5 * 2)
    assert state_bytes(MambaState(torch.zeros(1, 3, 4, dtype=torch.bfloat16), torch.zeros(1, 4, 2))) == 24 + 32
