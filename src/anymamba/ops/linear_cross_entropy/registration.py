"""The op of the cross-entropy of a linear map registered with torch: shapes, gradients and the ways to run it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anymamba.kernels.linear_cross_entropy.arguments import LossArguments
from anymamba.ops import dispatch, functions
from anymamba.ops.linear_cross_entropy.chunks import sum_over_chunks

OP = "linear_cross_entropy"


def run(arguments: LossArguments, backend: str) -> Tensor:
    """Compute the loss with a backend. Plain torch operations process a chunk of tokens at a time."""
    if "forward" in dispatch.kernel(OP, backend).TRANSPARENT:

        def loss_of(x: Tensor, labels: Tensor) -> Tensor:
            return _forward(arguments._replace(x=x, labels=labels), False, backend)[0]

        return sum_over_chunks(loss_of, arguments.x, arguments.labels, arguments.weight.shape[0])
    x, weight = arguments.x, arguments.weight
    dtype = dispatch.autocast_dtype(x.device.type, x.dtype, weight.dtype)
    loss, _ = functions.run(RULES, arguments._replace(dtype=dtype), backend)
    return loss


def _operations(arguments: LossArguments) -> tuple[Tensor, Tensor]:
    """The same in differentiable torch operations, of the first backend that has them."""
    with dispatch.without_autocast(arguments.x.device.type):
        loss, _, _ = _forward(arguments, False, dispatch.transparent(OP, "forward", arguments))
    return loss, arguments.x.flatten()[:0]


def _forward(arguments: LossArguments, save: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    dispatch.count(OP, backend, "forward")
    return dispatch.kernel(OP, backend).forward(arguments, save)


def _kernel(arguments: LossArguments, save: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    with dispatch.without_autocast(arguments.x.device.type):
        return _forward(arguments, save, backend)


def _backward(
    dy: Tensor, nothing: Tensor | None, arguments: LossArguments, saved: Tensor, backend: str
) -> list[Tensor | None]:
    dispatch.count(OP, backend, "backward")
    with dispatch.without_autocast(arguments.x.device.type):
        return dispatch.kernel(OP, backend).backward(dy, nothing, arguments, saved)


# ------------------------------------------------------------------------------------------ torch's op


@torch.library.custom_op("anymamba::linear_cross_entropy", mutates_args=())
def forward_op(
    x: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype | None, save: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernel(LossArguments(x, weight, labels, dtype), save, backend)


@torch.library.custom_op("anymamba::linear_cross_entropy_backward", mutates_args=())
def backward_op(
    dy: Tensor,
    nothing: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    dtype: torch.dtype | None,
    saved: Tensor,
    backend: str,
) -> list[Tensor]:
    arguments = LossArguments(x, weight, labels, dtype)
    return functions.filled(_backward(dy, nothing, arguments, saved, backend), dy)


@forward_op.register_fake
def _(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, save, backend = flat
    a = LossArguments(*fields)
    shape = dispatch.kernel(OP, backend).saved_shape(a) if save else (0,)
    return tuple(a.x.new_empty(s, dtype=a.loss_dtype) for s in ((), (0,), shape))  # type: ignore[return-value]


@backward_op.register_fake
def _(dy: Tensor, nothing: Tensor, *flat: Any) -> list[Tensor]:
    *fields, _, _ = flat
    a = LossArguments(*fields)
    return [a.x.new_empty(a.x.shape), a.weight.new_empty(a.weight.shape), dy.new_empty(0)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *fields, ctx.save, ctx.backend = inputs
    arguments = LossArguments(*fields)
    ctx.save_for_backward(*arguments.tensors, output[2])
    ctx.options = arguments.options


def _gradients(ctx: Any, dy: Tensor, nothing: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, saved = ctx.saved_tensors
    arguments = LossArguments(*tensors, *ctx.options)
    if not ctx.save:  # the forward pass could not see that gradients would be needed
        saved = forward_op(*arguments, True, ctx.backend)[2]
    dx, dweight, _ = backward_op(dy, nothing, *arguments, saved, ctx.backend)
    return dx, dweight, None, None, None, None


forward_op.register_autograd(_gradients, setup_context=_save_for_backward)

RULES = functions.Op(
    record=LossArguments,
    forward=_kernel,
    registered_forward=lambda arguments, save, backend: forward_op(*arguments, save, backend),
    backward=_backward,
    registered_backward=lambda dy, nothing, arguments, saved, backend: backward_op(
        dy, nothing, *arguments, saved, backend
    ),
    operations=_operations,
)
