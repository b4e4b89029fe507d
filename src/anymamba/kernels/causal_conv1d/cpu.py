"""The causal depthwise convolution in C++ (csrc/conv.cpp). This module passes pointers and adds up partial sums."""

from __future__ import annotations

from torch import Tensor

from anymamba.kernels.causal_conv1d.arguments import ConvArguments
from anymamba.runtimes import native

NAME = "cpu"
TRANSPARENT: frozenset[str] = frozenset()

STEPS = 64  # per task
STEPS_BACKWARD = 512  # per task; each task writes a partial sum of the weights' gradients


def unavailable(device_type: str) -> str | None:
    return native.unavailable(device_type)


def refuses(arguments: ConvArguments) -> str | None:
    return None


def description() -> str:
    return f"compiled C++: {native.description()}"


def forward(a: ConvArguments) -> tuple[Tensor, Tensor]:
    """y (b, l, d) and the last width - 1 inputs of each sequence."""
    call = _Call(a, STEPS)
    y = native.empty(a.x)
    last_state = _last_state(a)
    if y.numel():
        call.rows(y=y)
        call.pointers(last_state=last_state)
        native.module().conv_forward(call.args)
    return y, last_state


def _last_state(a: ConvArguments) -> Tensor:
    """The tensor for the last states. It holds the initial states if a sequence may be empty and so keep its state."""
    if a.cu_seqlens is None and a.x.numel():
        return native.empty(a.x, *a.state_shape)
    states = a.x.new_zeros(a.state_shape)
    return states if a.initial_state is None else states.copy_(a.initial_state)


def backward(dy: Tensor, dlast_state: Tensor | None, a: ConvArguments) -> list[Tensor | None]:
    """Gradients of x, weight, bias and initial_state (None for an input that is not given)."""
    call = _Call(a, STEPS_BACKWARD)
    dx = native.empty(a.x)
    (d_inner, width), n_parts = a.weight.shape, a.x.shape[0] * -(-a.x.shape[1] // STEPS_BACKWARD)
    dweight = a.x.new_zeros((n_parts, width, d_inner), dtype=a.dtype)
    dbias = a.x.new_zeros((n_parts, d_inner), dtype=a.dtype)
    dlast_state = a.state_gradient(dlast_state).to(a.dtype).contiguous()
    dinitial = None if a.initial_state is None else dlast_state.clone()  # as an empty sequence needs it
    if a.x.numel():
        call.rows(dy=dy, dx=dx)
        call.pointers(dlast_state=dlast_state, dinitial_state=dinitial, dweight_parts=dweight, dbias_parts=dbias)
        native.module().conv_backward(call.args)
    return [
        dx,
        dweight.sum(0).T.to(a.weight.dtype).contiguous(),
        None if a.bias is None else dbias.sum(0).to(a.bias.dtype),
        None if dinitial is None or a.initial_state is None else dinitial.to(a.initial_state.dtype),
    ]


def step(a: ConvArguments) -> tuple[Tensor, Tensor]:
    """One token: y (b, 1, d) and the new state (b, width - 1, d). Not for autograd."""
    return forward(a)


class _Call(native.Call):
    def __init__(self, a: ConvArguments, steps: int) -> None:
        super().__init__(native.module().ConvArgs(), a.dtype)
        args = self.args
        (args.batch, args.length, args.d_inner), args.width = a.x.shape, a.weight.shape[1]
        args.chunk, args.silu = steps, a.silu
        self.rows(x=a.x)
        self.vectors(weight=a.weight.T, bias=a.bias)
        if a.initial_state is not None:
            self.pointers(initial_state=a.initial_state.to(a.x.dtype).contiguous())
        self.offsets(a.cu_seqlens)
