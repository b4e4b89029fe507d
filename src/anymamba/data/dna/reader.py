"""What every reader of genome files can do."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Reader(Protocol):
    """Random access to sequences."""

    lengths: dict[str, int]
    """Letters of each sequence by its name."""

    def read(self, name: str, start: int, end: int) -> NDArray[np.uint8]:
        """The letters [start, end) as ASCII codes, in an array that the caller may change."""
        ...

    def unknown_runs(self, name: str) -> NDArray[np.int64]:
        """Where a sequence has N or an ambiguity code: (n_runs, 2) starts and ends, sorted, without overlaps."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...
