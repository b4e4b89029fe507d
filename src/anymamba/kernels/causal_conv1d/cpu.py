"""The causal depthwise convolution in C++ (csrc/conv.cpp): here tensors become pointers, and parts of sums sums."""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.kernels import native

NAME = "cpu"

STEPS = 64  # of a task
STEPS_BACKWARD = 512  # of a task, each of which writes its part of the weights' gradients


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (b, l, d) and the last width - 1 inputs of each sequence; shapes are those of `anymamba.ops.causal_conv1d`."""
    call = _Call(x, weight, bias, silu, initial_state, cu_seqlens, STEPS)
    y = native.empty(x)
    last_state = x.new_zeros(call.state_shape)
    if initial_state is not None:
        last_state.copy_(initial_state)  # what an empty sequence passes through
    if y.numel():
        call.rows(y=y)
        call.pointers(last_state=last_state)
        native.module().conv_forward(call.args)
    return y, last_state


def backward(
    dy: Tensor,
    dlast_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> list[Tensor | None]:
    """Gradients of x, weight, bias and initial_state (None where the input is absent)."""
    call = _Call(x, weight, bias, silu, initial_state, cu_seqlens, STEPS_BACKWARD)
    dx = native.empty(x)
    (d_inner, width), n_parts = weight.shape, x.shape[0] * -(-x.shape[1] // STEPS_BACKWARD)
    dweight = x.new_zeros((n_parts, width, d_inner), dtype=call.dtype)
    dbias = x.new_zeros((n_parts, d_inner), dtype=call.dtype)
    dlast_state = dlast_state.to(call.dtype).contiguous()
    dinitial = None if initial_state is None else dlast_state.clone()  # what an empty sequence passes through
    if x.numel():
        call.rows(dy=dy, dx=dx)
        call.pointers(dlast_state=dlast_state, dinitial_state=dinitial, dweight_parts=dweight, dbias_parts=dbias)
        native.module().conv_backward(call.args)
    return [
        dx,
        dweight.sum(0).T.to(weight.dtype).contiguous(),
        None if bias is None else dbias.sum(0).to(bias.dtype),
        None if dinitial is None or initial_state is None else dinitial.to(initial_state.dtype),
    ]


def step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """One token: y (b, d) and the new state (b, width - 1, d). Not for autograd."""
    y, last_state = forward(x[:, None], weight, bias, silu, state, None)
    return y[:, 0], last_state


class _Call(native.Call):
    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        silu: bool,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        steps: int,
    ) -> None:
        is_double = torch.float64 in (x.dtype, weight.dtype)
        super().__init__(native.module().ConvArgs(), torch.float64 if is_double else torch.float32)
        args = self.args
        (args.batch, args.length, args.d_inner), args.width = x.shape, weight.shape[1]
        args.chunk, args.silu = steps, silu
        n_sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        self.state_shape = (n_sequences, weight.shape[1] - 1, x.shape[2])
        self.rows(x=x)
        self.vectors(weight=weight.T, bias=bias)
        if initial_state is not None:
            self.pointers(initial_state=initial_state.to(x.dtype).contiguous())
        self.borders(cu_seqlens)
