"""How many tokens to draft, from what steps and passes have cost so far."""

from __future__ import annotations

from collections.abc import Sequence

WEIGHT = 0.2
"""Of the newest measurement in a mean."""
FORGET = 0.002
"""For each token, the cost of a pass moves by this share towards the hoped one, so that it is tried again."""
HOPED_GROWTH = 0.03
"""Until it is measured, a drafted token is taken to add this share of a step to a pass."""


class Pacing:
    """Chooses the number of drafted tokens that gives most tokens per second; none if a plain step is faster.

    Args:
        most: tokens to draft at once.
    """

    def __init__(self, most: int) -> None:
        self._sizes = sorted({most, *(2**i for i in range(most.bit_length()))} - {0})
        self._step: float | None = None
        self._passes: dict[int, float] = {}  # seconds over those of a step, by the number of drafted tokens

    def add_step(self, seconds: float) -> None:
        """Count a plain step."""
        self._step = seconds if self._step is None else self._step + WEIGHT * (seconds - self._step)
        for size, ratio in self._passes.items():
            self._passes[size] = ratio + FORGET * min(0.0, self._hoped(size) - ratio)

    def add_pass(self, size: int, seconds: float) -> None:
        """Count a pass over the last token and `size` drafted ones, drafting and replay included."""
        if self._step is None or size not in self._sizes:
            return
        ratio = seconds / self._step
        before = self._passes.get(size)
        self._passes[size] = ratio if before is None else before + WEIGHT * (ratio - before)

    def best(self, chances: Sequence[float]) -> int:
        """How many tokens to draft.

        Args:
            chances: that at least the first 1, 2, ... tokens are right.
        """
        if self._step is None:  # a step is measured first
            return 0
        best, most, gain, drafted = 0, 1.0, 1.0, 0
        for size in self._sizes:
            if size > len(chances):
                break
            gain += sum(chances[drafted:size])
            drafted = size
            if gain / self._cost(size) > most:
                best, most = size, gain / self._cost(size)
        return best

    def _cost(self, size: int) -> float:
        """Of a pass, in steps: measured, or on the line through the nearest measured size."""
        if size in self._passes:
            return self._passes[size]
        if not self._passes:
            return self._hoped(size)
        near = min(self._passes, key=lambda other: abs(other - size))
        return 1 + max(0.0, self._passes[near] - 1) * size / near

    def _hoped(self, size: int) -> float:
        return 1 + HOPED_GROWTH * size
