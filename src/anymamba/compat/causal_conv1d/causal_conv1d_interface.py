"""The functions of `causal_conv1d` 1.7 with `anymamba.ops.causal_conv1d`, in the layout (batch, dim, length).

Width and length are not limited, gradients flow through the states, and the functions run on every device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from anymamba.ops import observers
from anymamba.ops.causal_conv1d import causal_conv1d, causal_conv1d_step


def causal_conv1d_fn(
    x: Float[Tensor, "batch dim length"],
    weight: Float[Tensor, "dim width"],
    bias: Float[Tensor, " dim"] | None = None,
    seq_idx: Int[Tensor, "batch length"] | str | None = None,
    initial_states: Float[Tensor, "batch dim width_minus_1"] | str | None = None,
    return_final_states: bool = False,
    final_states_out: Float[Tensor, "batch dim width_minus_1"] | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A causal depthwise convolution.

    The activation may also be the fourth positional argument, as in version 1.0, or the fifth, as in 1.1.

    Args:
        x: (batch, dim, length), any strides.
        weight, bias: (dim, width) and (dim,).
        seq_idx: (batch, length), the sequence that each position belongs to; an output depends only on inputs of its
            sequence. -1 is padding, where the output is 0. Cannot be combined with states.
        initial_states: (batch, dim, width - 1), the inputs before the first one, oldest first.
        return_final_states: also return the last width - 1 inputs.
        final_states_out: a tensor that they are copied into; it is returned unless they carry a derivative.
        activation: None, "silu" or "swish"; if transformers is imported, also any name of its activations, because its
            models pass them on.
    Returns out, like x, or (out, final_states); gradients flow through both. Raises ValueError for shapes and names.
    Source: the interface of causal-conv1d 1.7.0.
    """
    if isinstance(seq_idx, str):
        activation, seq_idx = _only_activation(seq_idx, activation), None
    if isinstance(initial_states, str):
        activation, initial_states = _only_activation(initial_states, activation), None
    silu, after = _activation(activation)
    _require_three(x)
    if seq_idx is not None:
        if initial_states is not None or return_final_states:
            raise ValueError(
                "seq_idx cannot be combined with initial_states or return_final_states; leave one of them out"
            )
        return _separate(x, weight, bias, seq_idx, silu, after)
    before = None if initial_states is None else initial_states.transpose(1, 2)
    y, last = causal_conv1d(x.transpose(1, 2), weight, bias, activation=silu, initial_state=before)
    out, last = after(y.transpose(1, 2)), last.transpose(1, 2)
    if final_states_out is not None:
        _write(final_states_out, last.detach())
        last = last if last.requires_grad or observers.transformed(last) else final_states_out
    return (out, last) if return_final_states else out


def causal_conv1d_update(
    x: Tensor,
    conv_state: Float[Tensor, "batch dim state_length"],
    weight: Float[Tensor, "dim width"],
    bias: Float[Tensor, " dim"] | None = None,
    activation: str | None = None,
    cache_seqlens: Int[Tensor, " batch"] | None = None,
    conv_state_indices: Int[Tensor, " batch"] | None = None,
) -> Tensor:
    """Run the next inputs of a convolution and update its state in place.

    Args:
        x: (batch, dim), or (batch, dim, length) for several inputs.
        conv_state: (batch or more, dim, state_length of at least width - 1), the newest input last. With cache_seqlens
            it is a circular buffer, and the next input goes to index cache_seqlens % state_length.
        cache_seqlens: (batch,) the number of inputs seen so far.
        conv_state_indices: (batch,) the row of conv_state for each row of x. A negative index is padding: the output is
            0 and no state changes.
        activation: as in `causal_conv1d_fn`.
    Returns out, like x; gradients flow through it and through the changed state.
    Raises ValueError for shapes and names.
    Source: the interface of causal-conv1d 1.7.0.
    """
    silu, after = _activation(activation)
    if x.ndim == 2:
        inputs = x[..., None]
    else:
        _require_three(x)
        inputs = x
    width, state_length = weight.shape[1], conv_state.shape[-1]
    if state_length < width - 1:
        raise ValueError(f"conv_state must hold at least width - 1 = {width - 1} inputs, got {state_length}")
    if conv_state_indices is None:  # autograd may save the state, so it is copied before it is changed
        state = conv_state.clone() if torch.is_grad_enabled() else conv_state
    else:
        state = conv_state[conv_state_indices.clamp_min(0).long()]
    out, new = _advance(inputs, state, weight, bias, silu, cache_seqlens)
    out = after(out)
    if conv_state_indices is None:
        _write(conv_state, new)
    else:
        _write_rows(conv_state, new, conv_state_indices)
        out = out.masked_fill((conv_state_indices < 0)[:, None, None], 0)
    return out[..., 0] if x.ndim == 2 else out


