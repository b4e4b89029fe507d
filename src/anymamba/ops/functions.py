"""The autograd functions that run an op in reverse mode, and under `grad` and `vmap` of `torch.func`.

Values and first derivatives come from the op's kernels. The derivative of a first derivative is that of plain torch
operations, in turn differentiable to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from anymamba.ops import observers

Tensors = Sequence[Tensor | None]


class Rule(NamedTuple):
    """What a function runs. Tensors are the op's, in its order; options are the op's other arguments."""

    forward: Callable[[Tensors, Any], tuple[Tensor, Tensor, Tensor]]
    """y, the last state, and what the backward pass needs besides."""
    backward: Callable[[Tensor, Tensor, Tensors, Any, Tensor], list[Tensor | None]]
    """From the gradients of y and of the last state those of all tensors; None for what has no gradient."""
    operations: Callable[[Tensors, Any], tuple[Tensor, Tensor]]
    """y and the last state by torch operations."""


def apply(rule: Rule, options: Any, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and the last state, differentiable."""
    y, last_state, _ = _Run.apply(rule, options, *tensors)
    return y, last_state


class _Run(Function):
    @staticmethod
    def forward(rule: Rule, options: Any, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return rule.forward(tensors, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.rule, ctx.options, *tensors = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.state_shape, ctx.state_dtype = output[1].shape, output[1].dtype
        ctx.save_for_backward(*tensors, output[2])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, saved = ctx.saved_tensors
        dy, dlast_state, _ = cotangents
        if dy is None:
            dy = torch.zeros_like(tensors[0])
        if dlast_state is None:
            dlast_state = dy.new_zeros(ctx.state_shape, dtype=ctx.state_dtype)
        wanted = _differentiable(tensors)
        if observers.has_tangent(dy, dlast_state):
            grads = _pull_operations(ctx.rule, ctx.options, tensors, dy, dlast_state)
        else:
            grads = _Pull.apply(ctx.rule, ctx.options, dy, dlast_state, saved, *tensors)
        return None, None, *_spread(wanted, grads, len(tensors))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _each(_Run, info.batch_size, in_dims, args)


class _Pull(Function):
    """The backward pass; the gradients of the tensors that can have one."""

    @staticmethod
    def forward(
        rule: Rule, options: Any, dy: Tensor, dlast_state: Tensor, saved: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        grads = rule.backward(dy, dlast_state, tensors, options, saved)
        return tuple(g for i in _differentiable(tensors) if (g := grads[i]) is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rule, ctx.options, dy, dlast_state, _, *tensors = inputs
        ctx.save_for_backward(dy, dlast_state, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        dy, dlast_state, *tensors = ctx.saved_tensors
        wanted = _differentiable(tensors)

        def pulled(dy: Tensor, dlast_state: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            return _pull_operations(
                ctx.rule, ctx.options, _spread(wanted, values, len(tensors), tensors), dy, dlast_state
            )

        pull: Any = torch.func.vjp(pulled, dy, dlast_state, *(tensors[i] for i in wanted))[1]
        ddy, ddlast_state, *grads = pull(cotangents)
        return None, None, ddy, ddlast_state, None, *_spread(wanted, grads, len(tensors))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _each(_Pull, info.batch_size, in_dims, args)


def _pull_operations(rule: Rule, options: Any, tensors: Tensors, dy: Tensor, dlast_state: Tensor) -> tuple[Tensor, ...]:
    """The gradients that `_Pull` gives, by torch operations."""
    wanted = _differentiable(tensors)

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return rule.operations(_spread(wanted, values, len(tensors), tensors), options)

    pull: Any = torch.func.vjp(run, *(tensors[i] for i in wanted))[1]
    return pull((dy, dlast_state), create_graph=True)  # else torch runs fused backwards that have no forward mode


def _differentiable(tensors: Tensors) -> list[int]:
    """Places of the tensors that can have a gradient."""
    return [i for i, t in enumerate(tensors) if t is not None and (t.is_floating_point() or t.is_complex())]


def _spread(
    places: list[int], values: Sequence[Tensor], n: int, others: Sequence[Tensor | None] | None = None
) -> list[Tensor | None]:
    """A list of n with the values at their places, and between them None or what stands there in `others`."""
    spread: list[Tensor | None] = [None] * n if others is None else list(others)
    for place, value in zip(places, values, strict=True):
        spread[place] = value
    return spread


def _each(
    function: type[Function], batch_size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The function of each entry along the mapped dimensions, and the results stacked."""

    def entry(i: int) -> list[Any]:
        return [
            a if dim is None or not isinstance(a, Tensor) else a.select(dim, i)
            for a, dim in zip(args, dims, strict=True)
        ]

    dims = [None if isinstance(dim, tuple) else dim for dim in in_dims]
    results = [function.apply(*entry(i)) for i in range(batch_size)]
    stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
