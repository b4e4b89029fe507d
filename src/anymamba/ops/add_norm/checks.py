"""What the norm of a sum refuses, and the form in which backends get its arguments."""

from __future__ import annotations

from anymamba.kernels.add_norm.arguments import NormArguments
from anymamba.ops.checks import require_floating, require_same_device, require_shape, without_lazy


def checked(a: NormArguments) -> NormArguments:
    """The arguments, nothing lazy.

    Raises ValueError for shapes, sizes and devices that do not fit, TypeError for dtypes.
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
