"""The norm of a sum by its definition: the oracle of every backend."""

from __future__ import annotations

from torch import Tensor

from anymamba.kernels.add_norm.arguments import NormArguments

NAME = "reference"
TRANSPARENT = frozenset({"forward"})


def unavailable(device_type: str) -> str | None:
    return None


def refuses(arguments: NormArguments) -> str | None:
    return None


def description() -> str:
    return "the definition in plain PyTorch: the oracle of the tests"


def forward(a: NormArguments, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """y and x + residual (x itself without a residual); nothing is saved."""
    total = a.x if a.residual is None else a.x + a.residual
    y = total.to(a.dtype)
    if a.subtract_mean:
        y = y - y.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + a.eps).sqrt()
    if a.weight is not None:
        y = y * a.weight.to(a.dtype)
    if a.bias is not None:
        y = y + a.bias.to(a.dtype)
    return y.to(a.y_dtype), total, None
