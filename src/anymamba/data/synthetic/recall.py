"""Multi-query associative recall (MQAR): a row has pairs of keys and values, then each key once more as a query.

A row of `length` tokens begins with n_pairs keys, each followed by its value. The keys are distinct and drawn from the
first half of the vocabulary without 0; the values are distinct and drawn from the second half. The rest is filler, in
which each key of the row occurs once more, and the label there is its value. No other position has a label. The queries
are at every second position after the pairs: each key gets one, at a distance d = 1, 2, ... drawn without replacement
with weights d^(a - 1), so near positions are commoner.

Filler is 0, or drawn from the whole vocabulary; then a key may also occur there without a label.

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
    """Number of pairs of key and value in a row, and of queries."""
    length: int
    """Number of tokens in a row."""
    vocab_size: int = 8192
    power: float = 0.01
    """a: the distance of a query has the weight d^(a - 1)."""
    random_filler: bool = False
    """Draw filler from the whole vocabulary; else it is 0."""

    def __post_init__(self) -> None:
        require_sizes(n_pairs=self.n_pairs)
        if self.length % 2 or self.length < 4 * self.n_pairs:
            raise ValueError(
                f"length must be even and at least 4 n_pairs = {4 * self.n_pairs}, so that the pairs and their queries "
                f"fit, got {self.length}; raise it or lower n_pairs"
            )
        if len(self.keys) < self.n_pairs:
            raise ValueError(
                f"vocab_size must be at least 2 n_pairs + 2 = {2 * self.n_pairs + 2}, so that the keys of a row are "
                f"distinct, got {self.vocab_size}; raise it or lower n_pairs"
            )

    @property
    def keys(self) -> range:
        """Ids that can be keys."""
        return range(1, self.vocab_size // 2)

    @property
    def values(self) -> range:
        """Ids that can be values."""
        return range(self.vocab_size // 2, self.vocab_size)

    @property
    def n_places(self) -> int:
        """Number of positions for queries: every second position after the pairs."""
        return (self.length - 2 * self.n_pairs) // 2


def recall_batch(task: Recall, generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both (rows, length), on the generator's device; the labels are -100 except at the
    queries."""
    device = generator.device
    keys = different(task.keys, task.n_pairs, generator, rows)
    values = different(task.values, task.n_pairs, generator, rows)
    where = 2 * task.n_pairs + 2 * places(task, generator, rows)
    ids = torch.full((rows, task.length), FILLER, device=device)
    if task.random_filler:
        ids = torch.randint(task.vocab_size, (rows, task.length), generator=generator, device=device)
    ids[:, : 2 * task.n_pairs] = torch.stack([keys, values], dim=2).flatten(1)
    ids.scatter_(1, where, keys)
    return ids, torch.full((rows, task.length), NO_LABEL, device=device).scatter_(1, where, values)


def different(tokens: range, count: int, generator: torch.Generator, rows: int) -> Tensor:
    """`count` distinct tokens for each row, in random order: (rows, count)."""
    draws = torch.rand((rows, len(tokens)), generator=generator, device=generator.device)
    return tokens.start + draws.topk(count, dim=1).indices


def places(task: Recall, generator: torch.Generator, rows: int) -> Tensor:
    """The place of each key's query, counted from 0: (rows, n_pairs), distinct within a row."""
    distances = torch.arange(1, task.n_places + 1, dtype=torch.float64, device=generator.device)
    # a multinomial draw without replacement, which does not wait for a GPU
    waits = torch.empty((rows, task.n_places), dtype=torch.float64, device=generator.device)
    waits.exponential_(generator=generator)
    return (distances ** (task.power - 1) / waits).topk(task.n_pairs, dim=1).indices


def guess_accuracy(task: Recall) -> float:
    """Expected accuracy of a uniform guess among all values."""
    return 1 / len(task.values)


def bag_accuracy(task: Recall) -> float:
    """Expected accuracy of guessing among the row's values without using the keys."""
    return 1 / task.n_pairs
