"""The causal depthwise convolution in plain PyTorch: shifted multiply-adds over a sequence with its state in front.

Notation: b batch, l length, d channels, k taps. Packed sequences are laid out with k - 1 rows of state before each
one, so that one pass over the padded stream serves them all; the rows between are computed and dropped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.kernels.elementwise import sigmoid

NAME = "portable"


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (b, l, d) and the last width - 1 inputs of each sequence; shapes are those of `anymamba.ops.causal_conv1d`."""
    layout = _Layout(x, weight.shape[1], cu_seqlens)
    padded = layout.pad(x, initial_state)
    y = _taps(padded, weight, bias)
    if silu:
        y = y.mul_(sigmoid(y))
    return layout.tokens_of_outputs(y).to(x.dtype).contiguous(), layout.last_state(padded)


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
    layout = _Layout(x, weight.shape[1], cu_seqlens)
    padded = layout.pad(x, initial_state)
    dtype = _working_dtype(x, weight)
    dy = dy.to(dtype)
    if silu:  # at the tokens only: what lies between packed sequences must not reach their gradients, not even a NaN
        y = layout.tokens_of_outputs(_taps(padded, weight, bias))
        gate = sigmoid(y)
        dy = (1 - gate).mul_(y).add_(1).mul_(gate).mul_(dy)
    dtaps = layout.outputs_of_tokens(dy)
    n_outputs, taps = dtaps.shape[1], weight.to(dtype).T
    dpadded = torch.zeros(padded.shape, dtype=dtype, device=x.device)
    dweight = torch.empty(taps.shape, dtype=dtype, device=x.device)
    for i in range(weight.shape[1]):
        dpadded[:, i : i + n_outputs].addcmul_(dtaps, taps[i])
        dweight[i] = (dtaps * padded[:, i : i + n_outputs].to(dtype)).sum((0, 1))
    layout.add_last_state_(dpadded, dlast_state.to(dtype))
    dx, dinitial = layout.unpad(dpadded)
    return [
        dx.to(x.dtype),
        dweight.T.to(weight.dtype).contiguous(),
        None if bias is None else dtaps.sum((0, 1)).to(bias.dtype),
        None if initial_state is None else dinitial.to(initial_state.dtype),
    ]


def step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """One token: y (b, d) and the new state (b, width - 1, d). Plain operations, for export."""
    dtype = _working_dtype(x, weight)
    window = torch.cat([state.to(x.dtype), x[:, None]], 1)
    y = (window.to(dtype) * weight.to(dtype).T).sum(1)
    if bias is not None:
        y = y + bias.to(dtype)
    if silu:
        y = F.silu(y)
    return y.to(x.dtype), window[:, 1:]


def _working_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, torch.promote_types(x.dtype, weight.dtype))


def _taps(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """sum over taps of weight * shifted input, plus bias: (b, l', d) from (b, l' + k - 1, d)."""
    dtype = _working_dtype(padded, weight)
    padded, taps = padded.to(dtype), weight.to(dtype).T.contiguous()
    n_outputs = padded.shape[1] - len(taps) + 1
    y = padded[:, :n_outputs] * taps[0]
    for i in range(1, len(taps)):
        y.addcmul_(padded[:, i : i + n_outputs], taps[i])
    return y if bias is None else y.add_(bias.to(dtype))


class _Layout:
    """Where the tokens and the states of each sequence lie in the padded stream."""

    def __init__(self, x: Tensor, width: int, cu_seqlens: Tensor | None) -> None:
        self.batch, self.length, self.d_inner = x.shape
        self.n_states = width - 1
        self.packed = cu_seqlens is not None
        if cu_seqlens is not None:
            borders = cu_seqlens.long()
            n_sequences = borders.numel() - 1
            lengths = borders[1:] - borders[:-1]
            sequence = torch.arange(n_sequences, device=x.device)
            owner = torch.repeat_interleave(sequence, lengths, output_size=self.length)
            self.tokens = torch.arange(self.length, device=x.device) + (owner + 1) * self.n_states
            rows = torch.arange(self.n_states, device=x.device)
            before = borders[:-1] + sequence * self.n_states  # where the state of a sequence begins
            self.first = (before[:, None] + rows).flatten()
            self.last = ((before + lengths)[:, None] + rows).flatten()
            self.n_sequences, self.n_rows = n_sequences, self.length + n_sequences * self.n_states

    def pad(self, x: Tensor, initial_state: Tensor | None) -> Tensor:
        """The stream (b, rows, d) in the dtype of x."""
        if not self.packed:
            if initial_state is None:
                return F.pad(x, (0, 0, self.n_states, 0))
            return torch.cat([initial_state.to(x.dtype), x], 1)
        padded = x.new_zeros(1, self.n_rows, self.d_inner)
        padded[0].index_copy_(0, self.tokens, x[0])
        if initial_state is not None:
            padded[0].index_copy_(0, self.first, initial_state.to(x.dtype).flatten(0, 1))
        return padded

    def tokens_of_outputs(self, y: Tensor) -> Tensor:
        return y.index_select(1, self.tokens - self.n_states) if self.packed else y

    def outputs_of_tokens(self, dy: Tensor) -> Tensor:
        if not self.packed:
            return dy
        n_outputs = max(0, self.n_rows - self.n_states)
        return dy.new_zeros(1, n_outputs, self.d_inner).index_copy_(1, self.tokens - self.n_states, dy)

    def last_state(self, padded: Tensor) -> Tensor:
        if not self.packed:
            return padded[:, self.length :].clone()
        return padded[0].index_select(0, self.last).view(self.n_sequences, self.n_states, self.d_inner)

    def add_last_state_(self, dpadded: Tensor, dlast_state: Tensor) -> None:
        if self.packed:
            dpadded[0].index_add_(0, self.last, dlast_state.flatten(0, 1))
        else:
            dpadded[:, self.length :] += dlast_state

    def unpad(self, dpadded: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the tokens and of the initial states."""
        if not self.packed:
            return dpadded[:, self.n_states :].clone(), dpadded[:, : self.n_states].clone()
        states = dpadded[0].index_select(0, self.first).view(self.n_sequences, self.n_states, self.d_inner)
        return dpadded.index_select(1, self.tokens), states
