"""Products with a gate, y = x f(g): the gates of MLPs and of Hyena.

On NVIDIA GPUs a kernel reads and writes each number once, in either pass; elsewhere, and for derivatives of higher
order, torch's operations compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from anymamba.kernels.gated import cuda
from anymamba.parts.derivatives import as_operations, in_kernels, in_operations

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda g: g,
    "silu": F.silu,
    "gelu": partial(F.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}
"""What a gate goes through, by name; gelu in its tanh form."""


def gated(
    x: Float[Tensor, "... width"], g: Float[Tensor, "... width"], function: str = "identity"
) -> Float[Tensor, "... width"]:
    """x f(g), for f one of FUNCTIONS; differentiable in any mode and of any order."""
    if as_operations(x, g) or not _in_kernel(x, g):
        return _operations(x, g, function)
    return _Gated.apply(x, g, function)


def gated_halves(both: Float[Tensor, "... two_widths"], function: str) -> Float[Tensor, "... width"]:
    """`gated` of the first half of the channels by the second half. The gradient is one tensor from the start.

    Raises ValueError for an odd number of channels.
    """
    if both.shape[-1] % 2:
        raise ValueError(
            f"halves need an even number of channels, got {both.shape[-1]}; call `gated` with both tensors"
        )
    x, g = both.chunk(2, dim=-1)
    if as_operations(both) or not _in_kernel(x, g):
        return _operations(x, g, function)
    return _GatedHalves.apply(both, function)


def _in_kernel(*tensors: Tensor) -> bool:
    """Whether one kernel takes x and g, and dy with them."""
    x, g, *dy = tensors
    return in_kernels(*tensors) and cuda.serves(x, g) and all(t.dtype == x.dtype for t in dy)


def _operations(x: Tensor, g: Tensor, function: str) -> Tensor:
    return x * FUNCTIONS[function](g)


def _gradients_in_operations(dy: Tensor, x: Tensor, g: Tensor, function: str) -> tuple[Tensor, Tensor]:
    return torch.func.vjp(lambda x, g: _operations(x, g, function), x, g)[1](dy)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, function: str) -> Tensor:
        ctx.save_for_backward(x, g)
        ctx.function = function
        return cuda.multiply(x, g, function)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, g = ctx.saved_tensors
        kernel = not in_operations(dy, x, g) and _in_kernel(x, g, dy)
        return *(cuda.gradients if kernel else _gradients_in_operations)(dy, x, g, ctx.function), None


class _GatedHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, function: str) -> Tensor:
        ctx.save_for_backward(both)
        ctx.function = function
        x, g = both.chunk(2, -1)
        return cuda.multiply(x, g, function)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (both,) = ctx.saved_tensors
        x, g = both.chunk(2, -1)
        if in_operations(dy, both) or not _in_kernel(x, g, dy):
            return torch.cat(_gradients_in_operations(dy, x, g, ctx.function), -1), None
        return cuda.gradient_of_halves(dy, both, ctx.function), None
