"""The ways to run an op, and the autograd functions for one of them.

Values and first derivatives come from the op's backends, in eager code and under `grad` and `vmap` of `torch.func`.
Higher derivatives come from plain torch operations, which can be differentiated to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from anymamba.ops import observers

Tensors = Sequence[Tensor | None]
Outputs = tuple[Tensor, Tensor, Tensor | None]
"""y, the last state, and what forward saves for the backward pass, which may be None."""


class Op(NamedTuple):
    """The functions that run an op in each way. `arguments` is the op's record."""

    record: Callable[..., Any]
    """Builds the record from its fields: first all tensors, then the options."""
    forward: Callable[[Any, bool, str], Outputs]
    """Runs a kernel: (arguments, save, backend)."""
    registered_forward: Callable[[Any, bool, str], Outputs]
    """The same through the op registered with torch."""
    backward: Callable[[Tensor, Any, Any, Tensor, str], list[Tensor | None]]
    """Gradients of the record's tensors: (dy, dlast_state, arguments, saved, backend). Entries of tensors that are not
    given are undefined. dlast_state is None where it would be zeros."""
    registered_backward: Callable[[Tensor, Tensor, Any, Tensor, str], list[Tensor]]
    """The same through the op registered with torch, which cannot return None."""
    operations: Callable[[Any], tuple[Tensor, Tensor]]
    """y and the last state, computed by differentiable torch operations."""
    kept: Callable[[Tensors, Tensor, Tensor], Tensors] | None = None
    """Tensors with which the record has the same gradients, of less memory: (tensors, y, last_state). None keeps the
    record's own tensors for the backward pass."""


def run(op: Op, arguments: Any, backend: str) -> tuple[Tensor, Tensor]:
    """Compute y and the last state with a backend, in the way that `observers.way` chooses."""
    way = observers.way(*arguments.tensors)
    if way == "operations":
        return op.operations(arguments)
    if way == "function":
        y, last_state, _ = _Forward.apply(op, backend, arguments.options, *arguments.tensors)
    elif way == "kernel":
        y, last_state, _ = op.forward(arguments, False, backend)
    else:
        # A trace must not depend on whether gradients were enabled: its backward pass runs forward again.
        save = observers.differentiable(*arguments.tensors) and not torch.jit.is_tracing()
        y, last_state, _ = op.registered_forward(arguments, save, backend)
    return y, last_state


class Quick(Function):
    """An autograd function whose `apply` does not inspect the signature of `forward`: that takes as long as a kernel's
    launch."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        plain = observers.without_transforms(*args)
        return super().apply(*args) if plain is None else super(Function, cls).apply(*plain)  # type: ignore[misc]


class _Forward(Quick):
    @staticmethod
    def forward(op: Op, backend: str, options: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        forward = op.forward if observers.way(*tensors) == "kernel" else op.registered_forward
        y, last_state, saved = forward(op.record(*tensors, *options), True, backend)
        return y, last_state, y.new_empty(0) if saved is None else saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, ctx.backend, ctx.options, *tensors = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.shapes, ctx.dtypes = [t.shape for t in output[:2]], [t.dtype for t in output[:2]]
        kept = tensors if ctx.op.kept is None else ctx.op.kept(tensors, *output[:2])
        ctx.save_for_backward(*kept, output[2])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, saved = ctx.saved_tensors
        dy, dlast_state = cotangents[:2]
        is_plain = observers.way(dy, dlast_state, saved, *tensors) == "kernel"  # nothing differentiates this pass
        if dy is None:
            dy = tensors[0].new_zeros(ctx.shapes[0], dtype=ctx.dtypes[0])
        if dlast_state is None and not is_plain:
            dlast_state = tensors[0].new_zeros(ctx.shapes[1], dtype=ctx.dtypes[1])
        grads: Sequence[Any]
        if is_plain:
            record = ctx.op.record(*tensors, *ctx.options)
            found = ctx.op.backward(dy, dlast_state, record, saved, ctx.backend)
            grads = [found[i] for i in _differentiable(tensors)]
        elif observers.has_tangent(dy, dlast_state):
            assert dlast_state is not None
            grads = _pull_operations(ctx.op, ctx.options, tensors, dy, dlast_state)
        else:
            grads = _Backward.apply(ctx.op, ctx.backend, ctx.options, dy, dlast_state, saved, *tensors)
        return None, None, None, *_spread(_differentiable(tensors), grads, len(tensors))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _each(_Forward, info.batch_size, in_dims, args)


class _Backward(Quick):
    """The gradients of all tensors that can have one."""

    @staticmethod
    def forward(
        op: Op,
        backend: str,
        options: tuple[Any, ...],
        dy: Tensor,
        dlast_state: Tensor,
        saved: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        plain = observers.way(dy, dlast_state, saved, *tensors) == "kernel"
        backward = op.backward if plain else op.registered_backward
        grads: Sequence[Any] = backward(dy, dlast_state, op.record(*tensors, *options), saved, backend)
        return tuple(grads[i] for i in _differentiable(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, _, ctx.options, dy, dlast_state, _, *tensors = inputs
        ctx.save_for_backward(dy, dlast_state, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        dy, dlast_state, *tensors = ctx.saved_tensors
        wanted = _differentiable(tensors)

        def pulled(dy: Tensor, dlast_state: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            replaced = _spread(wanted, values, len(tensors), tensors)
            return _pull_operations(ctx.op, ctx.options, replaced, dy, dlast_state)

        pull: Any = torch.func.vjp(pulled, dy, dlast_state, *(tensors[i] for i in wanted))[1]
        ddy, ddlast_state, *grads = pull(cotangents)
        return None, None, None, ddy, ddlast_state, None, *_spread(wanted, grads, len(tensors))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _each(_Backward, info.batch_size, in_dims, args)


def _pull_operations(
    op: Op, options: tuple[Any, ...], tensors: Tensors, dy: Tensor, dlast_state: Tensor
) -> tuple[Tensor, ...]:
    """The gradients that `_Backward` returns, computed by torch operations."""
    wanted = _differentiable(tensors)

    def operations(*values: Tensor) -> tuple[Tensor, Tensor]:
        return op.operations(op.record(*_spread(wanted, values, len(tensors), tensors), *options))

    pull: Any = torch.func.vjp(operations, *(tensors[i] for i in wanted))[1]
    return pull((dy, dlast_state), create_graph=True)  # otherwise torch uses fused backwards without a forward mode


def filled(grads: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Gradients with an empty tensor in the place of None, as ops registered with torch return them."""
    return [like.new_empty(0) if g is None else g for g in grads]


def _differentiable(tensors: Tensors) -> list[int]:
    """Indices of the tensors that can have a gradient."""
    return [i for i, t in enumerate(tensors) if t is not None and (t.is_floating_point() or t.is_complex())]


def _spread(
    places: list[int], values: Sequence[Tensor], n: int, others: Sequence[Tensor | None] | None = None
) -> list[Tensor | None]:
    """A list of length n with the values at the given places; the other entries come from `others`, or are None."""
    spread: list[Tensor | None] = [None] * n if others is None else list(others)
    for place, value in zip(places, values, strict=True):
        spread[place] = value
    return spread


def _each(
    function: type[Function], batch_size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Apply the function to each entry of the mapped dimensions, and stack the results."""

    def entry(i: int) -> list[Any]:
        return [a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(args, in_dims, strict=True)]

    results = [function.apply(*entry(i)) for i in range(batch_size)]
    stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
