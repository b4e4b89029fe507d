"""The arguments of every backend of the norm of a sum: the op's tensors and options in one record."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "... size"]
"""x, the residual and the results."""


class NormArguments(NamedTuple):
    """Tensors and options of `add_norm`, in the order in which torch's registered op takes them."""

    x: Rows
    residual: Rows | None = None
    weight: Float[Tensor, " size"] | None = None
    bias: Float[Tensor, " size"] | None = None
    eps: float = 1e-5
    subtract_mean: bool = False
    wanted_dtype: torch.dtype | None = None
    """The dtype of y; None means that of the weight, or of x without a weight."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:4]

    @property
    def options(self) -> tuple[Any, ...]:
        return self[4:]

    @property
    def size(self) -> int:
        return self.x.shape[-1]

    @property
    def n_rows(self) -> int:
        return self.x.numel() // max(1, self.size)

    @property
    def total_dtype(self) -> torch.dtype:
        """The dtype of x + residual."""
        x, residual = self.x.dtype, self.residual
        return x if residual is None or residual.dtype == x else torch.promote_types(x, residual.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the norm is computed."""
        total = self.total_dtype
        return total if total == torch.float32 else torch.promote_types(total, torch.float32)

    def total_gradient(self, given: Tensor | None) -> Tensor:
        """The gradient of x + residual; zeros in place of None."""
        return self.x.new_zeros(self.x.shape, dtype=self.total_dtype) if given is None else given

    @property
    def y_dtype(self) -> torch.dtype:
        """The dtype in which y is returned."""
        return self.wanted_dtype or (self.x.dtype if self.weight is None else self.weight.dtype)
