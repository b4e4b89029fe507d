"""Weights in float32 to a format by torch operations, on any device: the oracle of the compiled conversion.

The K-quants choose, for every group of columns with a scale of its own, the scale (and minimum) with the least squared
error among those of about twenty roundings, each by least squares.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from anymamba.kernels.packed_linear.formats import DTYPES, FORMATS

AT_ONCE = 1 << 22
"""Weights converted at once; the candidates of a K-quant take several times the memory."""


def pack(matrix: Float[Tensor, "n_out n_in"], format: str) -> UInt8[Tensor, "n_out row_bytes"]:
    """The rows of a finite float32 matrix in a format other than q5_k."""
    n_out = matrix.shape[0]
    if format in DTYPES:
        return matrix.to(DTYPES[format]).contiguous().view(torch.uint8).reshape(n_out, -1)
    columns = FORMATS[format].columns
    groups = matrix.reshape(-1, columns).split(AT_ONCE // columns)
    return torch.cat([_PACK[format](group) for group in groups]).reshape(n_out, -1)


def _inverse(d: Tensor) -> Tensor:
    """1 / d, or 0 where that is not finite."""
    inverse = 1 / d
    return torch.where(inverse.isfinite(), inverse, 0)


def _half_bytes(value: Float[Tensor, "blocks 1"]) -> UInt8[Tensor, "blocks 2"]:
    return value.half().contiguous().view(torch.uint8)


def _furthest(x: Tensor) -> Tensor:
    """The entry with the largest magnitude along the last dimension, which is kept."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def _pack_q8_0(x: Tensor) -> Tensor:
    scale = x.abs().amax(1, keepdim=True) / 127
    value = x * _inverse(scale)
    size = value.abs()
    whole = size.floor() + (2 * (size - size.floor())).floor()  # halves are rounded away from zero
    return torch.cat([_half_bytes(scale), (value.sign() * whole).to(torch.int8).view(torch.uint8)], 1)


def _pack_q4_0(x: Tensor) -> Tensor:
    scale = _furthest(x) / -8
    q = (x * _inverse(scale) + 8.5).to(torch.uint8).clamp(max=15)
    return torch.cat([_half_bytes(scale), q[:, :16] | (q[:, 16:] << 4)], 1)


def _fit_lines(x: Float[Tensor, "blocks 8 32"]) -> tuple[Tensor, Tensor]:
    """Scales and minima, both (blocks, 8): x is about scale q - minimum, with q from 0 to 15."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)
    x1, x2 = x.sum(-1), (x * x).sum(-1)
    width = high - low
    scale, minimum = (width / 15)[..., 0], -low[..., 0]
    least = torch.full_like(scale, torch.inf)
    for t in range(-10, 13):
        q = ((x - low) * _inverse(width) * (15 + 0.1 * t)).round().clamp(0, 15)
        q1, q2, xq = q.sum(-1), (q * q).sum(-1), (q * x).sum(-1)
        divisor = 32 * q2 - q1 * q1
        inverse = _inverse(divisor)
        s, offset = (32 * xq - x1 * q1) * inverse, (q2 * x1 - q1 * xq) * inverse
        s, offset = torch.where(offset > 0, xq * _inverse(q2), s), offset.clamp(max=0)
        error = s * (s * q2 + 2 * offset * q1 - 2 * xq) + offset * (32 * offset - 2 * x1) + x2
        better = (s > 0) & (divisor > 0) & (error < least)
        scale, minimum = torch.where(better, s, scale), torch.where(better, -offset, minimum)
        least = torch.where(better, error, least)
    return scale, minimum


def _pack_q4_k(x: Tensor) -> Tensor:
    groups = x.reshape(-1, 8, 32)
    scale, minimum = _fit_lines(groups)
    both = torch.cat([scale.amax(1, keepdim=True) / 63, minimum.amax(1, keepdim=True) / 63], 1).half().float()
    scales = (scale * _inverse(both[:, :1])).round().clamp(0, 63)
    minima = (minimum * _inverse(both[:, 1:])).round().clamp(0, 63)
    each, offset = (both[:, :1] * scales)[..., None], (both[:, 1:] * minima)[..., None]
    q = ((groups + offset) * _inverse(each)).round().clamp(0, 15).to(torch.uint8)
    nibbles = (q[:, ::2] | (q[:, 1::2] << 4)).reshape(-1, 128)
    return torch.cat([_half_bytes(both), _six_bits(scales.to(torch.uint8), minima.to(torch.uint8)), nibbles], 1)


def _six_bits(scales: UInt8[Tensor, "blocks 8"], minima: UInt8[Tensor, "blocks 8"]) -> UInt8[Tensor, "blocks 12"]:
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    return torch.cat([first, second, (scales[:, 4:] & 15) | (minima[:, 4:] << 4)], 1)


def _fit_scales(x: Float[Tensor, "blocks 16 16"]) -> Float[Tensor, "blocks 16"]:
    """Scales: x is about scale q, with q from -32 to 31."""
    furthest = _furthest(x)
    best, most = torch.zeros_like(x[..., 0]), torch.zeros_like(x[..., 0])
    for t in range(-10, 11):
        q = (x * _inverse(furthest) * -(32 + 0.1 * t)).round().clamp(-32, 31)
        q2, xq = (q * q).sum(-1), (q * x).sum(-1)
        explained = xq * xq * _inverse(q2)
        best = torch.where(explained > most, xq * _inverse(q2), best)
        most = torch.maximum(most, explained)
    return best


def _pack_q6_k(x: Tensor) -> Tensor:
    groups = x.reshape(-1, 16, 16)
    fitted = _fit_scales(groups)
    half = (_furthest(fitted) / -128).half()
    scale = half.float()
    scales = (fitted * _inverse(scale)).round().clamp(-128, 127)
    q = (groups * _inverse(scale * scales)[..., None]).round().clamp(-32, 31).add(32).to(torch.uint8)
    q = q.reshape(-1, 2, 4, 32)  # two halves, four blocks of 32
    low = (q[:, :, :2] & 15) | (q[:, :, 2:] & 15) << 4
    high = q >> 4
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    parts = [low.reshape(-1, 128), high.reshape(-1, 64), scales.to(torch.int8).view(torch.uint8)]
    return torch.cat([*parts, _half_bytes(half)], 1)


_PACK = {"q8_0": _pack_q8_0, "q4_0": _pack_q4_0, "q4_k": _pack_q4_k, "q6_k": _pack_q6_k}
