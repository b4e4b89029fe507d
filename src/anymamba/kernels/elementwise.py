"""Elementwise functions whose results do not depend, bit for bit, on how threads share the elements.

torch's own sigmoid, silu and softplus compute the last elements of each thread's part differently from the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SOFTPLUS_THRESHOLD = 20.0  # above which softplus is the identity, as in torch
SERIES = range(14)  # powers in the series of (exp(x) - 1) / x for |x| < 1/2: exact to float64


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)); not for autograd."""
    return torch.neg(x).exp_().add_(1).reciprocal_()


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)); not for autograd."""
    return sigmoid(x).mul_(x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exactly 0 at -inf and exactly x above the threshold; not for autograd."""
    small = x.clamp(max=SOFTPLUS_THRESHOLD).exp_().log1p_()
    return torch.maximum(small, x, out=small)  # softplus(x) is never below x


AT_ONCE = 1 << 24  # numbers that `sum_of_steps` converts at a time


def sum_of_steps(delta: Tensor, bias: Tensor | None, is_softplus: bool, dtype: torch.dtype) -> Tensor:
    """The sum over the length of softplus(delta + bias), or of delta + bias: (b, d) from (b, l, d)."""
    total = delta.new_zeros(delta.shape[0], delta.shape[2], dtype=dtype)
    n_tokens = max(1, AT_ONCE // max(1, total.numel()))
    for first in range(0, delta.shape[1], n_tokens):
        raw = delta[:, first : first + n_tokens].to(dtype)
        raw = raw if bias is None else raw + bias.to(dtype)
        total += (softplus(raw) if is_softplus else raw).sum(1)
    return total


def expm1_ratio(x: Tensor) -> Tensor:
    """(exp(x) - 1) / x and its limit 1 at 0, by a series near zero."""
    near = x.abs() < 0.5
    large = torch.where(near, 1, x)
    quotient = (torch.exp(large) - 1 if x.is_complex() else torch.expm1(large)) / large
    return torch.where(near, _series(torch.where(near, x, 0), [1 / math.factorial(k + 1) for k in SERIES]), quotient)


def expm1_ratio_derivative(x: Tensor, ratio: Tensor) -> Tensor:
    """Derivative of `expm1_ratio`, (exp(x) - ratio) / x, by a series near zero."""
    near = x.abs() < 0.5
    large = torch.where(near, 1, x)
    series = _series(torch.where(near, x, 0), [(k + 1) / math.factorial(k + 2) for k in SERIES])
    return torch.where(near, series, (torch.exp(large) - ratio) / large)


def _series(x: Tensor, coefficients: list[float]) -> Tensor:
    """sum over k of coefficients[k] x^k."""
    value = x * coefficients[-1]
    for coefficient in reversed(coefficients[1:-1]):
        value = value.add_(coefficient) * x
    return value.add_(coefficients[0])


def conj(x: Tensor) -> Tensor:
    """The conjugate; a real tensor is returned unchanged."""
    return torch.conj_physical(x) if x.is_complex() else x


def real_part(x: Tensor) -> Tensor:
    """The real part; a real tensor is returned unchanged."""
    return x.real if x.is_complex() else x
