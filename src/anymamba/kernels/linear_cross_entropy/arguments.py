"""The arguments of every backend of the cross-entropy of a linear map: the op's tensors and options in one record."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

IGNORED = -100
"""The label of tokens that are not counted."""

Hidden = Float[Tensor, "tokens d_model"]
"""The inputs of the linear map."""


class LossArguments(NamedTuple):
    """Tensors and options of `linear_cross_entropy`, in the order in which torch's registered op takes them."""

    x: Hidden
    weight: Float[Tensor, "vocab d_model"]
    labels: Int[Tensor, " tokens"]
    dtype: torch.dtype | None = None
    """The dtype of the products; None means that of x and weight, which autocast may change."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:3]

    @property
    def options(self) -> tuple[Any, ...]:
        return self[3:]

    @property
    def logits_dtype(self) -> torch.dtype:
        return self.dtype or torch.promote_types(self.x.dtype, self.weight.dtype)

    @property
    def loss_dtype(self) -> torch.dtype:
        """The dtype of the loss and of sums: float64 if the logits are float64, otherwise float32."""
        return torch.promote_types(self.logits_dtype, torch.float32)
