"""The arguments of every backend of the product of packed weights: the op's tensors and options in one record."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float, UInt8
from torch import Tensor


class PackedLinearArguments(NamedTuple):
    """Tensors and options of `packed_linear`."""

    x: Float[Tensor, "rows n_in"]
    data: UInt8[Tensor, "n_out row_bytes"]
    bias: Float[Tensor, " n_out"] | None
    format: str

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:3]

    @property
    def options(self) -> tuple[Any, ...]:
        return self[3:]
