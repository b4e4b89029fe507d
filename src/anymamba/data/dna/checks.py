"""Checks that the letters of a record are those of DNA, and that it is no protein."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .letters import AMBIGUOUS, LETTERS

_UNAMBIGUOUS = bytes(set(LETTERS) - set(AMBIGUOUS + AMBIGUOUS.lower()))
_PROTEIN_FROM = 20  # letters of a record from which on its share of ambiguity codes is looked at
_START = 1 << 16  # letters at the start of a record that are looked at; the longest protein, titin, has 38,000
_AT_ONCE = 1 << 22

OLD_LINE_ENDS = (
    "its lines end with CR alone, as on an old Mac; turn CR into LF, for example with tr '\\r' '\\n' < OLD > NEW"
)
"""What is said of a text file without LF."""


class Checked:
    """Checks the letters of one record, which come in pieces.

    Args:
        source: the file or the object, for messages.
        name: of the record.
        start: letters of the record before the first piece.
    """

    def __init__(self, source: str, name: str, start: int = 0) -> None:
        self._source, self._name, self._at = source, name, start
        self._n = self._n_ambiguous = 0

    def __call__(self, piece: bytes) -> NDArray[np.uint8]:
        """The letters of a piece. Raises ValueError for a letter that DNA does not have."""
        wrong = piece.translate(None, LETTERS)
        if wrong:
            raise ValueError(self._complaint(chr(wrong[0]), self._at + piece.index(wrong[:1])))
        self._at += len(piece)
        self._n += len(piece)
        self._n_ambiguous += len(piece.translate(None, _UNAMBIGUOUS))
        return np.frombuffer(piece, np.uint8)

    @property
    def is_protein(self) -> bool:
        """Whether more than half of the letters so far are ambiguity codes."""
        return self._n >= _PROTEIN_FROM and 2 * self._n_ambiguous > self._n

    def finish(self) -> None:
        """Raise ValueError if the record looks like a protein."""
        if self.is_protein:
            raise ValueError(
                f"{self._source}: more than half of record {self._name!r} are ambiguity codes, as in a protein; only "
                "DNA and RNA are read"
            )

    def _complaint(self, letter: str, position: int) -> str:
        where = f"{self._source}: record {self._name!r} has {letter!r} at base {position + 1:,}"
        if letter in "-.*~":
            return f"{where}, which is a gap of an alignment or a stop of a protein; give sequences without them"
        if letter.isalpha() and letter.isascii():
            return f"{where}, which is no base or ambiguity code; is it a protein? Only DNA and RNA are read"
        return f"{where}; a sequence has letters only"


def require_dna(source: str, name: str, length: int, read: Callable[[int, int], bytes]) -> None:
    """Raise ValueError if a record that is read in place looks like a protein.

    Of a long record the rest is read only if its start looks like one.

    Args:
        length: letters of the record.
        read: gives its letters [start, end).
    """
    checked = Checked(source, name)
    checked(read(0, min(length, _START)))
    for start in range(_START, length, _AT_ONCE):
        if not checked.is_protein:
            return
        checked(read(start, min(length, start + _AT_ONCE)))
    checked.finish()
