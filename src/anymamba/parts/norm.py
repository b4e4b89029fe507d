"""Norms, computed in float32 or wider whatever the dtype of their weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, returned in the weight's dtype.

    Without a weight the result is returned in the dtype of x.
    """

    def __init__(self, size: int, eps: float = 1e-5, weight: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype)) if weight else None

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "... size"]) -> Float[Tensor, "... size"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.weight is None:
            return F.rms_norm(x.to(wide), (self.size,), None, self.eps).to(x.dtype)
        y = F.rms_norm(x.to(wide), (self.size,), self.weight.to(wide), self.eps)
        return y.to(self.weight.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, returned in the weight's dtype."""

    def __init__(self, size: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "... size"]) -> Float[Tensor, "... size"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.layer_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return y.to(self.weight.dtype)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def build_norm(name: str, size: int, eps: float, device=None, dtype=None) -> RMSNorm | LayerNorm:
    """Build a norm from its name, "rmsnorm" or "layernorm".

    Raises ValueError for another name.
    """
    if name not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {name!r}")
    return NORMS[name](size, eps, device=device, dtype=dtype)
