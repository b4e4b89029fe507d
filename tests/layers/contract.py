"""What every layer promises, as checks that the tests of each layer run: one function, however a sequence is cut."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from anymamba.parts.state import concatenate_rows, select_rows, state_tensors

LENGTHS = (1, 2, 7, 33)


def close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    """Largest difference relative to the expected values' size; NaN fails."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} and {tuple(expected.shape)}"
    if expected.numel():
        error = ((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
        assert error <= tolerance, f"{what}: differs by {error:.2e}, allowed {tolerance:.0e}"


def states_close(actual: Any, expected: Any, what: str, tolerance: float = 1e-9) -> None:
    """All tensors of two states."""
    for i, (a, b) in enumerate(zip(state_tensors(actual), state_tensors(expected), strict=True)):
        close(a, b, f"{what}, tensor {i} of the state", tolerance)


@torch.no_grad()
def check_contract(layer: nn.Module, width: int, tolerance: float = 1e-9, lengths: tuple[int, ...] = LENGTHS) -> None:
    """Run every check on a float64 layer of this width in evaluation mode."""
    for length in lengths:
        check_pieces(layer, torch.randn(2, length, width, dtype=torch.float64), tolerance)
    check_packed(layer, width, tolerance)
    check_padded(layer, width, tolerance)
    check_causal(layer, width)
    check_empty(layer, width)
    check_rows_of_the_state(layer, width)
    check_kind_of_the_state(layer, width)


def check_pieces(layer: nn.Module, x: Tensor, tolerance: float) -> None:
    """whole == two pieces == steps, outputs and states, and the state after none of it is that of the beginning."""
    whole, state = layer(x)
    fresh, _ = layer(x, layer.init_state(x.shape[0]))
    close(fresh, whole, f"length {x.shape[1]}, from init_state", tolerance)
    cut = x.shape[1] // 2
    first, between = layer(x[:, :cut])
    second, after = layer(x[:, cut:], between)
    close(torch.cat([first, second], 1), whole, f"length {x.shape[1]}, two pieces", tolerance)
    states_close(after, state, f"length {x.shape[1]}, two pieces", tolerance)
    stepped, running = [], layer.init_state(x.shape[0])
    for t in range(x.shape[1]):
        y, running = layer.step(x[:, t], running)
        stepped.append(y)
    close(torch.stack(stepped, 1), whole, f"length {x.shape[1]}, steps", tolerance)
    states_close(running, state, f"length {x.shape[1]}, steps", tolerance)


def check_packed(layer: nn.Module, width: int, tolerance: float) -> None:
    """Packed sequences (an empty one among them), from their beginnings and from states, are what each is alone."""
    sizes = [5, 1, 0, 9]
    before = [layer(torch.randn(1, n, width, dtype=torch.float64))[1] for n in (3, 3, 3, 3)]
    parts = [torch.randn(1, n, width, dtype=torch.float64) for n in sizes]
    offsets = torch.tensor([0, 5, 6, 6, 15], dtype=torch.int32)
    together = concatenate_rows(before)
    for states, start in ((before, together), ([None] * 4, None)):
        alone = [layer(part, state) for part, state in zip(parts, states, strict=True)]
        y, after = layer(torch.cat(parts, 1), start, cu_seqlens=offsets)
        close(y, torch.cat([output for output, _ in alone], 1), "packed", tolerance)
        probe = torch.randn(4, width, dtype=torch.float64)
        goes_on, _ = layer.step(probe, after)
        for i, (_, state) in enumerate(alone):
            expected, _ = layer.step(probe[i : i + 1], state)
            close(goes_on[i : i + 1], expected, f"the state of packed sequence {i}", tolerance)


def check_padded(layer: nn.Module, width: int, tolerance: float) -> None:
    """Rows padded left or right give the outputs and states that they give without padding, also when they go on."""
    sizes, length = [8, 3, 1], 8
    rows = [torch.randn(1, n, width, dtype=torch.float64) for n in sizes]
    more = [torch.randn(1, n, width, dtype=torch.float64) for n in reversed(sizes)]
    for side in ("left", "right"):

        def pad(parts: list[Tensor], side: str = side) -> tuple[Tensor, Tensor]:
            x = torch.full((len(parts), length, width), 1e3, dtype=torch.float64)
            mask = torch.zeros(len(parts), length, dtype=torch.bool)
            for i, part in enumerate(parts):
                n = part.shape[1]
                place = slice(length - n, None) if side == "left" else slice(0, n)
                x[i, place], mask[i, place] = part[0], True
            return x, mask

        x, mask = pad(rows)
        y, state = layer(x, attention_mask=mask)
        x2, mask2 = pad(more)
        y2, state2 = layer(x2, state, attention_mask=mask2)
        probe = torch.randn(len(rows), width, dtype=torch.float64)
        goes_on, _ = layer.step(probe, state2)
        for i, (row, next_row) in enumerate(zip(rows, more, strict=True)):
            expected, alone = layer(row)
            close(y[i][mask[i]], expected[0], f"padded {side}, row {i}", tolerance)
            expected, alone = layer(next_row, alone)
            close(y2[i][mask2[i]], expected[0], f"padded {side}, going on, row {i}", tolerance)
            expected, _ = layer.step(probe[i : i + 1], alone)
            close(goes_on[i : i + 1], expected, f"padded {side}, the state of row {i}", tolerance)


def check_causal(layer: nn.Module, width: int) -> None:
    """A changed input changes nothing before it and something from it on, and nothing in other rows."""
    x = torch.randn(2, 12, width, dtype=torch.float64)
    y, _ = layer(x)
    changed = x.clone()
    changed[0, 7] += 1
    y2, _ = layer(changed)
    close(y2[0, :7], y[0, :7], "before the changed input", 1e-12)
    close(y2[1], y[1], "the row that was not changed", 1e-12)
    assert not torch.allclose(y2[0, 7:], y[0, 7:]), "the changed input changed nothing"


def check_empty(layer: nn.Module, width: int) -> None:
    """No tokens leave the state as it is; no rows give no rows."""
    _, state = layer(torch.randn(2, 5, width, dtype=torch.float64))
    y, same = layer(torch.zeros(2, 0, width, dtype=torch.float64), state)
    assert y.shape == (2, 0, width)
    states_close(same, state, "no tokens", 0.0)
    y, _ = layer(torch.zeros(0, 5, width, dtype=torch.float64))
    assert y.shape == (0, 5, width)
    assert all(t.shape[0] == 0 for t in state_tensors(select_rows(state, torch.zeros(0, dtype=torch.int64))))


def check_rows_of_the_state(layer: nn.Module, width: int) -> None:
    """A state of another number of rows raises, and is not taken for one of all rows."""
    packed = torch.tensor([0, 2, 5], dtype=torch.int32)
    for rows in (1, 3):
        x = torch.randn(2, 4, width, dtype=torch.float64)
        state = layer(torch.randn(rows, 4, width, dtype=torch.float64))[1]
        if not list(state_tensors(state)):
            return
        for call in (
            lambda x=x, state=state: layer(x, state),
            lambda x=x, state=state: layer.step(x[:, 0], state),
            lambda x=x, state=state: layer(x[:1].repeat(1, 2, 1)[:, :5], state, cu_seqlens=packed),
        ):
            with pytest.raises(ValueError, match=f"the state must have a row per sequence, got {rows} rows for 2; rep"):
                call()


class AnotherState(NamedTuple):
    """Of no layer."""

    h: Tensor


def check_kind_of_the_state(layer: nn.Module, width: int) -> None:
    """Another layer's state is refused by its name."""
    x, state = torch.randn(2, 4, width, dtype=torch.float64), AnotherState(torch.zeros(2, 1))
    for call in (lambda: layer(x, state), lambda: layer.step(x[:, 0], state)):
        with pytest.raises(TypeError, match=r"the state must be a \w+State, got a AnotherState; use a state"):
            call()


def check_gradients(layer: nn.Module, width: int, length: int = 6) -> None:
    """The gradients of the input and of every parameter agree with differences, also through the state."""
    x = torch.randn(2, length, width, dtype=torch.float64, requires_grad=True)
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def outputs(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        first, state = layer(x[:, : length // 2])
        second, after = layer(x[:, length // 2 :], state)
        return (first, second, *(t for t in state_tensors(after) if t.requires_grad))

    assert torch.autograd.gradcheck(outputs, (x, *parameters), fast_mode=True, atol=1e-6)
    torch.cat([t.reshape(-1) for t in outputs(x)[:2]]).square().sum().backward()
    without = [name for name, p in layer.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"no gradient: {without}"
