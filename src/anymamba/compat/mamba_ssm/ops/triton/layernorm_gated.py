"""The gated norms of `mamba_ssm`, over the last dimension or groups of it, in plain torch on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _GatedNorm(nn.Module):
    """The base class of both norms, with the arguments and the attributes of the original's modules."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self._add_bias(hidden_size, device, dtype)
        self.reset_parameters()

    def _add_bias(self, hidden_size: int, device, dtype) -> None:
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class RMSNorm(_GatedNorm):
    """rms(x) weight silu(z), or with norm_before_gate=False rms(x silu(z)) weight.

    Args:
        hidden_size: width.
        group_size: elements that are normalised together; defaults to all.
        norm_before_gate: apply the gate after the norm.
    """

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x and z (..., hidden_size); without z there is no gate."""
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)


class LayerNorm(_GatedNorm):
    """Like `RMSNorm`, but it subtracts the mean and has a bias."""

    def _add_bias(self, hidden_size: int, device, dtype) -> None:
        self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x and z (..., hidden_size); without z there is no gate."""
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """(norm(x) weight + bias) silu(z), or norm(x silu(z)) weight + bias with norm_before_gate=False.

    Args:
        x, z: (..., hidden_size); without z there is no gate.
        weight, bias: (hidden_size,).
        group_size: elements that are normalised together; defaults to hidden_size.
        is_rms_norm: RMS instead of layer norm.
    The arithmetic is in float32 or wider. Returns out, like x. Raises ValueError for shapes.
    Source: the interface of mamba-ssm 2.3.2.
    """
    size = x.shape[-1]
    group = size if group_size is None else group_size
    if group < 1 or size % group:
        raise ValueError(f"hidden_size must be a multiple of group_size, got {size} and {group}; change either")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z must have the shape of x, got {tuple(z.shape)} and {tuple(x.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    y, gate = x.to(wide), None if z is None else F.silu(z.to(wide))
    if gate is not None and not norm_before_gate:
        y = y * gate
    grouped = y.unflatten(-1, (size // group, group))
    normed = F.rms_norm(grouped, (group,), None, eps) if is_rms_norm else F.layer_norm(grouped, (group,), eps=eps)
    y = normed.flatten(-2) * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """`layernorm_fn` with the RMS norm."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class LayerNormFn:
    """Has the name of the original's autograd function; `apply` is `layernorm_fn`."""

    apply = staticmethod(layernorm_fn)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """`rmsnorm_fn`; `upcast` has no effect, the arithmetic is always in float32 or wider."""
    return rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate)
