"""The formats of packed weights: block layouts as in GGUF files, and how they are read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


class Format(NamedTuple):
    """How a row of weights lies in memory."""

    code: int
    """The value in csrc/packed.h."""
    columns: int
    """Columns of a block; rows are a whole number of blocks."""
    n_bytes: int
    """Bytes of a block."""
    bits: float
    """Bits per weight."""


FORMATS = {
    name: Format(code, columns, n_bytes, 8 * n_bytes / columns)
    for code, (name, columns, n_bytes) in enumerate(
        [
            ("float32", 1, 4),
            ("bfloat16", 1, 2),
            ("float16", 1, 2),
            ("q8_0", 32, 34),
            ("q4_0", 32, 18),
            ("q4_k", 256, 144),
            ("q5_k", 256, 176),
            ("q6_k", 256, 210),
        ]
    )
}
"""Every format by name. The block formats and their names are those of GGUF."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes of the formats without blocks."""

READ_ONLY = ("q5_k",)
"""Formats that can be read and multiplied, but not written."""


class PackedWeight(NamedTuple):
    """A matrix (n_out, n_in) whose rows are packed in a format; the data may be a view of a mapped file."""

    data: UInt8[Tensor, "n_out row_bytes"]
    format: str
    n_in: int

    @property
    def n_out(self) -> int:
        return self.data.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_out, self.n_in


def row_bytes(format: str, n_in: int) -> int:
    """Bytes of a row of n_in weights.

    Raises ValueError for an unknown format, and where rows are not a whole number of blocks.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown weight format {format!r}; the formats are {', '.join(FORMATS)}")
    _, columns, n_bytes, _ = FORMATS[format]
    if n_in % columns:
        raise ValueError(
            f"{format} packs blocks of {columns} columns, got {n_in} columns; "
            f"use {'q8_0, q4_0 or ' if columns > 32 and n_in % 32 == 0 else ''}bfloat16 for this matrix"
        )
    return n_in // columns * n_bytes


def unpack(data: UInt8[Tensor, "*rows row_bytes"], format: str) -> Float[Tensor, "*rows n_in"]:
    """Rows of weights in float32, by torch operations on any device.

    Args:
        data: (..., row_bytes), uint8: rows of a packed weight, such as those of an embedding that are looked up.
        format: a key of FORMATS.
    """
    if format in DTYPES:
        return data.contiguous().view(DTYPES[format]).float()
    blocks = data.reshape(-1, FORMATS[format].n_bytes)
    return _UNPACK[format](blocks).reshape(*data.shape[:-1], -1)


# ------------------------------------------------------------------------------------------ block formats


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at a byte of each block, (blocks, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(q: Tensor) -> Tensor:
    """(blocks, groups, n) bytes as (blocks, groups, 2, n): low nibbles, then high ones."""
    return torch.stack([q & 15, q >> 4], 2)


def _unpack_q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8)


def _unpack_q4_0(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, None, 2:]).reshape(-1, 32)
    return _half(blocks, 0) * (q.float() - 8)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of the eight groups of a K-quant's block, (blocks, 8, 1): 6 bits each in 12 bytes."""
    first, second, third = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], 1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], 1)
    return (_half(blocks, 0) * scales)[..., None], (_half(blocks, 2) * minima)[..., None]


def _unpack_q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks)
    q = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return scales * q - minima


def _unpack_q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks)
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = (blocks[:, None, 16:48] >> shifts) & 1
    return scales * (low | (fifth << 4)) - minima


def _unpack_q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    q = (low | (high << 4)).reshape(-1, 16, 16).float() - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8)
    return scales[..., None] * q


_UNPACK = {
    "q8_0": _unpack_q8_0,
    "q4_0": _unpack_q4_0,
    "q4_k": _unpack_q4_k,
    "q5_k": _unpack_q5_k,
    "q6_k": _unpack_q6_k,
}
