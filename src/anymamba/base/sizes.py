"""Checks of numbers from the caller. Each error says which number is wrong, what was given and what is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral


def require_sizes(**sizes: int) -> None:
    """Raise ValueError unless every size is an integer of at least 1. The message uses the keyword as the name."""
    for name, size in sizes.items():
        require_at_least(name, size, 1)


def require_at_least(name: str, value: int, minimum: int) -> None:
    """Raise ValueError unless value is an integer of at least minimum."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def require_positive(name: str, value: float) -> None:
    """Raise ValueError unless value is a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def require_complement(complement: Sequence[int], n_ids: int) -> None:
    """Raise ValueError unless `complement` maps ids below n_ids to each other in pairs, or to themselves."""
    n = len(complement)
    if n > n_ids:
        raise ValueError(f"complement must have at most one entry for each of {n_ids} ids, got {n}; drop the others")
    for i, other in enumerate(complement):
        if not 0 <= other < n or complement[other] != i:
            raise ValueError(
                f"complement must pair ids with each other, got {other} for id {i}; the complement of a complement is "
                "the id itself"
            )
