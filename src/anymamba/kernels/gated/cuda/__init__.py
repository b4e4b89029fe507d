"""Products with a gate in CUDA C++ for NVIDIA GPUs: one pass over memory, also over parts of wider tensors.

torch's operations on parts of a tensor do not read whole vectors, and a copy puts the gradients of parts together.
Numbers are computed in float32 and rounded once. Nothing here waits for the GPU.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from anymamba.runtimes import nvrtc
from anymamba.runtimes.launching import Call, in_pieces, is_served, layout, numbers_of_piece, resolved
from anymamba.runtimes.replaying import replayed

TENSORS = {"x": 2, "g": 2, "y": 2, "dy": 2, "dx": 2, "dg": 2}
"""Fields that are a struct of address, strides and dtype, and their dimensions."""
FIELDS = ("rows", "pieces", "function")
LAYOUT = layout(TENSORS, FIELDS)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FUNCTIONS = {"identity": 0, "silu": 1, "gelu": 2, "sigmoid": 3}
"""Of the gate; gelu in its tanh form."""
THREADS, AT_ONCE = 256, 2
"""Threads of a block, and pieces of 16 bytes of a thread."""


def serves(x: Tensor, g: Tensor) -> bool:
    """Whether the kernels take these: one dtype, rows of whole pieces of 16 bytes, on a GPU that compiles them."""
    if x.dtype not in DTYPES or (g.dtype, g.device, g.shape) != (x.dtype, x.device, x.shape):
        return False
    if not 0 < x.numel() < 1 << 33 or x.shape[-1] % numbers_of_piece(x):
        return False
    return is_served(x)


def multiply(x: Tensor, g: Tensor, function: str) -> Tensor:
    """x f(g) of two tensors (..., width)."""
    x, g = resolved(x), resolved(g)
    return replayed("gate", (x, g), (function,), lambda: (_multiply(x, g, function),))[0]


def gradients(dy: Tensor, x: Tensor, g: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """Those of x and g."""
    dy, x, g = resolved(dy), resolved(x), resolved(g)
    dx, dg = replayed("gradients of a gate", (dy, x, g), (function,), lambda: _gradients(dy, x, g, function))
    return dx, dg


def gradient_of_halves(dy: Tensor, both: Tensor, function: str) -> Tensor:
    """The same side by side, (..., 2 width), where x and g are."""
    dy, both = resolved(dy), resolved(both)
    return replayed("gradient of halves", (dy, both), (function,), lambda: (_of_halves(dy, both, function),))[0]


def _multiply(x: Tensor, g: Tensor, function: str) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch("gate", function, x=x, g=g, y=y)
    return y


def _gradients(dy: Tensor, x: Tensor, g: Tensor, function: str) -> tuple[Tensor, Tensor]:
    dx, dg = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, g))
    _launch("gate_gradients", function, x=x, g=g, dy=dy, dx=dx, dg=dg)
    return dx, dg


def _of_halves(dy: Tensor, both: Tensor, function: str) -> Tensor:
    """Passes first halves to the kernel, which finds the second ones: a plan knows where tensors begin, not parts."""
    whole, width = torch.empty_like(both, memory_format=torch.contiguous_format), dy.shape[-1]
    x, dx = (_rows(t)[:, :width] for t in (both, whole))
    _launch("gate_gradients", function, x=x, dy=dy, dx=dx)
    return whole


def _launch(kernel: str, function: str, **tensors: Tensor) -> None:
    x = tensors["x"]
    call, count = Call(LAYOUT, x), numbers_of_piece(x)
    pieces = x.shape[-1] // count
    call.set(rows=x.numel() // x.shape[-1], pieces=pieces, function=FUNCTIONS[function])
    call.strided(**{name: _rows(t) for name, t in tensors.items()})
    n_blocks = -(-(x.numel() // count) // (THREADS * AT_ONCE))
    call.launch(variant(x.dtype, kernel), n_blocks, THREADS, early=True)


def _rows(t: Tensor) -> Tensor:
    """(rows, width) that can be read 16 bytes at a time; what is to be written is already so and is not copied."""
    return in_pieces(t.flatten(0, -2) if t.ndim > 1 else t[None])


@cache
def variant(dtype: torch.dtype, kernel: str) -> nvrtc.Variant:
    source = nvrtc.source(Path(__file__).parent / "gated.cu")
    return nvrtc.Variant(source, kernel, (("DTYPE", nvrtc.DTYPES[dtype]),))


def variants() -> list[nvrtc.Variant]:
    """Every compilation that some call on some GPU needs."""
    return [variant(dtype, "gate") for dtype in DTYPES]
