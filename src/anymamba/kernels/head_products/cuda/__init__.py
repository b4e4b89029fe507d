"""Outer products within heads and their sums in CUDA C++ for NVIDIA GPUs: the products are read or written once.

Between them is a convolution, which takes (heads, length, batch, d, d). The vectors stay in the order of a layer,
(batch, length, heads, d). Sums are in float32, in an order of their own. Nothing here waits for the GPU.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from anymamba.runtimes import nvrtc
from anymamba.runtimes.launching import Call, in_pieces, is_served, layout

TENSORS = {"x": 4, "y": 4}
"""Fields that are a struct of address, strides and dtype, and their dimensions."""
FIELDS = ("products", "made", "rows", "columns", "batch", "length", "heads")
LAYOUT = layout(TENSORS, FIELDS)
DTYPES = (torch.bfloat16, torch.float16)
D = 8
"""Channels of a head: with 16 bits each, a row of the products is what a lane reads at once."""
THREADS, HEADS, ROWS = 256, 4, 2
"""Threads of a block, and the heads and rows of the batch of a warp."""


def serves(x: Tensor) -> bool:
    """Whether the kernel takes these vectors: heads of 8 channels in 16 bits, on a GPU that compiles it."""
    return x.dtype in DTYPES and x.shape[-1] == D and 0 < x.numel() < D << 31 and is_served(x)


def outer(k: Tensor, v: Tensor) -> Tensor:
    """products[i, j] = k[i] v[j], (heads, length, batch, d, d), of vectors (batch, length, heads, d)."""
    made = _new_products(k)
    _combine(x=k, y=v, made=made)
    return made


def contract(q: Tensor, products: Tensor) -> Tensor:
    """y[j] = sum over i of q[i] products[i, j]."""
    columns = _new_vectors(q)
    _combine(x=q, products=products, columns=columns)
    return columns


def gradients_of_outer(dproducts: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Those of k and v."""
    rows, columns = _new_vectors(k), _new_vectors(v)
    _combine(x=k, y=v, products=dproducts, rows=rows, columns=columns)
    return rows, columns


def gradients_of_contract(dy: Tensor, q: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """Those of q and the products."""
    rows, made = _new_vectors(q), _new_products(q)
    _combine(x=q, y=dy, products=products, rows=rows, made=made)
    return rows, made


def _new_vectors(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _new_products(like: Tensor) -> Tensor:
    batch, length, heads, d = like.shape
    return like.new_empty(heads, length, batch, d, d)


def _combine(x: Tensor, y: Tensor | None = None, **dense: Tensor) -> None:
    """One pass: x and y are vectors, and what is to be read or written are the fields of the kernel."""
    batch, length, heads, _ = x.shape
    call = Call(LAYOUT, x)
    call.set(batch=batch, length=length, heads=heads)
    call.strided(**{name: in_pieces(t) for name, t in (("x", x), ("y", y)) if t is not None})
    call.dense(**dense)
    n_warps = -(-batch // ROWS) * -(-heads // HEADS) * length
    call.launch(variant(x.dtype), -(-n_warps // (THREADS // 32)), THREADS, early=True)


@cache
def variant(dtype: torch.dtype) -> nvrtc.Variant:
    source = nvrtc.source(Path(__file__).parent / "head_products.cu")
    return nvrtc.Variant(source, "combine", (("DTYPE", nvrtc.DTYPES[dtype]),))


def variants() -> list[nvrtc.Variant]:
    """Every compilation that some call on some GPU needs."""
    return [variant(dtype) for dtype in DTYPES]
