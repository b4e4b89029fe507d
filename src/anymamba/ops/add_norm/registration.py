"""The op of the norm of a sum registered with torch: its shapes, its gradients and the ways to run it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anymamba.kernels.add_norm.arguments import NormArguments
from anymamba.ops import dispatch, functions
from anymamba.ops.checks import without_lazy

OP = "add_norm"


def run(arguments: NormArguments, backend: str) -> tuple[Tensor, Tensor]:
    """Compute y and x + residual with a backend. Without a residual the second result is undefined.

    Compilers and exporters on a CPU see torch's own operations, which they fuse and every runtime has.
    """
    if backend == "cpu" and (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        backend = dispatch.transparent(OP, "forward", arguments)
    if "forward" in dispatch.kernel(OP, backend).TRANSPARENT:
        y, total, _ = _forward(arguments, False, backend)
        return y, total
    return functions.run(RULES, without_lazy(arguments), backend)


def _operations(arguments: NormArguments) -> tuple[Tensor, Tensor]:
    """The same in differentiable torch operations, of the first backend that has them. Without a residual the second
    result is empty."""
    with dispatch.without_autocast(arguments.x.device.type):
        y, total, _ = _forward(arguments, False, dispatch.transparent(OP, "forward", arguments))
    return y, total if arguments.residual is not None else total.flatten()[:0]


def _forward(arguments: NormArguments, save: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    dispatch.count(OP, backend, "forward")
    return dispatch.kernel(OP, backend).forward(arguments, save)


def _backward(
    dy: Tensor, dtotal: Tensor | None, arguments: NormArguments, saved: Tensor, backend: str
) -> list[Tensor | None]:
    dispatch.count(OP, backend, "backward")
    return dispatch.kernel(OP, backend).backward(dy, dtotal, arguments, saved)


# ------------------------------------------------------------------------------------------ torch's op


@torch.library.custom_op("anymamba::add_norm", mutates_args=())
def forward_op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    subtract_mean: bool,
    dtype: torch.dtype | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(NormArguments(x, residual, weight, bias, eps, subtract_mean, dtype), save, backend)


@torch.library.custom_op("anymamba::add_norm_backward", mutates_args=())
def backward_op(
    dy: Tensor,
    dtotal: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    subtract_mean: bool,
    dtype: torch.dtype | None,
    saved: Tensor,
    backend: str,
) -> list[Tensor]:
    arguments = NormArguments(x, residual, weight, bias, eps, subtract_mean, dtype)
    return functions.filled(_backward(dy, dtotal, arguments, saved, backend), dy)


@forward_op.register_fake
def _(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, save, backend = flat
    a = NormArguments(*fields)
    return (
        a.x.new_empty(a.x.shape, dtype=a.y_dtype),
        a.x.new_empty((0,) if a.residual is None else a.x.shape, dtype=a.total_dtype),
        a.x.new_empty(dispatch.kernel(OP, backend).saved_shape(a) if save else (0,), dtype=a.dtype),
    )


@backward_op.register_fake
def _(dy: Tensor, dtotal: Tensor, *flat: Any) -> list[Tensor]:
    *fields, _, _ = flat
    inputs = NormArguments(*fields).tensors
    return [dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *fields, ctx.save, ctx.backend = inputs
    arguments = NormArguments(*fields)
    ctx.save_for_backward(*arguments.tensors, output[2])
    ctx.options = arguments.options


def _gradients(ctx: Any, dy: Tensor, dtotal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, saved = ctx.saved_tensors
    arguments = NormArguments(*tensors, *ctx.options)
    if not ctx.save:  # the forward pass could not see that gradients would be needed
        saved = forward_op(*arguments, True, ctx.backend)[2]
    grads = backward_op(dy, dtotal, *arguments, saved, ctx.backend)
    of_tensors = (None if t is None else g for t, g in zip(tensors, grads, strict=True))
    return *of_tensors, None, None, None, None, None


forward_op.register_autograd(_gradients, setup_context=_save_for_backward)


def _kept(tensors: functions.Tensors, y: Tensor, total: Tensor) -> functions.Tensors:
    """0 + total in place of x + residual: it has the same norm and gradients, and the next norm keeps it as well."""
    x, residual, *rest = tensors
    if x is None or residual is None:
        return tensors
    return [x.new_zeros(x.shape[-1]).expand(x.shape), total, *rest]


RULES = functions.Op(
    record=NormArguments,
    forward=_forward,
    registered_forward=lambda arguments, save, backend: forward_op(*arguments, save, backend),
    backward=_backward,
    registered_backward=lambda dy, dtotal, arguments, saved, backend: backward_op(
        dy, dtotal, *arguments, saved, backend
    ),
    operations=_operations,
    kept=_kept,
)
