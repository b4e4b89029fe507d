"""Genomes that another library has opened: `pyfaidx.Fasta`, or any mapping from names to sequences."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .letters import letters_of


def is_wrappable(source: Any) -> bool:
    """Whether an object, which is no path, has names and sequences."""
    return not isinstance(source, str | PathLike) and hasattr(source, "keys") and hasattr(source, "__getitem__")


class WrappedReader:
    """Reads from an object that somebody else opens and closes.

    Args:
        source: `keys()` gives the names; `source[name]` has a length and can be sliced, which gives text or an object
            whose `str` is the text.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self.lengths = {str(name): len(source[name]) for name in source.keys()}  # noqa: SIM118

    def read(self, name: str, start: int, end: int) -> NDArray[np.uint8]:
        """The letters [start, end) of a sequence as ASCII codes."""
        if start == end:
            return np.zeros(0, np.uint8)
        letters = letters_of(str(self._source[name][start:end])).copy()
        if len(letters) != end - start:
            raise ValueError(
                f"{type(self._source).__name__} gave {len(letters):,} letters for {name}:{start:,}-{end:,}; open it "
                "without options that change what a slice means, such as one_based_attributes"
            )
        return letters

    def close(self) -> None:
        """Leave the object open."""
