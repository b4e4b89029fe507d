"""The causal convolution's op registered with torch: its shapes, its gradients and the ways to run it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anymamba.kernels.causal_conv1d.arguments import ConvArguments
from anymamba.ops import dispatch, functions
from anymamba.ops.checks import require_offsets

OP = "causal_conv1d"


def run(arguments: ConvArguments, backend: str) -> tuple[Tensor, Tensor]:
    """Compute y and the last state with a backend."""
    if "forward" in dispatch.kernel(OP, backend).TRANSPARENT:
        return _operations(arguments, backend)
    return functions.run(RULES, arguments, backend)


def _operations(arguments: ConvArguments, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The same in differentiable torch operations, of a named backend or of the first that has them."""
    return _forward(arguments, backend or dispatch.transparent(OP, "forward", arguments))


def _forward(arguments: ConvArguments, backend: str) -> tuple[Tensor, Tensor]:
    if not dispatch.clamps_offsets(OP, backend):
        require_offsets(arguments.cu_seqlens, arguments.x.shape[1])
    dispatch.count(OP, backend, "forward")
    return dispatch.kernel(OP, backend).forward(arguments)


def _backward(dy: Tensor, dlast_state: Tensor | None, arguments: ConvArguments, backend: str) -> list[Tensor | None]:
    dispatch.count(OP, backend, "backward")
    return dispatch.kernel(OP, backend).backward(dy, dlast_state, arguments)


# ------------------------------------------------------------------------------------------ torch's op


@torch.library.custom_op("anymamba::causal_conv1d", mutates_args=())
def forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _forward(ConvArguments(x, weight, bias, initial_state, cu_seqlens, silu), backend)


@torch.library.custom_op("anymamba::causal_conv1d_backward", mutates_args=())
def backward_op(
    dy: Tensor,
    dlast_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    backend: str,
) -> list[Tensor]:
    arguments = ConvArguments(x, weight, bias, initial_state, cu_seqlens, silu)
    return functions.filled(_backward(dy, dlast_state, arguments, backend), dy)


@forward_op.register_fake
def _(*flat: Any) -> tuple[Tensor, Tensor]:
    *fields, _ = flat
    a = ConvArguments(*fields)
    return torch.empty_like(a.x, memory_format=torch.contiguous_format), a.x.new_empty(a.state_shape)


@backward_op.register_fake
def _(dy: Tensor, dlast_state: Tensor, *flat: Any) -> list[Tensor]:
    *fields, _ = flat
    inputs = ConvArguments(*fields).tensors[:-1]
    return [
        dy.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs
    ]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *fields, ctx.backend = inputs
    arguments = ConvArguments(*fields)
    ctx.save_for_backward(*arguments.tensors)
    ctx.options = arguments.options


def _gradients(ctx: Any, dy: Tensor, dlast_state: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = backward_op(dy, dlast_state, *tensors, *ctx.options, ctx.backend)
    of_tensors = (None if t is None else g for t, g in zip(tensors[:-1], grads, strict=True))
    return *of_tensors, None, None, None


forward_op.register_autograd(_gradients, setup_context=_save_for_backward)

RULES = functions.Op(
    record=ConvArguments,
    forward=lambda arguments, save, backend: (*_forward(arguments, backend), None),
    registered_forward=lambda arguments, save, backend: (*forward_op(*arguments, backend), None),
    backward=lambda dy, dlast_state, arguments, saved, backend: _backward(dy, dlast_state, arguments, backend),
    registered_backward=lambda dy, dlast_state, arguments, saved, backend: backward_op(
        dy, dlast_state, *arguments, backend
    ),
    operations=_operations,
)
