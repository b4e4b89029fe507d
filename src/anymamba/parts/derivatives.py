"""Choose between fast code, which torch can differentiate once in reverse mode, and plain torch operations.

Autograd functions, checkpointing and fused attention save memory in the backward pass. Each has a second form in plain
torch operations, which torch can differentiate in any mode and any number of times, and which `torch.func` and tracers
can follow. The functions here decide which form runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anymamba.ops.dispatch import insisted
from anymamba.ops.observers import differentiable, plain, transformed
from anymamba.ops.recomputing import as_operations as as_operations
from anymamba.ops.recomputing import recomputed as recomputed


def in_operations(*tensors: Tensor) -> bool:
    """Whether a backward pass must use plain torch operations, because it may be differentiated itself."""
    return torch.is_grad_enabled() or transformed(*tensors)


def in_kernels(*tensors: Tensor) -> bool:
    """Whether the CUDA kernels of a layer may read these tensors: no tracer, transform or mode would miss what they
    write, and `backend` does not ask for plain operations."""
    return insisted() in (None, "cuda") and plain(*tensors)


def differentiable_again(y: Tensor, operations: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Give y = operations(*inputs) a second derivative when the code that computed y has none.

    The first derivative still comes from the code that computed y. If the backward pass is itself differentiated, the
    gradient comes from `operations` instead.
    """
    if not differentiable(*inputs) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return y
    return _Again.apply(operations, y, *inputs)


class _Again(torch.autograd.Function):
    """Return y unchanged. The gradient goes to y and its own graph, or to the inputs through `operations`."""

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
