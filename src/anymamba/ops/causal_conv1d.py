"""The causal depthwise convolution: its contract, its checks, its registration with torch and its gradient."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anymamba.ops import dispatch, functions, observers
from anymamba.ops.checks import (
    n_sequences,
    require_borders,
    require_floating,
    require_same_device,
    require_shape,
    resolved,
)
from anymamba.ops.functions import Tensors

OP = "causal_conv1d"


class ConvOutput(NamedTuple):
    """What a convolution returns."""

    y: Float[Tensor, "batch length d_inner"]
    """Like x, in its dtype."""
    last_state: Float[Tensor, "n_sequences width_minus_1 d_inner"]
    """The last width - 1 inputs of each sequence, oldest first, in the dtype of x."""


def causal_conv1d(
    x: Float[Tensor, "batch length d_inner"],
    weight: Float[Tensor, "d_inner width"],
    bias: Float[Tensor, " d_inner"] | None = None,
    *,
    activation: str | None = None,
    initial_state: Float[Tensor, "n_sequences width_minus_1 d_inner"] | None = None,
    cu_seqlens: Int[Tensor, " n_sequences_plus_1"] | None = None,
    backend: str | None = None,
) -> ConvOutput:
    """Convolve each channel with its own filter over the present and the past.

        y[t] = act(bias + sum_i weight[i] x[t - width + 1 + i])

    Sums are in float32 or wider. What lies before the sequence is the initial state, or zero.

    Args:
        x: (batch, length, d_inner).
        weight: (d_inner, width), the last column is the present; any width of at least 1.
        bias: (d_inner,); absent means none.
        activation: None or "silu".
        initial_state: (n_sequences, width - 1, d_inner), oldest first; n_sequences is batch, or what cu_seqlens packs.
        cu_seqlens: int32 borders of sequences packed along the length of one row, as in `selective_scan`.
        backend: as in `selective_scan`.
    Returns y, like x, and last_state; gradients flow to every tensor, through both. Derivatives in forward mode, and
    second and higher ones, run as torch operations, those of backend "reference".
    Raises ValueError for shapes and names, TypeError for dtypes, RuntimeError when a named backend cannot serve.
    Source: the short convolution of the Mamba block (arXiv:2312.00752, section 3.4).
    """
    _check(x, weight, bias, activation, initial_state, cu_seqlens)
    name = dispatch.resolve(OP, x.device.type, backend)
    tensors = [resolved(t) for t in (x, weight, bias, initial_state)]
    return ConvOutput(*_run((*tensors, cu_seqlens), ConvOptions(activation == "silu", name)))


def causal_conv1d_step(
    state: Float[Tensor, "batch width_minus_1 d_inner"],
    x: Float[Tensor, "batch d_inner"],
    weight: Float[Tensor, "d_inner width"],
    bias: Float[Tensor, " d_inner"] | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv1d`: the state goes in and the new state comes out.

    Returns y (batch, d_inner) and the state (batch, width - 1, d_inner), both in the dtype of x. Plain torch
    operations under export.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be (batch, d_inner), got {tuple(x.shape)}")
    _check(x[:, None], weight, bias, activation, state, None)
    name = dispatch.resolve(OP, x.device.type, backend)
    name = dispatch.of_step(name, state, x, weight, bias)
    dispatch.count(OP, name, "step")
    y, last_state = dispatch.kernel(OP, name).step(state, x, weight, bias, activation == "silu")
    return y, last_state.contiguous()  # as it came: a compiled step guards on strides


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, length, d_inner), got {tuple(x.shape)}")
    batch, _, d_inner = x.shape
    require_shape("weight", weight, (d_inner, None), "(d_inner, width)")
    width = weight.shape[1]
    if width < 1:
        raise ValueError("weight must have a width of at least 1, got 0")
    if bias is not None:
        require_shape("bias", bias, (d_inner,), "(d_inner,)")
    if activation not in (None, "silu"):
        raise ValueError(f'activation must be None or "silu", got {activation!r}')
    rows = n_sequences(batch, cu_seqlens)
    if initial_state is not None:
        require_shape("initial_state", initial_state, (rows, width - 1, d_inner), "(n_sequences, width - 1, d_inner)")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("initial_state", initial_state)):
        if tensor is not None:
            require_floating(name, tensor)
    require_same_device(OP, x=x, weight=weight, bias=bias, initial_state=initial_state)


# ------------------------------------------------------------------------------------------ the ways to run


class ConvOptions(NamedTuple):
    """What a convolution takes besides tensors."""

    silu: bool
    backend: str


def _run(tensors: Tensors, options: ConvOptions) -> tuple[Tensor, Tensor]:
    """y and the last state of x, weight, bias, initial_state and cu_seqlens."""
    way = observers.way(*tensors)
    if way == "operations" or options.backend == "reference":
        return _operations(tensors, options)
    if way == "function":
        return functions.apply(RULE, options, *tensors)
    return _call(_forward if way == "kernel" else _forward_op, tensors, options)


def _operations(tensors: Tensors, options: ConvOptions) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, differentiable to any order and in any mode."""
    x, cu_seqlens = tensors[0], tensors[-1]
    assert x is not None
    require_borders(cu_seqlens, x.shape[1])
    dispatch.count(OP, "reference", "forward")
    return _call(dispatch.kernel(OP, "reference").forward, tensors, ConvOptions(options.silu, ""))


