"""Losses of many tokens in chunks, so that the logits of all tokens are never held at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anymamba.ops.recomputing import recomputed

MOST_LOGITS = 1 << 23
"""Most logits held at once: 32 MiB in float32."""


def sum_over_chunks(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "tokens d_model"],
    labels: Int[Tensor, " tokens"],
    vocab: int,
) -> Float[Tensor, ""]:
    """Sum loss_of(x, labels) over chunks of at most MOST_LOGITS logits. Several chunks are recomputed for backward.

    Args:
        loss_of: takes rows of x and their labels; returns a loss that is a sum over tokens.
        x: the inputs of the logits.
        labels: the labels of the tokens.
        vocab: the number of logits per token.
    """
    size = max(1, MOST_LOGITS // max(1, vocab))
    if x.shape[0] <= size:
        return loss_of(x, labels)
    chunks = zip(x.split(size), labels.split(size), strict=True)
    return torch.stack([recomputed(loss_of, *chunk) for chunk in chunks]).sum()
