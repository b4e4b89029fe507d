"""The weights of a model as the kernels of a step take them."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, UInt8
from torch import Tensor


class Matrix(NamedTuple):
    """A matrix in float32 or bfloat16, its columns padded with zeros to a multiple of 8."""

    weight: Float[Tensor, "n_out padded_n_in"]
    bias: Float[Tensor, " n_out"] | None
    n_in: int


class Packed(NamedTuple):
    """A matrix in blocks of integers, as in a GGUF file, whose rows are multiples of 16 bytes."""

    data: UInt8[Tensor, "n_out row_bytes"]
    bias: Float[Tensor, " n_out"] | None
    n_in: int
    format: str
    """One of call.PACKED."""


class Norm(NamedTuple):
    """A norm with float32 vectors, padded with zeros like the rows that it norms."""

    weight: Float[Tensor, " padded"] | None
    bias: Float[Tensor, " padded"] | None
    eps: float
    subtract_mean: bool


class Short(NamedTuple):
    """The short convolution of a layer, in float32."""

    weight: Float[Tensor, "taps d_inner"]
    bias: Float[Tensor, " d_inner"] | None


class Recurrence(NamedTuple):
    """The recurrence of a layer, in float32 but for dt_proj."""

    dt_proj: Matrix | None
    A: Float[Tensor, "d_inner d_state"]
    D: Float[Tensor, " d_inner"]
    delta_bias: Float[Tensor, " d_inner"]
    B: Float[Tensor, "d_inner d_state"] | None
    """Constant; None where the input gives it."""
    C: Float[Tensor, "d_inner d_state"] | None
    zoh: bool
    norms: tuple[Tensor | None, Tensor | None, Tensor | None] | None
    """The weights of the inner norms of dt, B and C, in float32; None means no norms."""
    eps: float
