"""Derivatives in any mode and of any order, for code whose fast form torch differentiates only once and in reverse.

Functions of autograd, checkpoints and fused attention keep little for the backward pass. Beside each stands the same
function in plain torch operations, which torch differentiates as often as it likes, forwards and backwards, and through
which `torch.func` and the tracers see. What is here says which of the two runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anymamba.ops.observers import differentiable, transformed


def as_operations(*tensors: Tensor) -> bool:
    """Whether plain torch operations are to run: in a transform of `torch.func`, in forward mode, in `jit.trace`."""
    return transformed(*tensors) or torch.jit.is_tracing()


def in_operations(*tensors: Tensor) -> bool:
    """Whether a backward pass is to be made of plain torch operations: one with a derivative of its own is wanted."""
    return torch.is_grad_enabled() or transformed(*tensors)


def recomputed(fn: Callable[..., Any], *args: Any) -> Any:
    """fn(*args), whose inner results are computed again for its gradient instead of kept.

    Args:
        fn: a function; every tensor that it reads is among args.
        args: tensors, tuples of tensors, and others.
    """
    tensors = [t for arg in args for t in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(t, Tensor)]
    if not torch.is_grad_enabled() or as_operations(*tensors):
        return fn(*args)
    return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)


def differentiable_again(y: Tensor, operations: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """y = operations(*inputs), computed by something that has no second derivative: y with one.

    The first derivative stays that of what computed y. Where the backward pass is itself differentiated, it is that of
    `operations`.
    """
    if not differentiable(*inputs) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return y
    return _Again.apply(operations, y, *inputs)


class _Again(torch.autograd.Function):
    """y as it is. The gradient goes to y, to whom it is left to find its inputs, or to the inputs by operations."""

    @staticmethod
    def forward(ctx: Any, operations: Callable[..., Tensor], y: Tensor, *inputs: Tensor) -> Tensor:
        ctx.operations = operations
        ctx.save_for_backward(*inputs)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if not in_operations(dy):
            return None, dy, *[None] * (len(ctx.needs_input_grad) - 2)
        pull = torch.func.vjp(ctx.operations, *ctx.saved_tensors)[1]
        return None, None, *pull(dy)
