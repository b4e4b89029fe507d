"""States of recurrent layers, and functions to select, join and copy their rows.

A state is a NamedTuple of tensors whose first dimension is the batch. A layer takes a state and returns the new one;
nothing is stored on a module. The functions here work on nested tuples of tensors, so they take the state of a layer or
of a whole model. A state that grows with the sequence (a cache) has a tensor that says how much of it each row has
filled, so that rows of any length can be joined.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

StateT = TypeVar("StateT")


class MambaState(NamedTuple):
    """State of a Mamba layer; its size does not depend on how many tokens it has seen."""

    conv: Float[Tensor, "batch d_conv_minus_1 d_inner"]
    """The last d_conv - 1 inputs of the short convolution, oldest first."""
    ssm: Float[Tensor, "batch d_inner d_state"]
    """h, in float32 or wider; complex for a complex A."""


def map_state(fn: Callable[..., Any], state: StateT, *others: StateT) -> StateT:
    """Apply fn to each tensor of a state, together with the tensors at the same places of the other states."""
    if isinstance(state, Tensor):
        return fn(state, *others)
    if not isinstance(state, tuple):
        raise TypeError(f"a state is made of nested tuples of tensors, got {type(state).__name__} inside it")
    parts = [map_state(fn, *entries) for entries in zip(state, *others, strict=True)]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def state_tensors(state: Any) -> Iterator[Tensor]:
    """The tensors of a state, in order."""
    if isinstance(state, Tensor):
        yield state
    else:
        for entry in state:
            yield from state_tensors(entry)


def require_state(state: Any, kind: type, n_sequences: int) -> None:
    """Raise TypeError unless a state has type `kind`, and ValueError unless it has a row for each sequence."""
    if not isinstance(state, kind):
        raise TypeError(
            f"the state must be a {kind.__name__}, got a {type(state).__name__}; use a state from this layer's "
            "init_state, forward or step"
        )
    for tensor in state_tensors(state):
        if tensor.shape[0] != n_sequences:
            raise ValueError(
                f"the state must have a row per sequence, got {tensor.shape[0]} rows for {n_sequences}; repeat or drop "
                "rows with select_rows, or make a new state with init_state"
            )


def select_rows(state: StateT, index: Int[Tensor, " rows"]) -> StateT:
    """Rows of a state by index: reorder (beam search), repeat (fork) or drop them."""
    return map_state(lambda t: t.index_select(0, index), state)


class NoState(NamedTuple):
    """State of a layer that computes each token by itself."""


def concatenate_rows(states: Sequence[StateT]) -> StateT:
    """Join states of the same model along the batch. Caches of different lengths are padded at the end."""
    if not states:
        raise ValueError("concatenate_rows needs at least one state, got none")
    return map_state(lambda *tensors: torch.cat(_of_one_shape(tensors)), *states)


def _of_one_shape(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Pad tensors with zeros to the largest size in every dimension except the first."""
    sizes = [max(dimension) for dimension in zip(*(t.shape[1:] for t in tensors), strict=True)]
    return [
        t
        if list(t.shape[1:]) == sizes
        else F.pad(t, _padding([n - m for n, m in zip(sizes, t.shape[1:], strict=True)]))
        for t in tensors
    ]


def _padding(missing: Sequence[int]) -> list[int]:
    """The argument of F.pad that adds entries at the end of every dimension except the first."""
    return [n for size in reversed(missing) for n in (0, size)]


def put_rows(state: StateT, index: Int[Tensor, " rows"], rows: StateT) -> StateT:
    """The state with other rows at an index, in their dtypes."""

    def put(old: Tensor, new: Tensor) -> Tensor:
        old, new = _of_one_shape([old.to(new.dtype), new])
        return old.index_copy(0, index, new)

    return map_state(put, state, rows)


def where_rows(mask: Bool[Tensor, " batch"], chosen: StateT, other: StateT) -> StateT:
    """Take the rows of `chosen` where mask is true and those of `other` elsewhere, in the dtypes of `chosen`."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        a, b = _of_one_shape([a, b.to(a.dtype)])
        return torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b)

    return map_state(pick, chosen, other)


def detach_state(state: StateT) -> StateT:
    """Detach a state from the autograd graph, for truncated back-propagation."""
    return map_state(Tensor.detach, state)


def state_bytes(state: Any) -> int:
    """The size of a state's tensors in bytes."""
    return sum(t.numel() * t.element_size() for t in state_tensors(state))


class _Wishes(threading.local):
    """Of one thread: while one trains, another may generate."""

    unwanted = 0
    """Depth of the blocks of `without_last_states` that are active."""


_wishes = _Wishes()


@contextmanager
def without_last_states() -> Iterator[None]:
    """Tell layers that nobody reads the states that they return, as in training on separate rows.

    A layer may then return NaN for what costs a pass over the sequence. Outputs and their gradients are the same. It
    holds for calls in the same thread.
    """
    _wishes.unwanted += 1
    try:
        yield
    finally:
        _wishes.unwanted -= 1


@contextmanager
def last_states() -> Iterator[None]:
    """Inside `without_last_states`: the states are read after all."""
    outside, _wishes.unwanted = _wishes.unwanted, 0
    try:
        yield
    finally:
        _wishes.unwanted = outside


def last_states_are_wanted() -> bool:
    """Whether the states after a sequence will be read."""
    return not _wishes.unwanted


def as_wanted_now(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is called now, also where the backward pass calls it again, outside `without_last_states`."""
    if torch.compiler.is_compiling():
        return function
    context = last_states if last_states_are_wanted() else without_last_states

    def run(*args: Any) -> Any:
        with context():
            return function(*args)

    return run


def unread(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN in place of a state that is not wanted; it takes no memory."""
    return torch.full((), math.nan, dtype=dtype, device=device).expand(*shape)
