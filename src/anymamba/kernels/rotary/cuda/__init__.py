"""Rotary positions in CUDA C++ for NVIDIA GPUs: queries and keys are read and written once, and so are gradients.

Products are in float32, as those of torch's operations. Nothing here waits for the GPU.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from anymamba.runtimes import nvrtc
from anymamba.runtimes.launching import Call, in_pieces, is_served, layout, numbers_of_piece, resolved
from anymamba.runtimes.replaying import replayed

TENSORS = {"packed": 4, "q": 4, "k": 4, "v": 4}
"""Fields that are a struct of address, strides and dtype, and their dimensions."""
FIELDS = ("cosines", "sines", "rows", "length", "channels", "n_queries", "n_keys", "apart", "backward")
LAYOUT = layout(TENSORS, FIELDS)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
THREADS = 256


def serves(heads: Tensor) -> bool:
    """Whether the kernel takes these heads: halves of whole pieces of 16 bytes, on a GPU that compiles it."""
    if heads.dtype not in DTYPES or not 0 < heads.numel() < 1 << 32:
        return False
    return not heads.shape[-1] % (2 * numbers_of_piece(heads)) and is_served(heads)


def rotate(packed: Tensor, n_keys: int, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    """The rotated queries and keys.

    Args:
        packed: (batch, length, heads, channels): queries, `n_keys` heads of keys, and as many of values.
        cosines, sines: (batch or 1, length, channels / 2) in float32.
    """
    tensors = resolved(packed), cosines, sines
    q, k = replayed("rotary positions", tensors, (n_keys,), lambda: _rotate(tensors[0], n_keys, cosines, sines))
    return q, k


def gradient(dq: Tensor, dk: Tensor, dv: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """That of `packed`, from those of queries, keys and values, each (batch, length, heads, channels)."""
    dq, dk, dv = resolved(dq), resolved(dk), resolved(dv)
    tensors = dq, dk, dv, cosines, sines
    return replayed("gradient of rotary positions", tensors, (), lambda: (_gradient(*tensors),))[0]


def _rotate(packed: Tensor, n_keys: int, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, n_heads, channels = packed.shape
    n_queries = n_heads - 2 * n_keys
    q, k = (packed.new_empty(batch, length, n, channels) for n in (n_queries, n_keys))
    _launch(n_queries + n_keys, cosines, sines, packed=packed, q=q, k=k)
    return q, k


def _gradient(dq: Tensor, dk: Tensor, dv: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    batch, length, n_queries, channels = dq.shape
    packed = dq.new_empty(batch, length, n_queries + 2 * dk.shape[2], channels)
    _launch(packed.shape[2], cosines, sines, packed=packed, q=dq, k=dk, v=dv)
    return packed


def _launch(n_heads: int, cosines: Tensor, sines: Tensor, **tensors: Tensor) -> None:
    """Rotate forward, or backward if v is there, where `n_heads` heads are read."""
    packed, q, k = (tensors[name] for name in ("packed", "q", "k"))
    (rows, length, _, channels), call = packed.shape, Call(LAYOUT, packed)
    call.set(rows=rows, length=length, channels=channels, n_queries=q.shape[2], n_keys=k.shape[2])
    call.set(apart=0 if cosines.shape[0] == 1 else length, backward="v" in tensors)
    call.strided(**{name: in_pieces(t) for name, t in tensors.items()})
    call.dense(cosines=cosines, sines=sines)
    n_pieces = rows * length * n_heads * (channels // 2 // numbers_of_piece(packed))
    call.launch(variant(packed.dtype), -(-n_pieces // THREADS), THREADS, early=True)


@cache
def variant(dtype: torch.dtype) -> nvrtc.Variant:
    source = nvrtc.source(Path(__file__).parent / "rotary.cu")
    return nvrtc.Variant(source, "rotate", (("DTYPE", nvrtc.DTYPES[dtype]),))


def variants() -> list[nvrtc.Variant]:
    """Every compilation that some call on some GPU needs."""
    return [variant(dtype) for dtype in DTYPES]
