"""Check the arguments of a causal convolution, and bring them into the form that backends take."""

from __future__ import annotations

from anymamba.kernels.causal_conv1d.arguments import ConvArguments
from anymamba.ops.checks import n_sequences, require_floating, require_same_device, require_shape, without_lazy


def checked(a: ConvArguments, activation: str | None) -> ConvArguments:
    """Check the arguments, set their activation, and resolve lazy tensors.

    Raises ValueError for wrong shapes, sizes, names and devices, TypeError for wrong dtypes.
    """
    x, weight, bias, initial_state, cu_seqlens, _ = a
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
    named = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state}
    for name, tensor in named.items():
        if tensor is not None:
            require_floating(name, tensor)
    require_same_device("causal_conv1d", named)
    return without_lazy(ConvArguments(x, weight, bias, initial_state, cu_seqlens, activation == "silu"))


def checked_step(a: ConvArguments, activation: str | None) -> ConvArguments:
    """Check the arguments of one token, x (batch, d_inner), and return them as a sequence of length one."""
    if a.x.ndim != 2:
        raise ValueError(f"x must be (batch, d_inner), got {tuple(a.x.shape)}")
    return checked(ConvArguments(a.x[:, None], *a[1:]), activation)
