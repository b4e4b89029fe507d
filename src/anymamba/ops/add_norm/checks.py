"""Check the arguments of the norm of a sum."""

from __future__ import annotations

from anymamba.kernels.add_norm.arguments import NormArguments
from anymamba.ops.checks import require_floating, require_same_device, require_shape


def checked(a: NormArguments) -> NormArguments:
    """Check the arguments. One step of a model calls this once per block, so correct arguments cost little.

    Raises ValueError for wrong shapes, sizes and devices, TypeError for wrong dtypes.
    """
    x, residual, weight, bias, eps, _, dtype = a
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be (..., size) with a size of at least 1, got {tuple(x.shape)}")
    if residual is not None:
        require_shape("residual", residual, tuple(x.shape), "like x")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if dtype is not None and not (dtype.is_floating_point and dtype.itemsize > 1):
        raise TypeError(f"dtype must be a floating-point dtype of at least 16 bits, got {dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            require_shape(name, tensor, (x.shape[-1],), "(size,)")
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        require_floating(name, tensor)
        if tensor.device != x.device:
            require_same_device("add_norm", {"x": x, name: tensor})
    return a
