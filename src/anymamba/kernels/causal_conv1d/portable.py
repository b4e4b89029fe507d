"""The causal depthwise convolution in plain PyTorch: shifted multiply-adds over a sequence with its state before it.

Notation: b batch, l length, d channels, k taps. Packed sequences are laid out with k - 1 rows of state before each
one, so that one pass over the padded stream computes all of them. The outputs at the rows of state are dropped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.kernels.causal_conv1d.arguments import ConvArguments
from anymamba.kernels.elementwise import sigmoid

NAME = "portable"
TRANSPARENT = frozenset({"step"})


def unavailable(device_type: str) -> str | None:
    return None


def refuses(arguments: ConvArguments) -> str | None:
    return None


def description() -> str:
    return "plain PyTorch: a multiply-add for each tap"


def forward(a: ConvArguments) -> tuple[Tensor, Tensor]:
    """y (b, l, d) and the last width - 1 inputs of each sequence."""
    layout = _Layout(a)
    padded = layout.pad(a.x, a.initial_state)
    y = _taps(padded, a)
    if a.silu:
        y = y.mul_(sigmoid(y))
    return layout.tokens_of_outputs(y).to(a.x.dtype).contiguous(), layout.last_state(padded)


def backward(dy: Tensor, dlast_state: Tensor | None, a: ConvArguments) -> list[Tensor | None]:
    """Gradients of x, weight, bias and initial_state (None for an input that is not given)."""
    layout, dtype = _Layout(a), a.dtype
    padded = layout.pad(a.x, a.initial_state)
    dy = dy.to(dtype)
    if a.silu:  # only at the tokens: a value between packed sequences must not reach the gradients, not even a NaN
        y = layout.tokens_of_outputs(_taps(padded, a))
        gate = sigmoid(y)
        dy = (1 - gate).mul_(y).add_(1).mul_(gate).mul_(dy)
    dtaps = layout.outputs_of_tokens(dy)
    n_outputs, taps = dtaps.shape[1], a.weight.to(dtype).T
    dpadded = torch.zeros(padded.shape, dtype=dtype, device=a.x.device)
    dweight = torch.empty(taps.shape, dtype=dtype, device=a.x.device)
    for i in range(a.width):
        dpadded[:, i : i + n_outputs].addcmul_(dtaps, taps[i])
        dweight[i] = (dtaps * padded[:, i : i + n_outputs].to(dtype)).sum((0, 1))
    if dlast_state is not None:
        layout.add_last_state_(dpadded, dlast_state.to(dtype))
    dx, dinitial = layout.unpad(dpadded)
    return [
        dx.to(a.x.dtype),
        dweight.T.to(a.weight.dtype).contiguous(),
        None if a.bias is None else dtaps.sum((0, 1)).to(a.bias.dtype),
        None if a.initial_state is None else dinitial.to(a.initial_state.dtype),
    ]


def step(a: ConvArguments) -> tuple[Tensor, Tensor]:
    """One token: y (b, 1, d) and the new state (b, width - 1, d). Plain operations, for export."""
    assert a.initial_state is not None
    window = torch.cat([a.initial_state.to(a.x.dtype), a.x], 1)
    y = (window.to(a.dtype) * a.weight.to(a.dtype).T).sum(1, keepdim=True)
    if a.bias is not None:
        y = y + a.bias.to(a.dtype)
    if a.silu:
        y = F.silu(y)
    return y.to(a.x.dtype), window[:, 1:]


def _taps(padded: Tensor, a: ConvArguments) -> Tensor:
    """sum over taps of weight * shifted input, plus bias: (b, l', d) from (b, l' + k - 1, d)."""
    padded, taps = padded.to(a.dtype), a.weight.to(a.dtype).T.contiguous()
    n_outputs = padded.shape[1] - len(taps) + 1
    y = padded[:, :n_outputs] * taps[0]
    for i in range(1, len(taps)):
        y.addcmul_(padded[:, i : i + n_outputs], taps[i])
    return y if a.bias is None else y.add_(a.bias.to(a.dtype))


class _Layout:
    """The positions of each sequence's tokens and state in the padded stream."""

    def __init__(self, a: ConvArguments) -> None:
        self.batch, self.length, self.d_inner = a.x.shape
        self.n_states = a.width - 1
        self.packed = a.cu_seqlens is not None
        if a.cu_seqlens is not None:
            offsets = a.cu_seqlens.long()
            n_sequences = a.n_sequences
            lengths = offsets[1:] - offsets[:-1]
            sequence = torch.arange(n_sequences, device=a.x.device)
            owner = torch.repeat_interleave(sequence, lengths, output_size=self.length)
            self.tokens = torch.arange(self.length, device=a.x.device) + (owner + 1) * self.n_states
            rows = torch.arange(self.n_states, device=a.x.device)
            before = offsets[:-1] + sequence * self.n_states  # where the state of a sequence begins
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
