"""The norm of x + residual: its contract and its public function."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from anymamba.kernels.add_norm.arguments import NormArguments, Rows
from anymamba.ops import dispatch
from anymamba.ops.add_norm.checks import checked
from anymamba.ops.add_norm.registration import OP, run


class AddNormOutput(NamedTuple):
    """What `add_norm` returns."""

    y: Rows
    """The normed sum, in the dtype of the weight; without a weight in that of x."""
    total: Rows
    """x + residual, in the wider dtype of both; x itself without a residual."""


def add_norm(
    x: Rows,
    weight: Float[Tensor, " size"] | None = None,
    bias: Float[Tensor, " size"] | None = None,
    *,
    residual: Rows | None = None,
    eps: float = 1e-5,
    subtract_mean: bool = False,
    backend: str | None = None,
) -> AddNormOutput:
    """Add x to the residual stream and norm the sum, in one pass over memory where a kernel serves.

        total = x + residual
        y = (total - mean) / sqrt(mean((total - mean)^2) + eps) * weight + bias

    Sums and norms are computed in float32 or wider, of the total as it is returned. Without `subtract_mean` the mean
    is taken as 0: the RMS norm.

    Args:
        x: (..., size), what is added; alone it is normed as it is.
        weight: (size,); defaults to ones.
        bias: (size,); defaults to zeros.
        residual: like x, of any dtype; defaults to none.
        eps: added to the variance.
        subtract_mean: layer norm instead of RMS norm.
        backend: as in `selective_scan`.
    Returns y and total; gradients flow to every tensor, through both.
    Raises ValueError for shapes, TypeError for dtypes, RuntimeError when a named backend cannot serve.
    Source: Root Mean Square Layer Normalization (arXiv:1910.07467); Layer Normalization (arXiv:1607.06450).
    """
    arguments = checked(NormArguments(x, residual, weight, bias, eps, subtract_mean))
    y, total = run(arguments, dispatch.resolve(OP, x.device.type, backend, arguments))
    return AddNormOutput(y, x if residual is None else total)
