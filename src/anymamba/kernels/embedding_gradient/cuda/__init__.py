"""The gradient of an embedding in CUDA C++ for NVIDIA GPUs, with the same bits each time.

torch's own kernel for float32 adds up with atomic operations where tokens are many, so its sums depend on which block
came first. Here tokens are sorted by id and every sum has one order. Nothing here waits for the GPU.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anymamba.runtimes import nvrtc
from anymamba.runtimes.launching import Call, aligned, is_served, layout, resolved

TENSORS = {"dy": 2}
"""Fields that are a struct of address, strides and dtype, and their dimensions."""
FIELDS = ("order", "ids", "heads", "tails", "sums", "tokens", "width", "n_chunks", "vectors", "aligned")
LAYOUT = layout(TENSORS, FIELDS)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
THREADS, WIDTH, CHUNK = 128, 4, 64
"""Threads of a block, numbers of a vector, and tokens whose vectors a thread adds up."""
MOST_IDS = 1 << 31
KEYS = ((1 << 8, torch.uint8), (1 << 15, torch.int16), (MOST_IDS, torch.int32))
"""Sizes of vocabularies, and the narrowest dtype of their ids: the time to sort grows with its bits."""


def serves(dy: Tensor) -> bool:
    """Whether the kernel takes this tensor: numbers of up to 4 bytes, on a GPU that compiles it."""
    return dy.dtype in DTYPES and dy.ndim > 0 and dy.numel() > 0 and is_served(dy)


def sums(dy: Float[Tensor, "*tokens width"], ids: Int[Tensor, "*tokens"], vocab: int) -> Float[Tensor, "vocab width"]:
    """The sums of the rows of `dy` that have an id, for each id, in float32.

    Args:
        dy: the gradient of the tokens' vectors.
        ids: from 0 to vocab - 1.
        vocab: the number of ids, at most MOST_IDS.
    """
    width = dy.shape[-1]
    dy = resolved(dy).reshape(-1, width)
    found, order = ids.reshape(-1).to(_key(vocab)).sort(stable=True)
    made = torch.zeros(vocab, width, dtype=torch.float32, device=dy.device)
    call = Call(LAYOUT, dy)
    n_chunks, vectors = -(-len(dy) // CHUNK), -(-width // WIDTH)
    call.strided(dy=dy)
    call.dense(order=order, ids=found.int(), sums=made)
    call.set(tokens=len(dy), width=width, n_chunks=n_chunks, vectors=vectors, aligned=aligned(dy, WIDTH))
    for name in ("heads", "tails"):
        call.scratch(name, n_chunks, vectors * WIDTH, dtype=torch.float32)
    for kernel in ("sum_runs", "join_runs"):
        call.launch(variant(kernel, dy.dtype), -(-n_chunks * vectors // THREADS), THREADS, early=True)
    return made


def _key(vocab: int) -> torch.dtype:
    return next(dtype for size, dtype in KEYS if vocab <= size)


@cache
def variant(kernel: str, dtype: torch.dtype) -> nvrtc.Variant:
    source = nvrtc.source(Path(__file__).parent / "embedding_gradient.cu")
    return nvrtc.Variant(source, kernel, (("DTYPE", nvrtc.DTYPES[dtype]),))


def variants() -> list[nvrtc.Variant]:
    """Every compilation that some call on some GPU needs."""
    return [variant("sum_runs", dtype) for dtype in DTYPES]
