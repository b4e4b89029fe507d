"""Norms, computed in float32 or wider whatever the dtype of their weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anymamba.ops.add_norm import AddNormOutput, add_norm
from anymamba.ops.dispatch import autocast_dtype
from anymamba.parts.bare import is_bare
from anymamba.parts.recipes import again


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
        return self.of_sum(x).y

    def of_sum(
        self,
        x: Float[Tensor, "... size"],
        residual: Float[Tensor, "... size"] | None = None,
        dtype: torch.dtype | None = None,
    ) -> AddNormOutput:
        """The norm of x + residual, in a dtype that defaults to the weight's, and the sum."""
        output = add_norm(x, self.weight, residual=residual, eps=self.eps, dtype=dtype)
        again(output.y, _norm_of, output.total, self.weight, None, self.eps, False, dtype)
        return output


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
        return self.of_sum(x).y

    def of_sum(
        self,
        x: Float[Tensor, "... size"],
        residual: Float[Tensor, "... size"] | None = None,
        dtype: torch.dtype | None = None,
    ) -> AddNormOutput:
        """The norm of x + residual, in a dtype that defaults to the weight's, and the sum."""
        output = add_norm(x, self.weight, self.bias, residual=residual, eps=self.eps, subtract_mean=True, dtype=dtype)
        again(output.y, _norm_of, output.total, self.weight, self.bias, self.eps, True, dtype)
        return output


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def build_norm(name: str, size: int, eps: float, device=None, dtype=None) -> RMSNorm | LayerNorm:
    """Build a norm from its name, "rmsnorm" or "layernorm".

    Raises ValueError for another name.
    """
    if name not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {name!r}")
    return NORMS[name](size, eps, device=device, dtype=dtype)


def norm_of_sum(
    norm: nn.Module,
    update: Float[Tensor, "... size"] | None,
    residual: Float[Tensor, "... size"],
    projected: bool = False,
) -> tuple[Float[Tensor, "... size"], Float[Tensor, "... size"]]:
    """norm(residual + update) and residual + update, in one op where the norm is one of this file.

    Args:
        norm: any module; one with hooks, or that wraps a norm, is called with the sum.
        update: what is added; None for nothing.
        residual: the stream so far.
        projected: whether the norm goes into a linear map only. Then it is computed in the dtype of autocast, to which
            the linear map would convert it.
    """
    if is_bare(norm, RMSNorm) or is_bare(norm, LayerNorm):
        wide = projected and norm.weight is not None and norm.weight.dtype == torch.float32
        dtype = autocast_dtype(residual.device.type) if wide else None
        terms = (residual, None) if update is None else (update, residual)
        return norm.of_sum(*terms, dtype)  # type: ignore[operator]
    total = residual if update is None else residual + update
    return norm(total), total


def _norm_of(
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    subtract_mean: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    return add_norm(total, weight, bias, eps=eps, subtract_mean=subtract_mean, dtype=dtype).y
