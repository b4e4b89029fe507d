"""Copying: remember tokens among noise and repeat them in order.

A row has n_noise + 2 M tokens. First come M tokens to remember, drawn from 1 to A - 2, and n_noise times the noise
token 0. Then comes M times the marker A - 1; the answer at the i-th marker is the i-th token to remember.

- Selective copying: the tokens are at random positions among the noise, in order. A model has to find them by their
  content, which a time-invariant map cannot do.
- Plain copying: the tokens are the first M. A fixed delay of n_noise + M solves it.

Source: the copying data set of the S4 repository (`variable=True` for the selective one), which the authors of Mamba
(arXiv:2312.00752, section 4.1.1) say they used. So 14 of 16 symbols carry data.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import factorial

import torch
from torch import Tensor

from anymamba.base.sizes import require_at_least

NOISE = 0
NO_LABEL = -100


@dataclass(frozen=True)
class Copying:
    """Sizes of the task."""

    n_noise: int
    """Number of noise tokens in a row."""
    n_tokens: int
    """M: number of tokens to remember."""
    alphabet: int = 16
    """A: number of ids: the noise, the marker, and A - 2 symbols that carry data."""
    selective: bool = True
    """Put the tokens at random positions; else they come first."""

    def __post_init__(self) -> None:
        for name, least in (("n_noise", 0), ("n_tokens", 1), ("alphabet", 3)):
            require_at_least(name, getattr(self, name), least)

    @property
    def marker(self) -> int:
        """The id of the marker, at which the model must answer."""
        return self.alphabet - 1

    @property
    def n_symbols(self) -> int:
        """Number of symbols that carry data."""
        return self.alphabet - 2

    @property
    def length(self) -> int:
        """Number of tokens in a row."""
        return self.n_noise + 2 * self.n_tokens


def copying_batch(task: Copying, generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both (rows, length), on the generator's device; the labels are -100 except at the
    markers."""
    before = task.n_noise + task.n_tokens
    device = generator.device
    tokens = torch.randint(1, task.alphabet - 1, (rows, task.n_tokens), generator=generator, device=device)
    ids = torch.full((rows, task.length), NOISE, device=device)
    ids.scatter_(1, places(task, generator, rows), tokens)
    ids[:, before:] = task.marker
    labels = torch.full((rows, task.length), NO_LABEL, device=device)
    labels[:, before:] = tokens
    return ids, labels


def places(task: Copying, generator: torch.Generator, rows: int) -> Tensor:
    """Positions of the tokens in order, (rows, M): a random choice of those before the markers, or the first M."""
    if not task.selective:
        return torch.arange(task.n_tokens, device=generator.device).expand(rows, -1)
    draws = torch.rand((rows, task.n_noise + task.n_tokens), generator=generator, device=generator.device)
    return draws.topk(task.n_tokens, dim=1).indices.sort(dim=1).values


def guess_accuracy(task: Copying) -> float:
    """Expected accuracy of a uniform guess."""
    return 1 / task.n_symbols


def histogram_accuracy(task: Copying) -> float:
    """Expected accuracy of always answering with the most frequent token of the row.

    It is E[largest count] / M for M draws from n_symbols, computed exactly: of the n_symbols ^ M rows, M! [x^M] (sum of
    x^k / k! for k up to c) ^ n_symbols have no count above c.
    """
    M, rows = task.n_tokens, task.n_symbols**task.n_tokens
    at_most = [factorial(M) * power_coefficient(c, task.n_symbols, M) / rows for c in range(M)]
    return float(sum(1 - share for share in at_most) / M)


def power_coefficient(largest: int, power: int, degree: int) -> Fraction:
    """[x^degree] of (sum of x^k / k! for k from 0 to largest) ^ power."""
    factor = [Fraction(1, factorial(k)) for k in range(largest + 1)]
    product = [Fraction(1)] + [Fraction(0)] * degree
    for _ in range(power):
        product = [
            sum((factor[k] * product[n - k] for k in range(min(n, largest) + 1)), Fraction(0))
            for n in range(degree + 1)
        ]
    return product[degree]
