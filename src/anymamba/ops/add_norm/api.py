"""The norm of x + residual: its public function and contract."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from anymamba.kernels.add_norm.arguments import NormArguments, Rows
from anymamba.ops import dispatch
from anymamba.ops.add_norm.checks import checked
from anymamba.ops.add_norm.registration import OP, run


class AddNormOutput(NamedTuple):
    """The result of `add_norm`."""

    y: Rows
    """The normalised sum."""
    total: Rows
    """x + residual, in the wider of the two dtypes; x itself without a residual."""


def add_norm(
    x: Rows,
    weight: Float[Tensor, " size"] | None = None,
    bias: Float[Tensor, " size"] | None = None,
    *,
    residual: Rows | None = None,
    eps: float = 1e-5,
    subtract_mean: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> AddNormOutput:
    """Add x to the residual stream and normalise the sum; a kernel does it in one pass over memory.

        total = x + residual
        y = (total - mean) / sqrt(mean((total - mean)^2) + eps) * weight + bias

    Norms are computed in float32 or wider, from the total in the dtype in which it is returned. Without `subtract_mean`
    the mean counts as 0, which gives the RMS norm.

    Args:
        x: (..., size). Without a residual, x itself is normalised.
        weight: (size,); defaults to ones.
        bias: (size,); defaults to zeros.
        residual: like x, of any dtype; defaults to none.
        eps: added to the variance.
        subtract_mean: layer norm instead of RMS norm.
        dtype: the dtype of y; defaults to that of the weight, or of x without a weight.
        backend: as in `selective_scan`.
    Returns y and total; gradients flow through both to every tensor.
    Raises ValueError for wrong shapes, TypeError for wrong dtypes, RuntimeError if a named backend cannot serve.
    Source: Root Mean Square Layer Normalization (arXiv:1910.07467); Layer Normalization (arXiv:1607.06450).
    """
    arguments = checked(NormArguments(x, residual, weight, bias, eps, subtract_mean, dtype))
    y, total = run(arguments, dispatch.resolve(OP, x.device.type, backend, arguments))
    return AddNormOutput(y, x if residual is None else total)
