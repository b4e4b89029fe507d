"""Forward, backward and update with the interface of the compiled module of `causal_conv1d`, without autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update


def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """Returns the output, and writes the last inputs to final_states_out."""
    activation = "silu" if silu_activation else None
    with torch.no_grad():
        out = causal_conv1d_fn(
            x, weight, bias, seq_idx, initial_states, final_states_out=final_states_out, activation=activation
        )
    assert isinstance(out, Tensor)
    return out


def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns dx (also written to `dx` if given), dweight and dbias in float32, and optionally dinitial_states."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, initial_states)]
    activation = "silu" if silu_activation else None
    with torch.enable_grad():
        result = causal_conv1d_fn(
            inputs[0],  # type: ignore[arg-type]
            inputs[1],  # type: ignore[arg-type]
            inputs[2],
            seq_idx,
            inputs[3],
            return_final_states=dfinal_states is not None,
            activation=activation,
        )
        outputs = list(result) if isinstance(result, tuple) else [result]
        wanted = [t for t in inputs if t is not None]
        grads = iter(torch.autograd.grad(outputs, wanted, [dout] if dfinal_states is None else [dout, dfinal_states]))
    found = [None if t is None else next(grads) for t in inputs]
    assert found[0] is not None and found[1] is not None
    grad = found[0] if dx is None else dx.copy_(found[0])
    dbias = None if found[2] is None else found[2].float()
    return grad, found[1].float(), dbias, found[3] if return_dinitial_states else None


def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """`causal_conv1d_update` with its arguments in the compiled module's order."""
    activation = "silu" if silu_activation else None
    with torch.no_grad():
        return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
