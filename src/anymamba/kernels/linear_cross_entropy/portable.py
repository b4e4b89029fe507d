"""The cross-entropy of a linear map in torch's own operations, differentiable in every mode and to any order."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from anymamba.kernels.linear_cross_entropy.arguments import IGNORED, LossArguments

NAME = "portable"
TRANSPARENT = frozenset({"forward"})


def unavailable(device_type: str) -> str | None:
    return None


def refuses(arguments: LossArguments) -> str | None:
    return None


def description() -> str:
    return "torch's own operations"


def forward(a: LossArguments, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, an empty tensor in place of a second output, and None, because nothing is saved."""
    x, weight = (t if a.dtype is None else t.to(a.dtype) for t in (a.x, a.weight))
    logits = F.linear(x, weight)
    loss = F.cross_entropy(logits.to(a.loss_dtype), a.labels, ignore_index=IGNORED, reduction="sum")
    return loss, loss.new_empty(0), None
