"""The product of packed weights by its definition, unpack and multiply: the oracle of every backend."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from anymamba.kernels.packed_linear.arguments import PackedLinearArguments
from anymamba.kernels.packed_linear.formats import unpack

NAME = "reference"
TRANSPARENT = frozenset({"forward"})


def unavailable(device_type: str) -> str | None:
    return None


def refuses(arguments: PackedLinearArguments) -> str | None:
    return None


def description() -> str:
    return "unpacks the weights and multiplies: holds them in float32"


def forward(a: PackedLinearArguments) -> Tensor:
    """y (rows, n_out) in float32."""
    bias = None if a.bias is None else a.bias.float()
    return F.linear(a.x.float(), unpack(a.data, a.format), bias)
