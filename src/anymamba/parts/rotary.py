"""Rotary positions (RoPE) and the decay of xPos, at any given positions.

Source: RoFormer (arXiv:2104.09864), section 3.2; xPos (arXiv:2212.10554), section 3.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotate(
    x: Float[Tensor, "batch length n_heads d_head"], positions: Int[Tensor, "batch length"], base: float = 10000.0
) -> Float[Tensor, "batch length n_heads d_head"]:
    """Rotate each pair of channels by an angle that grows with the position.

        [x_i, x_j] -> [x_i cos(p f_i) - x_j sin(p f_i), x_j cos(p f_i) + x_i sin(p f_i)]
        f_i = base ** (-2 i / d_head),  j = i + d_head / 2

    The product of a rotated query and a rotated key depends only on the difference of their positions.

    Args:
        x: (batch, length, n_heads, d_head).
        positions: (batch, length), of any sign; a batch of 1 is used for all rows.
        base: the slowest pair makes one turn in about 2 pi base positions.
    Returns the same shape and dtype. Angles are computed in float64 (in float32 the angle at position 2^20 is off by
        0.06), the products in float32 or wider.
    Raises ValueError when d_head is odd.
    """
    half = _half(x.shape[-1])
    wide = _angle_dtype(x)
    frequency = base ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angle = (positions.to(wide)[..., None] * frequency)[:, :, None]
    like = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angle.cos().to(like), angle.sin().to(like)
    first, second = x.to(like).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def xpos_scale(
    x: Float[Tensor, "batch length n_heads d_head"],
    offsets: Int[Tensor, "batch length"],
    scale_base: float = 512.0,
    gamma: float = 0.4,
) -> Float[Tensor, "batch length n_heads d_head"]:
    """Scale each pair of channels by a power of the offset: x_i zeta_i ** (offset / scale_base).

        zeta_i = (2 i / d_head + gamma) / (1 + gamma) <= 1, the same for i and i + d_head / 2

    Scale a query with its position and a key with minus its position: their product then has zeta to the power of the
    distance. Only differences of offsets matter. Count both from a position near the query, because
    zeta_0 ** (-n / 512) overflows float32 at n = 36,000 and float16 at 4,500.

    Args:
        x: (batch, length, n_heads, d_head), rotated.
        offsets: (batch, length), of any sign; a batch of 1 is used for all rows.
        scale_base: number of positions over which a pair fades by a factor of zeta.
        gamma: keeps zeta_0 away from 0.
    Returns the same shape and dtype.
    Raises ValueError when d_head is odd.
    """
    half = _half(x.shape[-1])
    wide = torch.promote_types(x.dtype, torch.float32)
    pair = torch.arange(half, device=x.device, dtype=wide) / half
    log_zeta = torch.log((pair + gamma) / (1 + gamma)).repeat(2)
    scale = torch.exp(offsets.to(wide)[..., None] / scale_base * log_zeta)
    return (x.to(wide) * scale[:, :, None]).to(x.dtype)


def _half(d_head: int) -> int:
    """Pairs of channels of a head."""
    if d_head % 2:
        raise ValueError(f"rotary positions rotate pairs of channels: d_head must be even, got {d_head}; change d_head")
    return d_head // 2


def _angle_dtype(x: Tensor) -> torch.dtype:
    """float64, or float32 on Apple GPUs, which have no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64
