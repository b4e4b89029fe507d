"""Check the arguments of the product of packed weights, and bring them into the form that backends take."""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.kernels.packed_linear.arguments import PackedLinearArguments
from anymamba.kernels.packed_linear.formats import FORMATS, READ_ONLY, PackedWeight, row_bytes
from anymamba.ops.checks import require_floating, require_same_device, require_shape, without_lazy


def checked_weight(weight: PackedWeight) -> None:
    """Raise ValueError or TypeError unless the bytes of a packed weight have the size that its format needs."""
    wanted = row_bytes(weight.format, weight.n_in)
    if weight.data.dtype != torch.uint8:
        raise TypeError(f"the data of a packed weight must be torch.uint8, got {weight.data.dtype}; view it as bytes")
    if weight.data.ndim != 2 or weight.data.shape[1] != wanted:
        raise ValueError(
            f"the data of a {weight.format} weight with {weight.n_in} columns must be (n_out, {wanted}), got "
            f"{tuple(weight.data.shape)}; pack the matrix again"
        )


def checked(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> PackedLinearArguments:
    """Check the arguments and flatten x to rows.

    Raises ValueError for wrong shapes, formats and devices, TypeError for wrong dtypes.
    """
    checked_weight(weight)
    require_floating("x", x)
    if x.ndim < 1 or x.shape[-1] != weight.n_in:
        raise ValueError(f"x must be (..., n_in) = (..., {weight.n_in}) for this weight, got {tuple(x.shape)}")
    if bias is not None:
        require_floating("bias", bias)
        require_shape("bias", bias, (weight.n_out,), "(n_out,)")
    require_same_device("packed_linear", {"x": x, "weight": weight.data, "bias": bias})
    rows = x.reshape(-1, weight.n_in) if x.ndim != 2 else x
    return without_lazy(PackedLinearArguments(rows, weight.data, bias, weight.format))


def checked_matrix(matrix: Tensor, format: str) -> None:
    """Raise ValueError or TypeError unless a matrix can be packed in a format."""
    require_floating("matrix", matrix)
    require_shape("matrix", matrix, (None, None), "(n_out, n_in)")
    row_bytes(format, matrix.shape[1])
    if format in READ_ONLY:
        written = ", ".join(name for name in FORMATS if name not in READ_ONLY)
        raise ValueError(f"{format} weights can be read but not written, got format {format!r}; use one of {written}")
    if FORMATS[format].columns > 1 and not bool(matrix.isfinite().all()):
        raise ValueError(f"{format} holds finite numbers, got infinity or NaN in the matrix; use bfloat16 or float32")
