"""The cross-entropy of a linear map by its definition: the oracle of every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.kernels.linear_cross_entropy.arguments import IGNORED, LossArguments

NAME = "reference"
TRANSPARENT = frozenset({"forward"})


def unavailable(device_type: str) -> str | None:
    return None


def refuses(arguments: LossArguments) -> str | None:
    return None


def description() -> str:
    return "the definition in plain PyTorch: the oracle of the tests"


def forward(a: LossArguments, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, an empty tensor in place of a second output, and None, because nothing is saved."""
    x, weight = (t.to(a.logits_dtype) for t in (a.x, a.weight))
    logits = (x @ weight.T).to(a.loss_dtype)
    counted = a.labels != IGNORED
    chosen = logits.gather(1, torch.where(counted, a.labels, 0)[:, None])[:, 0]
    losses = torch.logsumexp(logits, 1) - chosen
    loss = torch.where(counted, losses, 0).sum()
    return loss, loss.new_empty(0), None
