"""Differentiable exchanges of rows between the ranks of a group, registered with torch.

Both are linear. A rank that computes the result must also run the backward pass, because that exchanges gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from anymamba.ops import observers
from anymamba.ops.groups import transport
from anymamba.ops.groups.group import SequenceGroup


def from_previous_rank(x: Tensor, group: SequenceGroup) -> Tensor:
    """The x of the rank before this one; zeros on the first rank. All ranks have tensors of one shape."""
    if observers.way(x) in ("function", "kernel"):
        return _EagerShift.apply(x, group.name, group.rank, group.size, 1)
    return _shift(x, group.name, group.rank, group.size, 1)


def gathered_parts(x: Tensor, group: SequenceGroup) -> Tensor:
    """The x of all ranks, (size, *shape). All ranks have tensors of one shape."""
    return _gather(x, group.name, group.size)


class _EagerShift(Function):
    """`_shift` in eager code, without torch's wrappers of a registered op: they take longer than the exchange."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, rank: int, size: int, by: int) -> Tensor:
        ctx.options = name, rank, size, by
        return transport.shifted(x, name, rank, size, by)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _shift_back(ctx, dy)


@torch.library.custom_op("anymamba::shift_over_ranks", mutates_args=())
def _shift(x: Tensor, name: str, rank: int, size: int, by: int) -> Tensor:
    return transport.shifted(x, name, rank, size, by)


@torch.library.custom_op("anymamba::gather_over_ranks", mutates_args=())
def _gather(x: Tensor, name: str, size: int) -> Tensor:
    return transport.all_gather(x, name, size)


@torch.library.custom_op("anymamba::reduce_scatter_over_ranks", mutates_args=())
def _reduce_scatter(x: Tensor, name: str, size: int) -> Tensor:
    return transport.reduce_scatter(x, name)


@_shift.register_fake
def _(x: Tensor, name: str, rank: int, size: int, by: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_gather.register_fake
def _(x: Tensor, name: str, size: int) -> Tensor:
    return x.new_empty(size, *x.shape)


@_reduce_scatter.register_fake
def _(x: Tensor, name: str, size: int) -> Tensor:
    return x.new_empty(x.shape[1:])


def _keep_options(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.options = inputs


def _shift_back(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    name, rank, size, by = ctx.options
    return _shift(dy, name, rank, size, -by), None, None, None, None


_shift.register_autograd(_shift_back, setup_context=_keep_options)
_gather.register_autograd(lambda ctx, dy: (_reduce_scatter(dy, *ctx.options), None, None), setup_context=_keep_options)
_reduce_scatter.register_autograd(lambda ctx, dy: (_gather(dy, *ctx.options), None, None), setup_context=_keep_options)
