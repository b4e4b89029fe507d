"""The causal depthwise convolution by its definition, a sum over taps at each step: the oracle of every backend."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.kernels.causal_conv1d.arguments import ConvArguments

NAME = "reference"
TRANSPARENT = frozenset({"forward", "step"})


def unavailable(device_type: str) -> str | None:
    return None


def refuses(arguments: ConvArguments) -> str | None:
    return None


def description() -> str:
    return "a loop over time: slow, the oracle of the tests"


def forward(a: ConvArguments) -> tuple[Tensor, Tensor]:
    """y (b, l, d) and the last width - 1 inputs of each sequence."""
    if a.cu_seqlens is None:
        return _conv(a)
    pairs = itertools.pairwise(a.cu_seqlens.tolist())
    ys, states = zip(*(_conv(a.of_sequence(i, *pair)) for i, pair in enumerate(pairs)), strict=True)
    return torch.cat(ys, 1), torch.cat(states)


def backward(dy: Tensor, dlast_state: Tensor | None, a: ConvArguments) -> list[Tensor | None]:
    """Gradients of x, weight, bias and initial_state, by automatic differentiation of `forward`."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in a.tensors[:-1]]
    fields: Any = (*leaves, a.cu_seqlens, *a.options)
    with torch.enable_grad():
        y, last_state = forward(ConvArguments(*fields))
    pairs = [pair for pair in ((y, dy), (last_state, a.state_gradient(dlast_state))) if pair[0].requires_grad]
    outputs, cotangents = zip(*pairs, strict=True)
    present = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(outputs, present, cotangents, materialize_grads=True))
    return [None if t is None else next(grads) for t in leaves]


def step(a: ConvArguments) -> tuple[Tensor, Tensor]:
    """One token: y (b, 1, d) and the new state (b, width - 1, d)."""
    return _conv(a)


def _conv(a: ConvArguments) -> tuple[Tensor, Tensor]:
    before = a.x.new_zeros(a.state_shape) if a.initial_state is None else a.initial_state.to(a.x.dtype)
    padded, weight = torch.cat([before, a.x], 1), a.weight.to(a.dtype).T
    sums = [(padded[:, t : t + a.width].to(a.dtype) * weight).sum(1) for t in range(a.x.shape[1])]
    y = torch.stack(sums, 1) if sums else a.x.to(a.dtype) * weight.sum(0)  # empty, but connected to both
    y = y if a.bias is None else y + a.bias.to(a.dtype)
    return (F.silu(y) if a.silu else y).to(a.x.dtype), padded[:, a.x.shape[1] :]
