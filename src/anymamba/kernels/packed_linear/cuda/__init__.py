"""The product of packed weights on NVIDIA GPUs: `products.cu` for a few rows, torch's product of unpacked weights for
more.

x is rounded to bfloat16 and sums are float32. Weights in blocks stay as they lie in a GGUF file; where there are many
rows, one matrix at a time is unpacked to bfloat16.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from anymamba.kernels.packed_linear.arguments import PackedLinearArguments
from anymamba.kernels.packed_linear.formats import FORMATS, PackedWeight
from anymamba.runtimes import launching, nvrtc

NAME = "cuda"
TRANSPARENT: frozenset[str] = frozenset()

BLOCKS = tuple(name for name, format in FORMATS.items() if format.columns > 1)
"""Formats with blocks, which the kernels read."""
TENSORS = {"x": 2, "y": 2}
"""Fields that are a struct Matrix, and their dimensions."""
FIELDS = ("weight", "bias", "rows", "n_in", "n_out", "row_bytes")
LAYOUT = launching.layout(TENSORS, FIELDS)

MOST_ROWS = 32
"""Of the kernels; with more, unpacking the weight costs less than reading x for every 16 outputs."""
OUTPUTS, STAGES, GROUP, MOST_WARPS, UNPACKING_THREADS = 16, 3, 32, 16, 256
"""See products.cu."""


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve tensors on a device, in words; None where it can."""
    return "it serves tensors on an NVIDIA GPU" if device_type != "cuda" else nvrtc.reason()


def refuses(arguments: PackedLinearArguments) -> str | None:
    if arguments.format not in (*BLOCKS, "bfloat16"):
        return f"it serves weights in bfloat16 and {', '.join(BLOCKS)}, got {arguments.format}"
    return refuses_gpu(arguments.data)


def refuses_gpu(data: Tensor) -> str | None:
    """Why it does not serve the GPU of a tensor, in words."""
    return nvrtc.refuses_gpu(data.device.index) if data.device.type == "cuda" else None


def description() -> str:
    return f"CUDA C++: {nvrtc.description()}"


def variants() -> list[nvrtc.Variant]:
    """Every compilation that some call on some GPU needs."""
    return [_variant(format, "unpack") for format in BLOCKS]


@cache
def _variant(format: str, kernel: str) -> nvrtc.Variant:
    source = nvrtc.source(Path(__file__).parent / "products.cu")
    return nvrtc.Variant(source, kernel, (("FORMAT", FORMATS[format].code),))


def forward(a: PackedLinearArguments) -> Tensor:
    """y (rows, n_out): bfloat16 if x is, else float32. A row has the same bits in any batch of up to MOST_ROWS."""
    dtype = torch.bfloat16 if a.x.dtype == torch.bfloat16 else torch.float32
    if a.format in BLOCKS and a.x.shape[0] <= MOST_ROWS:
        return _few_rows(a, dtype)
    data = a.data.contiguous()
    weight = data.view(torch.bfloat16) if a.format not in BLOCKS else _unpack(data, a.format, torch.bfloat16)
    return _product(a.x.bfloat16(), weight, a.bias, dtype)


def unpack(weight: PackedWeight) -> Float[Tensor, "n_out n_in"]:
    """The matrix in float32, of a weight in blocks."""
    return _unpack(weight.data, weight.format, torch.float32)


def _few_rows(a: PackedLinearArguments, dtype: torch.dtype) -> Tensor:
    (rows, n_in), n_out = a.x.shape, a.data.shape[0]
    y = a.x.new_empty(rows, n_out, dtype=dtype)
    x = a.x.to(dtype)
    call = _start(a.data, n_in)
    call.strided(x=x if launching.aligned(x, 4) else x.contiguous().clone(), y=y)
    call.dense(bias=None if a.bias is None else a.bias.float())
    call.set(rows=rows)
    tiles = 8 if rows <= 8 else 16 if rows <= 16 else 32
    n_warps, shared = _warps(a.format, n_in, tiles)
    name = f"multiply_{tiles}{'_short' if dtype == torch.bfloat16 else ''}"
    n_blocks = -(-n_out // OUTPUTS) if rows else 0
    call.launch(_variant(a.format, name), n_blocks, 32 * n_warps, shared, early=True)
    return y


@cache
def _warps(format: str, n_in: int, rows: int) -> tuple[int, int]:
    """The warps of a block, by the shape alone as they decide on the order of sums, and its shared memory."""
    _, columns, n_bytes, _ = FORMATS[format]
    groups = 4 if columns == GROUP and n_bytes > GROUP else 8
    n_warps = max(1, min(MOST_WARPS if n_in >= 4096 else 8, -(-n_in // (groups * GROUP))))
    pieces = (groups * GROUP // columns * n_bytes + 14 + 15) // 16
    stages = STAGES * OUTPUTS * (pieces | 1) * 16
    return n_warps, n_warps * max(stages, 4 * rows * OUTPUTS)


def _unpack(data: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    n_in = data.shape[1] // FORMATS[format].n_bytes * FORMATS[format].columns
    matrix = data.new_empty(data.shape[0], n_in, dtype=dtype)
    call = _start(data, n_in)
    call.strided(y=matrix)
    call.launch(_variant(format, "unpack"), -(-matrix.numel() // (8 * UNPACKING_THREADS)), UNPACKING_THREADS)
    return matrix


def _start(data: Tensor, n_in: int) -> launching.Call:
    call = launching.Call(LAYOUT, data)
    call.dense(weight=data)
    call.set(n_in=n_in, n_out=data.shape[0], row_bytes=data.shape[1])
    return call


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x weight^T + bias of bfloat16 matrices, summed in float32."""
    if dtype == torch.bfloat16 or not x.is_cuda:
        y = torch.nn.functional.linear(x.to(dtype), weight.to(dtype))
    else:
        y = torch.mm(x, weight.T, out_dtype=dtype)
    return y if bias is None else y.add_(bias)
