"""The product of packed weights in C++ (csrc/products.cpp), and weights from float32 to a format and back."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from anymamba.kernels.packed_linear.arguments import PackedLinearArguments
from anymamba.kernels.packed_linear.formats import FORMATS, PackedWeight, row_bytes
from anymamba.runtimes import native

NAME = "cpu"
TRANSPARENT: frozenset[str] = frozenset()


def unavailable(device_type: str) -> str | None:
    return native.unavailable(device_type)


def refuses(arguments: PackedLinearArguments) -> str | None:
    return None


def description() -> str:
    return f"compiled C++: {native.description()}"


def forward(a: PackedLinearArguments) -> Tensor:
    """y (rows, n_out) in float32. Each sum has one order, so a row has the same bits in any batch."""
    x = a.x.float()
    if x.stride(1) != 1:
        x = x.contiguous()
    bias = None if a.bias is None else a.bias.float().contiguous()
    weight = a.data if a.data.stride(1) == 1 else a.data.contiguous()
    y = native.empty(x, x.shape[0], weight.shape[0])
    if y.numel():
        address = 0 if bias is None else native.address("bias", bias)
        native.module().packed_linear(
            _packed(weight, a.format, x.shape[1]),
            native.address("x", x),
            x.stride(0),
            x.shape[0],
            address,
            native.address("y", y),
            torch.get_num_threads(),
        )
    return y


def pack(matrix: Float[Tensor, "n_out n_in"], format: str) -> PackedWeight:
    """The matrix in a format that can be written."""
    matrix = matrix.detach().float().contiguous()
    n_out, n_in = matrix.shape
    data = torch.empty(n_out, row_bytes(format, n_in), dtype=torch.uint8)
    place = native.address("matrix", matrix)
    native.module().pack_weights(_packed(data, format, n_in), place, torch.get_num_threads())
    return PackedWeight(data, format, n_in)


def unpack(weight: PackedWeight) -> Float[Tensor, "n_out n_in"]:
    """The matrix in float32."""
    data = weight.data if weight.data.stride(1) == 1 else weight.data.contiguous()
    matrix = torch.empty(weight.shape)
    place = native.address("matrix", matrix)
    native.module().unpack_weights(_packed(data, weight.format, weight.n_in), place, torch.get_num_threads())
    return matrix


def _packed(data: Tensor, format: str, n_in: int) -> Any:
    """The compiled module's record of a packed matrix."""
    place = native.address("weight", data)
    return native.module().Packed(place, FORMATS[format].code, data.shape[0], n_in, data.stride(0))
