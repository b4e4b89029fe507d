"""Check the arguments of the cross-entropy of a linear map, and bring them into the form that backends take."""

from __future__ import annotations

import torch

from anymamba.kernels.linear_cross_entropy.arguments import LossArguments
from anymamba.ops.checks import require_floating, require_same_device, require_shape, without_lazy


def checked(a: LossArguments) -> LossArguments:
    """Check the arguments, convert labels to int64 and resolve lazy tensors.

    Raises ValueError for wrong shapes and devices, TypeError for wrong dtypes.
    """
    x, weight, labels, _ = a
    if x.ndim != 2:
        raise ValueError(f"x must be (tokens, d_model), got {tuple(x.shape)}")
    require_shape("weight", weight, (None, x.shape[1]), "(vocab, d_model)")
    require_shape("labels", labels, (x.shape[0],), "(tokens,)")
    for name, tensor in (("x", x), ("weight", weight)):
        require_floating(name, tensor)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x and weight must have one dtype, got {x.dtype} and {weight.dtype}; convert one of them")
    require_same_device("linear_cross_entropy", {"x": x, "weight": weight, "labels": labels})
    return without_lazy(a._replace(labels=labels.long()))
