"""Induction heads: recall the token that followed a special one.

A sequence consists of ordinary tokens, drawn uniformly and independently, and a trigger that occurs twice: once early
or anywhere, and once at the very end. The answer is the token after the first trigger:

    7 2 T 9 4 ... 0 3 T  ->  9

The ordinary ids are 0 ... n_tokens - 1 and the trigger is the id n_tokens. "Vocabulary 16" means 16 ordinary tokens, so
17 ids, and a guess is right once in 16.

Source: the task as in H3 (arXiv:2212.14052, section 3.1) and Mamba (arXiv:2312.00752, section 4.1.2). The latter does
not say where the first trigger is; both known choices are implemented.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anymamba.base.sizes import require_sizes

Placement = Literal["uniform", "first-ten"]
"""Position of the first trigger: any that leaves room for the answer, or one of the first ten."""
EARLY = 10


@dataclass(frozen=True)
class InductionSequences:
    """Sequences that are generated piece by piece, so that a million tokens are never in memory at once."""

    length: int
    n_tokens: int
    first: Tensor
    """(rows,) position of the first trigger."""
    answers: Tensor
    """(rows,) the token after it."""
    generator: torch.Generator
    """In the state from which the tokens are drawn."""

    def chunks(self, size: int) -> Iterator[Tensor]:
        """Yield the sequences in order, (rows, at most size) ids at a time. The size does not change the ids. Call it
        only once."""
        require_sizes(size=size)
        device = self.generator.device
        for start in range(0, self.length, size):
            end = min(start + size, self.length)
            # drawn one position after the other, so that the random numbers do not depend on the size
            drawn = torch.randint(
                self.n_tokens, (end - start, len(self.first)), generator=self.generator, device=device
            )
            ids = drawn.T.contiguous()
            trigger = torch.full_like(self.answers, self.n_tokens)
            for where, what in ((self.first, trigger), (self.first + 1, self.answers)):
                here, place = (where >= start) & (where < end), (where - start).clamp(0, end - start - 1)[:, None]
                ids.scatter_(1, place, torch.where(here[:, None], what[:, None], ids.gather(1, place)))
            if end == self.length:
                ids[:, -1] = self.n_tokens
            yield ids


def induction_sequences(
    generator: torch.Generator, rows: int, length: int, *, n_tokens: int = 16, placement: Placement = "uniform"
) -> InductionSequences:
    """Make sequences of `length` ids, including the last trigger but not the answer.

    Args:
        generator: source of all random numbers; its state advances while the sequences are read.
        length: at least 3: a trigger, the answer, a trigger.
        n_tokens: ordinary tokens; the trigger is the id n_tokens.
        placement: where to put the first trigger.
    Raises ValueError if a size is too small or the placement is unknown.
    """
    if length < 3:
        raise ValueError(f"length must be at least 3 (trigger, answer, trigger), got {length}")
    require_sizes(n_tokens=n_tokens, rows=rows)
    if placement not in ("uniform", "first-ten"):
        raise ValueError(f"placement must be uniform or first-ten, got {placement!r}")
    places = length - 2 if placement == "uniform" else min(EARLY, length - 2)
    first = torch.randint(places, (rows,), generator=generator, device=generator.device)
    answers = torch.randint(n_tokens, (rows,), generator=generator, device=generator.device)
    return InductionSequences(length, n_tokens, first, answers, generator)


def induction_batch(
    generator: torch.Generator, rows: int, length: int, *, n_tokens: int = 16, placement: Placement = "uniform"
) -> tuple[Tensor, Tensor]:
    """Whole sequences, as `induction_sequences` makes them, and labels: the answer at the last position, else -100.

    Returns ids and labels, both (rows, length).
    """
    sequences = induction_sequences(generator, rows, length, n_tokens=n_tokens, placement=placement)
    (ids,) = sequences.chunks(length)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = sequences.answers
    return ids, labels
