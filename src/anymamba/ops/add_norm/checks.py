"""Check the arguments of the norm of a sum, and bring them into the form that backends take."""

from __future__ import annotations

from anymamba.kernels.add_norm.arguments import NormArguments
from anymamba.ops.checks import require_floating, require_same_device, require_shape, without_lazy


def checked(a: NormArguments) -> NormArguments:
    """Check the arguments and resolve lazy tensors.

    Raises ValueError for wrong shapes, sizes and devices, TypeError for wrong dtypes.
    """
    x, residual, weight, bias, eps, _ = a
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be (..., size) with a size of at least 1, got {tuple(x.shape)}")
    if residual is not None:
        require_shape("residual", residual, tuple(x.shape), "like x")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    named = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    for name in ("weight", "bias"):
        tensor = named[name]
        if tensor is not None:
            require_shape(name, tensor, (x.shape[-1],), "(size,)")
    for name, tensor in named.items():
        if tensor is not None:
            require_floating(name, tensor)
    require_same_device("add_norm", named)
    return without_lazy(a)
