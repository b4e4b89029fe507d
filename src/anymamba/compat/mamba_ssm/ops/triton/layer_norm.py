"""The norms of `mamba_ssm` that also add the residual, in plain torch on any device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.compat.mamba_ssm.refused import refusing
from anymamba.compat.mamba_ssm.version_1 import accepting_version_1

__getattr__ = refusing(__name__)

_UP_TO_RESIDUAL = ("x", "weight", "bias", "residual")
_LAYER_NORM_1 = (*_UP_TO_RESIDUAL, "eps", "prenorm", "residual_in_fp32", "is_rms_norm")
_RMS_NORM_1 = (*_UP_TO_RESIDUAL, "prenorm", "residual_in_fp32", "eps")
_REF_1 = (*_UP_TO_RESIDUAL, "eps", "prenorm", "upcast")
_MODULE_1 = ("self", "hidden_size", "eps", "device", "dtype")


def _is_norm_1(arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether the fifth argument is a number: version 1 has eps or prenorm there, version 2 the tensor x1."""
    return len(arguments) > 4 and isinstance(arguments[4], int | float)


def _is_module_1(arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether the fourth argument is not a number: version 1 has the device there, version 2 the number dropout_p."""
    return len(arguments) > 3 and not isinstance(arguments[3], float | int)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, optionally of x + residual and with dropout of x.

    The positional arguments of version 1, without dropout_p, are accepted too.
    """

    bias: None

    @accepting_version_1(_MODULE_1, _is_module_1)
    def __init__(self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """out, or (out, x + residual) with prenorm."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


@accepting_version_1(_LAYER_NORM_1, _is_norm_1)
def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """norm(dropout(x rowscale) + dropout(x1) + residual), one or two norms of the same sum.

    The positional arguments of version 1 (x, weight, bias, residual, eps, prenorm, ...) are accepted too.

    Args:
        x, residual, x1: (..., hidden_size).
        weight, bias, weight1, bias1: (hidden_size,) of the first and the second norm.
        eps: epsilon of both norms.
        dropout_p: dropout rate of x and x1.
        rowscale: (...), factors of the rows of x.
        prenorm: also return the sum, in float32 with residual_in_fp32, else in the residual's dtype.
        is_rms_norm: RMS instead of layer norm.
        return_dropout_mask: also return the masks of x and x1 (None without dropout).
    Returns a tuple of out, the second norm (with weight1), the sum and the masks; out itself if it is the only one.
    """
    dropout = _Dropout(dropout_p, None, None)
    results, masks = _norms(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout, rowscale, prenorm, residual_in_fp32, is_rms_norm
    )
    if return_dropout_mask:
        results += masks
    return results[0] if len(results) == 1 else tuple(results)


@accepting_version_1(_RMS_NORM_1, _is_norm_1)
def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """`layer_norm_fn` with the RMS norm; version 1's order is (x, weight, bias, residual, prenorm, ...)."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, True,
        return_dropout_mask,
    )  # fmt: skip


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """linear(norm(x + residual)); with prenorm also the sum."""
    normed = layer_norm_fn(
        x,
        norm_weight,
        norm_bias,
        residual=residual,
        eps=eps,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )
    hidden = normed[0] if prenorm else normed
    bias = None if linear_bias is None else linear_bias.to(linear_weight.dtype)
    out = F.linear(hidden.to(linear_weight.dtype), linear_weight, bias)
    return (out, normed[1]) if prenorm else out


class LayerNormFn:
    """Has the name of the original's autograd function; `apply` is `layer_norm_fn`."""

    apply = staticmethod(layer_norm_fn)


class LayerNormLinearFn:
    """Has the name of the original's autograd function; `apply` is `layer_norm_linear_fn`."""

    apply = staticmethod(layer_norm_linear_fn)


@accepting_version_1(_REF_1, _is_norm_1)
def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """`layer_norm_fn` without the options of its kernels.

    Args:
        dropout_mask, dropout_mask1: which elements of x and x1 are kept; drawn at random by default.
        upcast: return the sum in float32.
    """
    dropout = _Dropout(dropout_p, dropout_mask, dropout_mask1)
    results, _ = _norms(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout, rowscale, prenorm, upcast, rms=False
    )
    return results[0] if len(results) == 1 else tuple(results)


@accepting_version_1(_REF_1, _is_norm_1)
def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """`layer_norm_ref` with the RMS norm."""
    dropout = _Dropout(dropout_p, dropout_mask, dropout_mask1)
    results, _ = _norms(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout, rowscale, prenorm, upcast, rms=True
    )
    return results[0] if len(results) == 1 else tuple(results)


class _Dropout(NamedTuple):
    p: float
    mask: Tensor | None
    """Which elements of x are kept; drawn at random if None."""
    mask1: Tensor | None
    """The same for x1."""


def _norms(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    x1: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    eps: float,
    dropout: _Dropout,
    rowscale: Tensor | None,
    prenorm: bool,
    residual_in_fp32: bool,
    rms: bool,
) -> tuple[list[Any], list[Tensor | None]]:
    """One or two norms and, with prenorm, the sum; and the masks of x and x1."""
    if rowscale is not None:
        x = x * rowscale.unsqueeze(-1).to(x.dtype)
    x, mask = _dropout(x, dropout.p, dropout.mask)
    x1, mask1 = (None, None) if x1 is None else _dropout(x1, dropout.p, dropout.mask1)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide)
    for other in (x1, residual):
        total = total if other is None else total + other.to(wide)
    results: list[Any] = [_norm(total, weight, bias, eps, rms).to(x.dtype)]
    if weight1 is not None:
        results.append(_norm(total, weight1, bias1, eps, rms).to(x.dtype))
    if prenorm:
        narrow = residual.dtype if residual is not None else x.dtype
        results.append(total.to(wide if residual_in_fp32 else narrow))
    return results, [mask, mask1]


def _dropout(x: Tensor, p: float, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if p <= 0:
        return x, None
    if mask is None:
        mask = torch.rand(x.shape, device=x.device) >= p
    return x * mask.to(x.dtype) / (1 - p), mask


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    shape, weight = weight.shape, weight.to(x.dtype)
    if not rms:
        return F.layer_norm(x, shape, weight, None if bias is None else bias.to(x.dtype), eps)
    y = F.rms_norm(x, shape, weight, eps)
    return y if bias is None else y + bias.to(x.dtype)
