"""Multi-query associative recall (MQAR): keys with values come first, then keys are asked for, each once.

A row of `length` tokens begins with n_pairs keys, each followed by its value. The keys are different, drawn from the
first half of the vocabulary without 0; the values are different, drawn from the second half. The rest is filler, in
which every key of the row occurs once more, and the label there is its value. Behind the pairs the query of each key
has a place of its own among every second position, at a distance d = 1, 2, ... drawn with weights d^(a - 1), without
replacement: near places are commoner. No other position has a label.

Filler is 0, or drawn from the whole vocabulary: then a key may stand there without a label, too.

Source: Zoology (arXiv:2312.04927), section 4 and appendix: a = 0.01.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anymamba.base.sizes import require_sizes

FILLER = 0
NO_LABEL = -100


@dataclass(frozen=True)
class Recall:
    """Sizes of the task."""

    n_pairs: int
    """Keys with a value in a row, and queries."""
    length: int
    """Tokens in a row."""
    vocab_size: int = 8192
    power: float = 0.01
    """a: the distance of a query has the weight d^(a - 1)."""
    random_filler: bool = False
    """Filler is drawn from the whole vocabulary; else it is 0."""

    def __post_init__(self) -> None:
        require_sizes(n_pairs=self.n_pairs)
        if self.length % 2 or self.length < 4 * self.n_pairs:
            raise ValueError(
                f"length must be even and at least 4 n_pairs = {4 * self.n_pairs}, so that the pairs and the places of "
                f"their queries fit, got {self.length}; raise it or lower n_pairs"
            )
        if len(self.keys) < self.n_pairs:
            raise ValueError(
                f"vocab_size must be at least 2 n_pairs + 2 = {2 * self.n_pairs + 2}, so that the keys of a row are "
                f"different, got {self.vocab_size}; raise it or lower n_pairs"
            )

    @property
    def keys(self) -> range:
        """Tokens that a key may be."""
        return range(1, self.vocab_size // 2)

    @property
    def values(self) -> range:
        """Tokens that a value may be."""
        return range(self.vocab_size // 2, self.vocab_size)

    @property
    def n_places(self) -> int:
        """Places where a query may stand: every second position behind the pairs."""
        return (self.length - 2 * self.n_pairs) // 2


def recall_batch(task: Recall, generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both (rows, length); the labels are -100 but at the queries."""
    keys = different(task.keys, task.n_pairs, generator, rows)
    values = different(task.values, task.n_pairs, generator, rows)
    where = 2 * task.n_pairs + 2 * places(task, generator, rows)
    ids = torch.full((rows, task.length), FILLER)
    if task.random_filler:
        ids = torch.randint(task.vocab_size, (rows, task.length), generator=generator)
    ids[:, : 2 * task.n_pairs] = torch.stack([keys, values], dim=2).flatten(1)
    ids.scatter_(1, where, keys)
    return ids, torch.full((rows, task.length), NO_LABEL).scatter_(1, where, values)


def different(tokens: range, count: int, generator: torch.Generator, rows: int) -> Tensor:
    """That many different tokens for each row, in random order: (rows, count)."""
    return tokens.start + torch.rand((rows, len(tokens)), generator=generator).topk(count, dim=1).indices


def places(task: Recall, generator: torch.Generator, rows: int) -> Tensor:
    """The place of each key's query, counted from 0: (rows, n_pairs), no two alike in a row."""
    weights = torch.arange(1, task.n_places + 1, dtype=torch.float64) ** (task.power - 1)
    return torch.multinomial(weights.expand(rows, -1), task.n_pairs, replacement=False, generator=generator)


def guess_accuracy(task: Recall) -> float:
    """Expected accuracy of a guess among all values."""
    return 1 / len(task.values)


def bag_accuracy(task: Recall) -> float:
    """Expected accuracy of one that knows which values the row has, but not whose they are."""
    return 1 / task.n_pairs