class CausalConv1dFn:
    """Has the name of the original's autograd function; `apply` is `causal_conv1d_fn`."""

    apply = staticmethod(causal_conv1d_fn)


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | str | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d_fn` with seq_idx last; the activation may also be the fourth argument, as in 1.0 and 1.1."""
    if isinstance(initial_states, str):
        activation, initial_states = _only_activation(initial_states, activation), None
    return causal_conv1d_fn(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation)


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


def _activation(name: str | None) -> tuple[str | None, Callable[[Tensor], Tensor]]:
    """The activation that the operator fuses, and a function to apply after the operator."""
    if name in (None, "silu", "swish"):
        return None if name is None else "silu", lambda out: out
    activations = sys.modules.get("transformers.activations")  # a model of transformers passes its hidden_act on
    if activations is None or name not in activations.ACT2FN:
        raise ValueError(f'activation must be None, "silu" or "swish", got {name!r}')
    return None, activations.ACT2FN[name]


def _only_activation(positional: str, named: str | None) -> str:
    """The activation that was passed at the position that it has in an older version."""
    if named is not None:
        raise TypeError(f"activation was given twice, as {positional!r} by position and as {named!r} by name")
    return positional


def _write(state: Tensor, new: Tensor, rows: Tensor | None = None) -> None:
    """Write new values into a state, or into some of its rows; in inference mode if the state was made in that mode."""
    if not torch.compiler.is_compiling() and state.is_inference() and not torch.is_inference_mode_enabled():
        with torch.inference_mode():
            return _write(state, new, rows)
    if rows is None:
        state.copy_(new)
    else:
        state.index_put_((rows,), new.to(state.dtype))


def _write_rows(state: Tensor, new: Tensor, indices: Tensor) -> None:
    """Write each new row into the row of the state that its index gives; a negative index writes nothing."""
    if observers.plain(state, new, indices):
        valid = indices >= 0
        return _write(state, new[valid], indices[valid].long())
    named = indices == torch.arange(len(state), device=state.device)[:, None]  # shapes must not depend on values
    found = named.any(dim=1)[:, None, None]
    return _write(state, torch.where(found, new[named.int().argmax(dim=1)].to(state.dtype), state))


def _require_three(x: Tensor) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, dim, length), got {tuple(x.shape)}")


def _separate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor,
    silu: str | None,
    after: Callable[[Tensor], Tensor],
) -> Tensor:
    """Run all rows as one packed row, with an offset wherever the row or the sequence changes."""
    batch, dim, length = x.shape
    if seq_idx.shape != (batch, length):
        raise ValueError(f"seq_idx must be (batch, length) = {(batch, length)}, got {tuple(seq_idx.shape)}")
    first = torch.ones_like(seq_idx[:, :1], dtype=torch.bool)
    offsets = _offsets(torch.cat([first, seq_idx[:, 1:] != seq_idx[:, :-1]], dim=1).flatten())
    rows = x.transpose(1, 2).reshape(1, batch * length, dim)
    y = causal_conv1d(rows, weight, bias, activation=silu, cu_seqlens=offsets).y if batch * length else rows
    y = after(y.view(batch, length, dim)).masked_fill((seq_idx < 0)[..., None], 0)
    return y.transpose(1, 2)


def _offsets(cuts: Tensor) -> Tensor:
    """The offsets of the cuts and the end; while tracing, shapes must be fixed, so the end is repeated."""
    end = cuts.numel()
    if observers.plain(cuts):
        starts = cuts.nonzero().flatten()
    else:
        starts = torch.where(cuts, torch.arange(end, device=cuts.device), end).sort().values
    return F.pad(starts, (0, 1), value=end).int()


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
