"""The functions of `causal_conv1d` 1.6 over `anymamba.ops.causal_conv1d`, with its layout (batch, dim, length).

Width and length are not limited, gradients flow through the states, and every device is served.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anymamba.ops.causal_conv1d import causal_conv1d, causal_conv1d_step


def causal_conv1d_fn(
    x: Float[Tensor, "batch dim length"],
    weight: Float[Tensor, "dim width"],
    bias: Float[Tensor, " dim"] | None = None,
    seq_idx: Int[Tensor, "batch length"] | None = None,
    initial_states: Float[Tensor, "batch dim width_minus_1"] | None = None,
    return_final_states: bool = False,
    final_states_out: Float[Tensor, "batch dim width_minus_1"] | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A causal depthwise convolution.

    Args:
        x: (batch, dim, length), any strides.
        weight, bias: (dim, width) and (dim,).
        seq_idx: (batch, length), which sequence each position belongs to; taps do not reach into another one. -1 is
            padding, where the output is 0. Not together with states.
        initial_states: (batch, dim, width - 1), the inputs before the first, oldest first.
        return_final_states: return the last width - 1 inputs, too.
        final_states_out: filled with them.
        activation: None, "silu" or "swish".
    Returns out, like x, or (out, final_states). Raises ValueError for shapes and names.
    Source: the interface of causal-conv1d 1.6.1.
    """
    silu = _activation(activation)
    _require_three(x)
    before = None if initial_states is None else initial_states.transpose(1, 2)
    if seq_idx is not None:
        if initial_states is not None or return_final_states:
            raise ValueError("seq_idx cannot go with initial_states or return_final_states; give one of them")
        return _separate(x, weight, bias, seq_idx, silu)
    y, last = causal_conv1d(x.transpose(1, 2), weight, bias, activation=silu, initial_state=before)
    out = y.transpose(1, 2)
    if final_states_out is not None:
        with torch.no_grad():
            final_states_out.copy_(last.transpose(1, 2))
    if not return_final_states:
        return out
    return out, last.transpose(1, 2) if final_states_out is None else final_states_out


def causal_conv1d_update(
    x: Tensor,
    conv_state: Float[Tensor, "batch dim state_length"],
    weight: Float[Tensor, "dim width"],
    bias: Float[Tensor, " dim"] | None = None,
    activation: str | None = None,
    cache_seqlens: Int[Tensor, " batch"] | None = None,
    conv_state_indices: Int[Tensor, " batch"] | None = None,
) -> Tensor:
    """The next inputs of a convolution whose state is changed in place.

    Args:
        x: (batch, dim), or (batch, dim, length) for several.
        conv_state: (batch or more, dim, state_length of at least width - 1), the newest input last; or a circular
            buffer whose next place is cache_seqlens % state_length.
        cache_seqlens: (batch,) inputs seen so far.
        conv_state_indices: (batch,) the row of conv_state for each row of x; negative is padding: its output is 0 and
            no state changes.
    Returns out, like x. Raises ValueError for shapes and names.
    Source: the interface of causal-conv1d 1.6.1.
    """
    silu = _activation(activation)
    if x.ndim == 2:
        inputs = x[..., None]
    else:
        _require_three(x)
        inputs = x
    width, state_length = weight.shape[1], conv_state.shape[-1]
    if state_length < width - 1:
        raise ValueError(f"conv_state must hold at least width - 1 = {width - 1} inputs, got {state_length}")
    valid, state = None, conv_state
    if conv_state_indices is not None:
        valid = conv_state_indices >= 0
        state = conv_state[conv_state_indices.clamp_min(0).long()]
    out, new = _advance(inputs, state, weight, bias, silu, cache_seqlens)
    if valid is None or conv_state_indices is None:
        conv_state.copy_(new)
    else:
        conv_state[conv_state_indices[valid].long()] = new[valid].to(conv_state.dtype)
        out = out.masked_fill(~valid[:, None, None], 0)
    return out[..., 0] if x.ndim == 2 else out


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d_fn` without seq_idx."""
    return causal_conv1d_fn(x, weight, bias, None, initial_states, return_final_states, final_states_out, activation)


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` without conv_state_indices."""
    return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens)


def _activation(name: str | None) -> str | None:
    if name not in (None, "silu", "swish"):
        raise ValueError(f'activation must be None, "silu" or "swish", got {name!r}')
    return None if name is None else "silu"


def _require_three(x: Tensor) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, dim, length), got {tuple(x.shape)}")


def _separate(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, silu: str | None) -> Tensor:
    """All rows as one, cut wherever the row or the sequence changes."""
    batch, dim, length = x.shape
    if seq_idx.shape != (batch, length):
        raise ValueError(f"seq_idx must be (batch, length) = {(batch, length)}, got {tuple(seq_idx.shape)}")
    cuts = torch.ones(batch, length, dtype=torch.bool, device=x.device)
    cuts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = cuts.flatten().nonzero().flatten()
    borders = torch.cat([starts, starts.new_tensor([batch * length])]).int()
    rows = x.transpose(1, 2).reshape(1, batch * length, dim)
    y = causal_conv1d(rows, weight, bias, activation=silu, cu_seqlens=borders).y if batch * length else rows
    y = y.view(batch, length, dim).masked_fill((seq_idx < 0)[..., None], 0)
    return y.transpose(1, 2)


def _advance(
    inputs: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: str | None,
    cache_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs (batch, dim, length) and the whole new state."""
    taps, state_length, length = weight.shape[1] - 1, state.shape[-1], inputs.shape[-1]
    if cache_seqlens is None:
        before = state[..., state_length - taps :]
        new = torch.cat([state, inputs.to(state.dtype)], dim=-1)[..., -state_length:] if state_length else state
    else:
        ages = torch.arange(-taps, length, device=inputs.device) + cache_seqlens.long()[:, None]
        places = ages.remainder(state_length)[:, None].expand(-1, inputs.shape[1], -1)
        before = state.gather(2, places[..., :taps])
        newest = places[..., taps:][..., -state_length:]
        new = state.scatter(2, newest, inputs[..., -state_length:].to(state.dtype))
    before = before.transpose(1, 2).to(inputs.dtype)
    if length == 1:
        y, _ = causal_conv1d_step(before, inputs[..., 0], weight, bias, activation=silu)
        return y[..., None], new
    y = causal_conv1d(inputs.transpose(1, 2), weight, bias, activation=silu, initial_state=before).y
    return y.transpose(1, 2), new
