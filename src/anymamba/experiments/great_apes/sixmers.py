"""The baseline: logistic regression on the frequencies of 6-mers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.lab.genomes import A_ID

K = 6


def frequencies(ids: Tensor) -> Tensor:
    """The share of each 6-mer in windows: (windows, 4^6) in float32.

    Args:
        ids: (windows, length) ids of A, C, G and T.
    """
    codes = ids.long() - A_ID
    mers = sum(codes[:, i : codes.shape[1] - K + 1 + i] * 4**i for i in range(K))
    assert isinstance(mers, Tensor)
    counts = torch.zeros(len(ids), 4**K, device=ids.device)
    return counts.scatter_add_(1, mers, torch.ones_like(mers, dtype=counts.dtype)) / mers.shape[1]


@dataclass(frozen=True)
class Regression:
    """A linear map of standardised features."""

    weight: Tensor
    """(classes, features + 1); the last column is the intercept."""
    mean: Tensor
    scale: Tensor
    penalty: float
    loss: float
    """On the valid windows."""

    def scores(self, features: Tensor) -> Tensor:
        """The logits of the classes."""
        return affine((features - self.mean) / self.scale, self.weight)


def fitted(
    train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor], penalties: Sequence[float], n_classes: int
) -> Regression:
    """The regression with the lowest loss on the valid windows.

    Args:
        train, valid: (windows, features) and (windows,) classes.
        penalties: weights of the squared norm that are tried; the loss is a mean over windows.
    """
    x, y = train
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    x = (x - mean) / scale
    weight, found = x.new_zeros(n_classes, x.shape[1] + 1), []
    for penalty in sorted(penalties, reverse=True):  # each begins from the one before
        weight = minimised(x, y, weight, penalty)
        loss = F.cross_entropy(affine((valid[0] - mean) / scale, weight), valid[1]).item()
        found.append(Regression(weight, mean, scale, penalty, loss))
    return min(found, key=lambda one: one.loss)


def affine(x: Tensor, weight: Tensor) -> Tensor:
    """The map of features to logits."""
    return F.linear(x, weight[:, :-1], weight[:, -1])


def minimised(x: Tensor, y: Tensor, start: Tensor, penalty: float) -> Tensor:
    """The weights with the lowest mean loss and penalty; the intercept has no penalty."""
    weight = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(affine(x, weight), y) + penalty * weight[:, :-1].square().sum()
        value.backward()
        return value

    solver.step(loss)
    return weight.detach()
