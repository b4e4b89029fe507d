"""What a causal convolution refuses, and the form in which backends get its arguments."""

from __future__ import annotations

from anymamba.kernels.causal_conv1d.arguments import ConvArguments
from anymamba.ops.checks import n_sequences, require_floating, require_same_device, require_shape, resolved


def checked(a: ConvArguments, activation: str | None) -> ConvArguments:
    """The arguments with their activation, nothing lazy.

    Raises ValueError for shapes, sizes, names and devices that do not fit, TypeError for dtypes.
    """
    if a.x.ndim != 3:
        raise ValueError(f"x must be (batch, length, d_inner), got {tuple(a.x.shape)}")
    batch, _, d_inner = a.x.shape
    require_shape("weight", a.weight, (d_inner, None), "(d_inner, width)")
    if a.width < 1:
        raise ValueError("weight must have a width of at least 1, got 0")
    if a.bias is not None:
        require_shape("bias", a.bias, (d_inner,), "(d_inner,)")
    if activation not in (None, "silu"):
        raise ValueError(f'activation must be None or "silu", got {activation!r}')
    shape = (n_sequences(batch, a.cu_seqlens), a.width - 1, d_inner)
    if a.initial_state is not None:
        require_shape("initial_state", a.initial_state, shape, "(n_sequences, width - 1, d_inner)")
    named = {"x": a.x, "weight": a.weight, "bias": a.bias, "initial_state": a.initial_state}
    for name, tensor in named.items():
        if tensor is not None:
            require_floating(name, tensor)
    require_same_device("causal_conv1d", **named)
    tensors = (resolved(t) for t in a.tensors)
    return ConvArguments(*tensors, activation == "silu")  # type: ignore[arg-type]


def checked_step(a: ConvArguments, activation: str | None) -> ConvArguments:
    """The arguments of one token, x (batch, d_inner), as a sequence of length one."""
    if a.x.ndim != 2:
        raise ValueError(f"x must be (batch, d_inner), got {tuple(a.x.shape)}")
    return checked(a._replace(x=a.x[:, None]), activation)