def _call(
    forward: Callable[..., tuple[Tensor, Tensor]], tensors: Tensors, options: ConvOptions
) -> tuple[Tensor, Tensor]:
    """A kernel, or with a backend `_forward` or the registered op, which list their arguments in another order."""
    x, weight, bias, initial_state, cu_seqlens = tensors
    backend = (options.backend,) if options.backend else ()
    return forward(x, weight, bias, options.silu, initial_state, cu_seqlens, *backend)


def _rule_forward(tensors: Tensors, options: ConvOptions) -> tuple[Tensor, Tensor, Tensor]:
    plain = observers.way(*tensors) == "kernel"
    y, last_state = _call(_forward if plain else _forward_op, tensors, options)
    return y, last_state, y.new_empty(0)


def _rule_backward(
    dy: Tensor, dlast_state: Tensor, tensors: Tensors, options: ConvOptions, saved: Tensor
) -> list[Tensor | None]:
    x, weight, bias, initial_state, cu_seqlens = tensors
    plain = observers.way(dy, dlast_state, *tensors) == "kernel"
    run: Callable[..., list[Tensor]] = _backward_kernel if plain else _backward_op
    grads = run(dy, dlast_state, x, weight, bias, options.silu, initial_state, cu_seqlens, options.backend)
    return [None if t is None else g for t, g in zip((x, weight, bias, initial_state), grads, strict=True)]


RULE = functions.Rule(_rule_forward, _rule_backward, _operations)


# ------------------------------------------------------------------------------------------ registration


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    require_borders(cu_seqlens, x.shape[1])
    dispatch.count(OP, backend, "forward")
    return dispatch.kernel(OP, backend).forward(x, weight, bias, silu, initial_state, cu_seqlens)


_forward_op = torch.library.custom_op("anymamba::causal_conv1d", _forward, mutates_args=())


@_forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, _, d_inner = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(n_sequences(batch, cu_seqlens), weight.shape[1] - 1, d_inner)


def _backward_kernel(
    dy: Tensor,
    dlast_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> list[Tensor]:
    dispatch.count(OP, backend, "backward")
    grads = dispatch.kernel(OP, backend).backward(dy, dlast_state, x, weight, bias, silu, initial_state, cu_seqlens)
    return [x.new_empty(0) if g is None else g for g in grads]


_backward_op = torch.library.custom_op("anymamba::causal_conv1d_backward", _backward_kernel, mutates_args=())


@_backward_op.register_fake
def _(
    dy: Tensor,
    dlast_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> list[Tensor]:
    inputs = (x, weight, bias, initial_state)
    return [x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, bias, silu, initial_state, cu_seqlens, backend = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
    ctx.options = (silu, backend)


def _backward(ctx, dy, dlast_state):
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    silu, backend = ctx.options
    grads = _backward_op(dy, dlast_state, x, weight, bias, silu, initial_state, cu_seqlens, backend)
    inputs = (x, weight, bias, initial_state)
    dx, dweight, dbias, dinitial = (None if t is None else g for t, g in zip(inputs, grads, strict=True))
    return dx, dweight, dbias, None, dinitial, None, None


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)
