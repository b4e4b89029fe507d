"""The causal depthwise convolution by its definition, a sum over taps at each step: the oracle of every backend."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "reference"


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (b, l, d) and the last width - 1 inputs of each sequence; shapes are those of `anymamba.ops.causal_conv1d`."""
    if cu_seqlens is None:
        return _conv(x, weight, bias, silu, initial_state)
    borders = cu_seqlens.tolist()
    parts = [
        _conv(x[:, start:stop], weight, bias, silu, None if initial_state is None else initial_state[i : i + 1])
        for i, (start, stop) in enumerate(itertools.pairwise(borders))
    ]
    return torch.cat([y for y, _ in parts], 1), torch.cat([state for _, state in parts])


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
    """Gradients of x, weight, bias and initial_state, by automatic differentiation of `forward`."""
    inputs = [x, weight, bias, initial_state]
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        y, last_state = forward(leaves[0], leaves[1], leaves[2], silu, leaves[3], cu_seqlens)  # type: ignore[arg-type]
    pairs = [pair for pair in ((y, dy), (last_state, dlast_state)) if pair[0].requires_grad]
    outputs, cotangents = zip(*pairs, strict=True)
    present = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(outputs, present, cotangents, materialize_grads=True))
    return [None if t is None else next(grads) for t in leaves]


def step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """One token: y (b, d) and the new state (b, width - 1, d)."""
    y, state = _conv(x[:, None], weight, bias, silu, state)
    return y[:, 0], state


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, length, d_inner = x.shape
    width = weight.shape[1]
    dtype = torch.promote_types(torch.float32, torch.promote_types(x.dtype, weight.dtype))
    if initial_state is None:
        initial_state = x.new_zeros(batch, width - 1, d_inner)
    padded = torch.cat([initial_state.to(x.dtype), x], 1)
    outputs = []
    for t in range(length):
        y = (padded[:, t : t + width].to(dtype) * weight.to(dtype).T).sum(1)
        y = y if bias is None else y + bias.to(dtype)
        outputs.append(F.silu(y) if silu else y)
    y = torch.stack(outputs, 1) if outputs else x.new_zeros(batch, 0, d_inner)
    return y.to(x.dtype), padded[:, length:]
