"""Rotary positions (RoPE) and the decay of xPos, at any given positions.

Source: RoFormer (arXiv:2104.09864), section 3.2; xPos (arXiv:2212.10554), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anymamba.kernels.rotary import cuda
from anymamba.parts.derivatives import as_operations, in_kernels, in_operations


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
    return _turned(x, *_angles(x, positions, base))


def rotate_heads(
    packed: Float[Tensor, "batch length n_heads d_head"],
    positions: Int[Tensor, "batch_or_1 length"],
    n_kv_heads: int,
    base: float = 10000.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotate` queries and keys that lie side by side with the values, as a projection makes them.

    On NVIDIA GPUs a kernel reads and writes each number once, in either pass.

    Args:
        packed: queries, n_kv_heads heads of keys, and as many of values.
        positions, base: as in `rotate`.
    Returns queries, keys and values, each (batch, length, heads, d_head). Derivatives are of any mode and order.
    """
    _half(packed.shape[-1])
    angles = _angles(packed, positions, base)
    if as_operations(packed, *angles) or not _in_kernel(packed):
        return _rotated(packed, n_kv_heads, *angles)
    return _Rotated.apply(packed, n_kv_heads, *(t[:, :, 0] for t in angles))


def _in_kernel(*tensors: Tensor) -> bool:
    return in_kernels(*tensors) and all(map(cuda.serves, tensors))


def _angles(x: Tensor, positions: Int[Tensor, "batch_or_1 length"], base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (batch or 1, length, 1, d_head / 2), in float32 or wider."""
    half = _half(x.shape[-1])
    wide = _angle_dtype(x)
    frequency = base ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angle = (positions.to(wide)[..., None] * frequency)[:, :, None]
    like = torch.promote_types(x.dtype, torch.float32)
    return angle.cos().to(like), angle.sin().to(like)


def _turned(x: Float[Tensor, "batch length n_heads d_head"], cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def _rotated(packed: Tensor, n_kv_heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = packed.split((packed.shape[2] - 2 * n_kv_heads, n_kv_heads, n_kv_heads), 2)
    return _turned(q, cos, sin), _turned(k, cos, sin), v


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, n_kv_heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q, k = cuda.rotate(packed, n_kv_heads, cos, sin)
        return q, k, packed[:, :, packed.shape[2] - n_kv_heads :]

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        if in_operations(dq, dk, dv) or not _in_kernel(dq, dk, dv) or len({t.dtype for t in (dq, dk, dv)}) > 1:
            cos, sin = cos[:, :, None], sin[:, :, None]
            return torch.cat([_turned(dq, cos, -sin), _turned(dk, cos, -sin), dv], 2), None, None, None
        return cuda.gradient(dq, dk, dv, cos, sin), None, None, None


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
