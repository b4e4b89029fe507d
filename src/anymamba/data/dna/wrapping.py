"""Genomes that another library has opened: `pyfaidx.Fasta`, or any mapping from names to sequences."""

from __future__ import annotations

from functools import partial
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checks import Checked, require_dna
from .runs import scan_unknown


def is_wrappable(source: Any) -> bool:
    """Whether an object, which is no path, has names and sequences."""
    return not isinstance(source, str | PathLike) and hasattr(source, "keys") and hasattr(source, "__getitem__")


class WrappedReader:
    """Reads from an object that somebody else opens and closes.

    Args:
        source: `keys()` gives the names; `source[name]` has a length and can be sliced, which gives text or an object
            whose `str` is the text.
    Raises ValueError, naming the object and the sequence, if there is no letter, or for what is no DNA.
    """

    def __init__(self, source: Any) -> None:
        self._source, self._kind = source, type(source).__name__
        self._keys = {str(name): name for name in source.keys()}  # noqa: SIM118
        lengths = {name: len(source[key]) for name, key in self._keys.items()}
        self.lengths = {name: length for name, length in lengths.items() if length}
        self.empty = [name for name, length in lengths.items() if not length]
        """Names of the sequences without a letter, which are left out."""
        if not self.lengths:
            empty = f": all of its {len(self.empty):,} records are empty" if self.empty else ""
            raise ValueError(f"{self._kind} has no sequence{empty}")
        self._checked: set[str] = set()
        self._unknown: dict[str, NDArray[np.int64]] = {}

    def read(self, name: str, start: int, end: int) -> NDArray[np.uint8]:
        """The letters [start, end) of a sequence as ASCII codes."""
        if start == end:
            return np.zeros(0, np.uint8)
        if name not in self._checked:
            require_dna(self._kind, name, self.lengths[name], partial(self._text, name))
            self._checked.add(name)
        return Checked(self._kind, name, start)(self._text(name, start, end)).copy()

    def unknown_runs(self, name: str) -> NDArray[np.int64]:
        """Where a sequence has N or an ambiguity code, (n_runs, 2); the first time the sequence is read to its end."""
        if name not in self._unknown:
            self._unknown[name] = scan_unknown(partial(self.read, name), self.lengths[name])
        return self._unknown[name]

    def _text(self, name: str, start: int, end: int) -> bytes:
        """What the object gives for a slice. Raises ValueError for a number of letters that was not asked for."""
        text = str(self._source[self._keys[name]][start:end])
        if len(text) != end - start:
            raise ValueError(
                f"{self._kind} gave {len(text):,} letters for {name}:{start:,}-{end:,}; open it without options that "
                "change what a slice means, such as one_based_attributes"
            )
        return text.encode("utf-8", "surrogateescape")

    def close(self) -> None:
        """Leave the object open."""
