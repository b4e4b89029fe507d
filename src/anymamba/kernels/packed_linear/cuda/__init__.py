"""The product of packed weights on NVIDIA GPUs: `products.cu` for a few rows, torch's product of unpacked weights for
more.

x is rounded to bfloat16 and sums are float32. Weights in blocks stay as they lie in a GGUF file; where there are many
rows, one matrix at a time is unpacked to bfloat16.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

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
FIELDS = ("weight", "bias", "rows", "n_in", "n_out", "row_bytes", "x_stride")
LAYOUT = launching.layout(TENSORS, FIELDS)

MOST_ROWS = 16
"""Of the kernels; for more, unpacking the weight takes less time than what it saves."""
HERE = Path(__file__).parent
OUTPUTS, STAGES, GROUP, UNPACKING_THREADS = 16, 2, 32, 256
"""See products.cuh and products.cu."""
MOST_WARPS, FEW_WARPS, MANY_OUTPUTS = 16, 8, 5000
"""Of a block; with many outputs there are enough blocks of few warps."""
WARPS_OF_MULTIPROCESSOR = 32


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
    aligned = [_variant(format, "unpack", 256) for format in BLOCKS]
    return aligned + [_variant(format, "unpack", 32) for format in BLOCKS if FORMATS[format].columns == GROUP]


@cache
def _variant(format: str, kernel: str, n_in: int) -> nvrtc.Variant:
    return nvrtc.Variant(nvrtc.source(HERE / "products.cu"), kernel, options(format, n_in))


def options(format: str, n_in: int) -> tuple[tuple[str, int], ...]:
    """What products.cuh needs."""
    return ("FORMAT", FORMATS[format].code), ("ALIGNED", int(is_aligned(format, n_in)))


def is_aligned(format: str, n_in: int) -> bool:
    """Whether rows of a weight in blocks of 32 columns are multiples of 16 bytes."""
    return FORMATS[format].columns == GROUP and n_in % (8 * GROUP) == 0


def forward(a: PackedLinearArguments) -> Tensor:
    """y (rows, n_out): bfloat16 if x is, else float32. A row has the same bits in any batch that the kernels serve."""
    dtype = torch.bfloat16 if a.x.dtype == torch.bfloat16 else torch.float32
    if a.format in BLOCKS and a.x.shape[0] <= MOST_ROWS:
        launch = launch_of(a.format, *a.x.shape, a.data.shape[0])
        if launch.shared <= nvrtc.device(a.x.device.index or 0).shared_of_block:
            return _few_rows(a, dtype, launch)
    data = a.data.contiguous()
    weight = data.view(torch.bfloat16) if a.format not in BLOCKS else _unpack(data, a.format, torch.bfloat16)
    return _product(a.x.bfloat16(), weight, a.bias, dtype)


def unpack(weight: PackedWeight) -> Float[Tensor, "n_out n_in"]:
    """The matrix in float32, of a weight in blocks."""
    return _unpack(weight.data, weight.format, torch.float32)


class Launch(NamedTuple):
    """How a product is launched. The warps follow from the shape of the weight alone: they decide on the order of
    sums."""

    n_warps: int
    tiles: int
    """Rows that a kernel is made for."""
    x_stride: int
    """Bytes of a row of x in shared memory."""
    shared: int
    """Bytes of shared memory."""


@cache
def launch_of(format: str, rows: int, n_in: int, n_out: int) -> Launch:
    """How a product is launched."""
    _, columns, n_bytes, _ = FORMATS[format]
    aligned = is_aligned(format, n_in)
    groups = 4 if columns == GROUP and n_bytes > GROUP and not aligned else 8
    n_chunks = -(-n_in // (groups * GROUP))
    most = FEW_WARPS if n_out >= MANY_OUTPUTS else MOST_WARPS
    n_warps = max(1, -(-n_chunks // -(-n_chunks // most)))
    pieces = (groups * GROUP // columns * n_bytes + (0 if aligned else 14) + 15) // 16
    tiles, x_stride = 8 if rows <= 8 else 16, 2 * n_in + (0 if n_in // GROUP % 2 else 64)  # neighbours: other banks
    of_warp = STAGES * OUTPUTS * (pieces | 1) * 16 + 4 * tiles * OUTPUTS
    return Launch(n_warps, tiles, x_stride, rows * x_stride + n_warps * of_warp + 16)


def _few_rows(a: PackedLinearArguments, dtype: torch.dtype, launch: Launch) -> Tensor:
    (rows, n_in), n_out = a.x.shape, a.data.shape[0]
    y = a.x.new_empty(rows, n_out, dtype=dtype)
    if y.numel() == 0:
        return y
    x = a.x.to(dtype)
    call = _start(a.data, n_in)
    call.strided(x=x if launching.aligned(x, 4) else x.contiguous().clone(), y=y)
    call.dense(bias=None if a.bias is None else a.bias.float())
    call.set(rows=rows, x_stride=launch.x_stride)
    name = f"multiply_{launch.tiles}{'_short' if dtype == torch.bfloat16 else ''}"
    n_blocks = blocks_of(launch, n_out, nvrtc.device(a.x.device.index or 0))
    call.launch(_variant(a.format, name, n_in), n_blocks, 32 * launch.n_warps, launch.shared, early=True)
    return y


def blocks_of(launch: Launch, n_out: int, device: nvrtc.Device) -> int:
    """Blocks of a product: as many as run at once, if there is work for them."""
    most = max(1, WARPS_OF_MULTIPROCESSOR // launch.n_warps)
    places = device.n_multiprocessors * min(most, device.shared_of_multiprocessor // (launch.shared + 1024))
    return min(-(-n_out // OUTPUTS), max(1, places))


def _unpack(data: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    n_in = data.shape[1] // FORMATS[format].n_bytes * FORMATS[format].columns
    matrix = data.new_empty(data.shape[0], n_in, dtype=dtype)
    call = _start(data, n_in)
    call.strided(y=matrix)
    call.launch(_variant(format, "unpack", n_in), -(-matrix.numel() // (8 * UNPACKING_THREADS)), UNPACKING_THREADS)
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
