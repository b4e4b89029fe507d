"""The norm of a sum in torch's own operations, differentiable in every mode and to any order."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from anymamba.kernels.add_norm.arguments import NormArguments

NAME = "portable"
TRANSPARENT = frozenset({"forward"})


def unavailable(device_type: str) -> str | None:
    return None


def refuses(arguments: NormArguments) -> str | None:
    return None


def description() -> str:
    return "torch's own operations"


def forward(a: NormArguments, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """y and x + residual (x itself without a residual); nothing is saved."""
    x, residual, weight, bias, eps, subtract_mean = a
    total, dtype, shape = x if residual is None else residual + x, a.dtype, x.shape[-1:]
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if subtract_mean:
        y = F.layer_norm(total.to(dtype), shape, weight, bias, eps)
    else:
        y = F.rms_norm(total.to(dtype), shape, weight, eps)
        y = y if bias is None else y + bias
    return y.to(a.y_dtype), total, None
