"""The norm of a sum in torch's own operations, differentiable in every mode and to any order."""

from __future__ import annotations

from typing import Any

import torch
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
    x, residual, weight, bias, eps, subtract_mean, _ = a
    total, dtype, shape = x if residual is None else residual + x, a.dtype, x.shape[-1:]
    wide, weight, bias = as_dtype(total, dtype), as_dtype(weight, dtype), as_dtype(bias, dtype)
    if subtract_mean:
        y = F.layer_norm(wide, shape, weight, bias, eps)
    else:
        y = F.rms_norm(wide, shape, weight, eps)
        y = y if bias is None else y + bias
    return as_dtype(y, a.y_dtype), total, None


def as_dtype(tensor: Any, dtype: torch.dtype) -> Any:
    """`tensor.to(dtype)`, or None for None. A call of torch costs more than the comparison: this runs in every block
    of every token."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)
