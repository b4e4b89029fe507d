"""Elementwise functions whose bits do not depend on how threads share the elements.

torch's own sigmoid, silu and softplus treat the last elements of each thread's part differently from the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

SOFTPLUS_THRESHOLD = 20.0  # above which softplus is the identity, as in torch


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return (torch.exp(-x) + 1).reciprocal()


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x))."""
    return x * sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exactly 0 at -inf."""
    return torch.where(x > SOFTPLUS_THRESHOLD, x, torch.exp(x.clamp(max=SOFTPLUS_THRESHOLD)).log1p())
