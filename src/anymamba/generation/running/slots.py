"""States of running rows in memory that is used again when rows come and go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from anymamba.parts.state import concatenate_rows, map_state, select_rows, state_tensors


class Slots:
    """The states of rows 0 to n - 1, at the front of tensors that may have room for more.

    A new row goes to the end, and the last row takes the place of one that leaves, so that neither copies the others.
    A state here is any nested tuple of tensors whose first dimension is the row.
    """

    def __init__(self) -> None:
        self._room: Any = None
        self._views: dict[int, Any] = {}
        self.n = 0
        """Number of rows."""

    def front(self, n: int) -> Any:
        """The states of the first n rows, as views."""
        if n not in self._views:
            whole = n == self._capacity
            self._views[n] = self._room if whole else map_state(lambda t: t[:n], self._room)
        return self._views[n]

    @property
    def state(self) -> Any:
        """The states of all rows, as views."""
        return self.front(self.n)

    def replace(self, n: int, state: Any) -> None:
        """Give the first n rows new states, as the model returns them. The tensors become those of the slots."""
        if _same_memory(state, self.front(n)):
            return
        rest = self.n - n
        self._own(state if not rest else concatenate_rows([state, map_state(lambda t: t[n : self.n], self._room)]))

    def append(self, state: Any) -> None:
        """Add rows at the end. The tensors may become those of the slots."""
        n_new = next(state_tensors(state)).shape[0]
        if not self.n and not self._fits(state, n_new):
            self._own(state)
        elif self._fits(state, n_new):
            map_state(lambda room, new: room[self.n : self.n + n_new].copy_(new), self._room, state)
        else:
            self._grow(concatenate_rows([self.state, state]))
        self.n += n_new

    def remove(self, places: Sequence[int]) -> None:
        """Remove rows. The last ones take their places, in the order that `moves` gives."""
        for to, source in moves(self.n, places):
            map_state(lambda t, to=to, source=source: t[to].copy_(t[source]), self._room)
        self.n -= len(places)

    def select(self, index: Int[Tensor, " rows"]) -> Any:
        """A copy of some rows."""
        return select_rows(self.state, index)

    @property
    def _capacity(self) -> int:
        return 0 if self._room is None else next(state_tensors(self._room)).shape[0]

    def _own(self, state: Any) -> None:
        self._room, self._views = state, {}

    def _fits(self, state: Any, n_new: int) -> bool:
        if self._room is None or self.n + n_new > self._capacity:
            return False
        pairs = zip(state_tensors(self._room), state_tensors(state), strict=True)
        return all(a.shape[1:] == b.shape[1:] for a, b in pairs)

    def _grow(self, state: Any) -> None:
        """Own these rows and room for as many more."""

        def grown(tensor: Tensor) -> Tensor:
            room = tensor.new_empty(2 * len(tensor), *tensor.shape[1:])
            room[: len(tensor)] = tensor
            return room

        self._own(map_state(grown, state))


def moves(n: int, removed: Sequence[int]) -> list[tuple[int, int]]:
    """The (new place, old place) of rows that change places when some of n rows are removed."""
    gone, kept = set(removed), n - len(removed)
    sources = [place for place in range(kept, n) if place not in gone]
    return list(zip((place for place in sorted(gone) if place < kept), sources, strict=True))


def _same_memory(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor):
        return a.data_ptr() == b.data_ptr()
    return all(map(_same_memory, a, b))
