"""The selective scan's op registered with torch: its shapes, its gradients and the ways to run it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.ops import dispatch, functions
from anymamba.ops.checks import require_offsets

OP = "selective_scan"


def run(arguments: ScanArguments, backend: str) -> tuple[Tensor, Tensor]:
    """Compute y and the last state with a backend."""
    if "forward" in dispatch.kernel(OP, backend).TRANSPARENT:
        return _operations(arguments, backend)
    return functions.run(RULES, arguments, backend)


def _operations(arguments: ScanArguments, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The same in differentiable torch operations, of a named backend or of the first that has them."""
    name = backend or dispatch.transparent(OP, "forward", arguments)
    y, last_state, _ = _forward(arguments, False, name)
    return y, last_state


def _forward(arguments: ScanArguments, save: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if not dispatch.clamps_offsets(OP, backend):
        require_offsets(arguments.cu_seqlens, arguments.length)
    dispatch.count(OP, backend, "forward")
    with dispatch.without_autocast(arguments.u.device.type):
        return dispatch.kernel(OP, backend).forward(arguments, save)


def _backward(
    dy: Tensor, dlast_state: Tensor | None, arguments: ScanArguments, saved: Tensor, backend: str
) -> list[Tensor | None]:
    dispatch.count(OP, backend, "backward")
    with dispatch.without_autocast(arguments.u.device.type):
        return dispatch.kernel(OP, backend).backward(dy, dlast_state, arguments, saved)


# ------------------------------------------------------------------------------------------ torch's op


@torch.library.custom_op("anymamba::selective_scan", mutates_args=())
def forward_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    b_discretization: str,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    return _forward(ScanArguments(*tensors, delta_softplus, b_discretization), save, backend)


@torch.library.custom_op("anymamba::selective_scan_backward", mutates_args=())
def backward_op(
    dy: Tensor,
    dlast_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    b_discretization: str,
    saved: Tensor,
    backend: str,
) -> list[Tensor]:
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    arguments = ScanArguments(*tensors, delta_softplus, b_discretization)
    return functions.filled(_backward(dy, dlast_state, arguments, saved, backend), dy)


@forward_op.register_fake
def _(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, save, backend = flat
    a = ScanArguments(*fields)
    return (
        torch.empty_like(a.u, memory_format=torch.contiguous_format),
        a.u.new_empty(a.n_sequences, a.d_inner, a.d_state, dtype=a.dtype),
        a.u.new_empty(dispatch.kernel(OP, backend).saved_shape(a) if save else (0,), dtype=a.dtype),
    )


@backward_op.register_fake
def _(dy: Tensor, dlast_state: Tensor, *flat: Any) -> list[Tensor]:
    *fields, _, _ = flat
    inputs = ScanArguments(*fields).tensors[:-1]
    return [
        dy.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs
    ]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *fields, ctx.save, ctx.backend = inputs
    arguments = ScanArguments(*fields)
    ctx.save_for_backward(*arguments.tensors, output[2])
    ctx.options = arguments.options


def _gradients(ctx: Any, dy: Tensor, dlast_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, saved = ctx.saved_tensors
    arguments = ScanArguments(*tensors, *ctx.options)
    if not ctx.save:  # the forward pass could not see that gradients would be needed
        saved = forward_op(*arguments, True, ctx.backend)[2]
    grads = backward_op(dy, dlast_state, *arguments, saved, ctx.backend)
    of_tensors = (None if t is None else g for t, g in zip(tensors[:-1], grads, strict=True))
    return *of_tensors, None, None, None, None, None


forward_op.register_autograd(_gradients, setup_context=_save_for_backward)

RULES = functions.Op(
    record=ScanArguments,
    forward=_forward,
    registered_forward=lambda arguments, save, backend: forward_op(*arguments, save, backend),
    backward=_backward,
    registered_backward=lambda dy, dlast_state, arguments, saved, backend: backward_op(
        dy, dlast_state, *arguments, saved, backend
    ),
    operations=_operations,
)
