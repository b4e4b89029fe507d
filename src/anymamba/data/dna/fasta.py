"""Reads FASTA as a stream: the records and the letters of each, checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .checks import OLD_LINE_ENDS, Checked

_BLOCK = 1 << 18  # bytes read at once
_LONGEST_HEADER = 1 << 20
_HEADER = re.compile(rb"\n[>;]")
_SPACE = b"\n\r \t\v\f"
_OTHER_FORMATS = {
    b"@": "FASTQ, whose reads are not read; give sequences as FASTA",
    b"\x1f\x8b": "compressed with gzip; let its name end with .gz",
    b"C'A\x1a": "compressed .2bit, which is not read; decompress it",
    b"\x1aA'C": "compressed .2bit, which is not read; decompress it",
}
"""What files of other formats begin with, and what is said of them."""


@dataclass
class FastaCounts:
    """What a FASTA file had that is not among the sequences."""

    empty: list[str] = field(default_factory=list)
    """Names of records without a letter, which are skipped."""
    comments: int = 0
    """Lines that begin with a semicolon, which are skipped."""


def read_fasta(file: Path, stream: BinaryIO, counts: FastaCounts) -> Iterator[tuple[str, Iterator[NDArray[np.uint8]]]]:
    """The records of a FASTA file: the name and the letters, in pieces. Read each to its end before the next one.

    A name is the first word of its header. Lines may be of any length and end with LF or CR LF. Letters are the
    bases, U, N and the IUPAC codes in either case.

    Args:
        counts: gets what is skipped.
    Raises ValueError, naming file, line and record, for what is no FASTA, for line ends of CR alone, for proteins,
    gaps and other letters, and for two records of one name.
    """
    for name, _, pieces in read_records(file, stream, counts):
        letters = _checked(file, name, pieces)
        yield name, letters
        for _ in letters:
            pass


def read_records(file: Path, stream: BinaryIO, counts: FastaCounts) -> Iterator[tuple[str, str, Iterator[bytes]]]:
    """`read_fasta` with letters that are not checked: the name, the header after >, and the letters, in pieces.

    Raises ValueError, naming file and line, for what is no FASTA and for two records of one name.
    """
    lines = _Lines(file, stream)
    seen: dict[str, int] = {}
    while (header := lines.header(counts)) is not None:
        name = _name(file, header, lines.number)
        if name in seen:
            raise ValueError(
                f"{file} has two records named {name!r}, in lines {seen[name]:,} and {lines.number:,}; rename one: "
                "a position must mean one base"
            )
        seen[name] = lines.number
        pieces = lines.sequence(counts)
        first = next(pieces, None)
        if first is None:
            counts.empty.append(name)
            continue
        yield name, _decoded(header[1:]), chain([first], pieces)
        for _ in pieces:
            pass
    if not seen:
        raise ValueError(f"{file} is not FASTA: it has no line that begins with >")


def _checked(file: Path, name: str, pieces: Iterator[bytes]) -> Iterator[NDArray[np.uint8]]:
    checked = Checked(str(file), name)
    for piece in pieces:
        yield checked(piece)
    checked.finish()


def _name(file: Path, header: bytes, line: int) -> str:
    words = header[1:].split(maxsplit=1)
    if not words:
        raise ValueError(f"{file}, line {line:,}: a record has no name; write one after >")
    return _decoded(words[0])


def _decoded(header: bytes) -> str:
    return header.decode("utf-8", "surrogateescape")


class _Lines:
    """Splits a stream at its headers. `number` is the number of the last header's line."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self._file, self._stream = file, stream
        self._data, self._at = stream.read(_BLOCK).removeprefix(b"\xef\xbb\xbf"), 0
        self._at_line_start, self._lines_before = True, 0
        self.number = 0
        for sign, problem in _OTHER_FORMATS.items():
            if self._data.startswith(sign):
                raise ValueError(f"{file} is {problem}")

    def header(self, counts: FastaCounts) -> bytes | None:
        """The next line that begins with >; None at the end. Raises ValueError for letters before the first one."""
        for piece in self.sequence(counts):
            raise ValueError(f"{self._file} is not FASTA: it begins with {_shown(piece)} and not with >")
        if not self._have():
            return None
        line = self._line()
        if b"\r" in line:
            raise ValueError(self._old_line_ends())
        return line

    def sequence(self, counts: FastaCounts) -> Iterator[bytes]:
        """The letters up to the next line that begins with >, without white space."""
        while self._have():
            if self._at_line_start and self._data[self._at] == ord(";"):
                self._line()
                counts.comments += 1
                continue
            if self._at_line_start and self._data[self._at] == ord(">"):
                return
            found = _HEADER.search(self._data, self._at)
            end = len(self._data) if found is None else found.start() + 1
            lines = self._data[self._at : end]
            self._advance(end)
            letters = lines.translate(None, _SPACE)
            if letters:
                yield letters

    def _have(self) -> bool:
        """Whether there is a byte left; reads more if needed."""
        if self._at == len(self._data):
            self._data, self._at = self._stream.read(_BLOCK), 0
        return self._at < len(self._data)

    def _line(self) -> bytes:
        """The line at the position, read to its end."""
        while (end := self._data.find(b"\n", self._at)) < 0:
            more = self._stream.read(_BLOCK)
            self._data, self._at = self._data[self._at :] + more, 0
            if not more:
                end = len(self._data)
                break
            if len(self._data) > _LONGEST_HEADER + _BLOCK:
                if b"\r" in self._data:
                    raise ValueError(self._old_line_ends())
                raise ValueError(f"{self._file} is not FASTA: a header of more than a million characters does not end")
        self.number = self._lines_before + 1
        line = self._data[self._at : end].rstrip(b"\r")
        self._advance(min(end + 1, len(self._data)))
        return line

    def _old_line_ends(self) -> str:
        return f"{self._file}: {OLD_LINE_ENDS}"

    def _advance(self, end: int) -> None:
        self._lines_before += self._data.count(b"\n", self._at, end)
        self._at_line_start = self._data[end - 1] == ord("\n")
        self._at = end


def _shown(piece: bytes) -> str:
    return repr(piece[:20].decode("latin-1"))
