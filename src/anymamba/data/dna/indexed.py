"""Random access to FASTA in place, with the index of samtools: .fai, and .gzi for files of bgzip."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .letters import LETTERS

_LONGEST_HEADER = 8192  # bytes before and after a record that are looked at for a header
_MARK = b"\xef\xbb\xbf"  # the byte order mark of UTF-8


class Content(Protocol):
    """The bytes of a FASTA file, decompressed."""

    def read(self, start: int, end: int) -> bytes:
        """The bytes [start, end); fewer at the end of the file."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class _Entry(NamedTuple):
    """A line of a .fai: where a record's letters are."""

    length: int
    offset: int
    """Of the first letter in the file."""
    line_bases: int
    """Letters of a line."""
    line_width: int
    """Bytes of a line, with its end."""

    def byte_of(self, base: int) -> int:
        """The offset of a letter in the file."""
        return self.offset + base // self.line_bases * self.line_width + base % self.line_bases

    @property
    def end(self) -> int:
        """The offset after the last letter."""
        return self.byte_of(self.length - 1) + 1 if self.length else self.offset


class IndexedReader:
    """Reads the records that an index lists from a FASTA file.

    Args:
        path: the FASTA file, for messages.
        index: its .fai.
        content: its bytes.
    Raises ValueError, naming the file, for an index that is no .fai, for two records of one name, of which samtools
    lists the first, and when the index does not fit what is read.
    """

    def __init__(self, path: Path, index: Path, content: Content) -> None:
        self._path, self._index, self._content = path, index, content
        entries = _read_index(index)
        self._entries = {name: entry for name, entry in entries.items() if entry.length}
        self.lengths = {name: entry.length for name, entry in self._entries.items()}
        self.empty = [name for name, entry in entries.items() if not entry.length]
        """Names of the records without a letter, which are left out."""
        self.unlisted = self._find_unlisted(entries)
        """Names of records that the file has and the index does not list, one for each place; they are left out."""
        self._checked: set[str] = set()

    def read(self, name: str, start: int, end: int) -> NDArray[np.uint8]:
        """The letters [start, end) of a record as ASCII codes."""
        if start == end:
            return np.zeros(0, np.uint8)
        entry = self._entries[name]
        if name not in self._checked:
            self._check_header(name, entry)
            self._checked.add(name)
        lines = self._content.read(entry.byte_of(start), entry.byte_of(end - 1) + 1)
        letters = lines.translate(None, b"\r\n")
        wrong = letters.translate(None, LETTERS)
        if len(letters) != end - start or wrong:
            found = f"{chr(wrong[0])!r}" if wrong else f"{len(letters):,} letters"
            raise self._misfit(f"at {name}:{start:,}-{end:,} there is {found}")
        return np.frombuffer(bytearray(letters), np.uint8)

    def close(self) -> None:
        """Close the file."""
        self._content.close()

    def _find_unlisted(self, entries: dict[str, _Entry]) -> list[str]:
        """Names of records that are not listed: the header after a listed record is that of the next one.

        Raises ValueError if one has the name of a listed record.
        """
        listed = sorted(entries.items(), key=lambda item: item[1].offset)
        starts = [0, *(entry.end for _, entry in listed)]
        found = []
        for start, following in zip(starts, [*(name for name, _ in listed), None], strict=True):
            after = b"\n" + self._content.read(start, start + _LONGEST_HEADER).removeprefix(_MARK)
            words = after.partition(b"\n>")[2].partition(b"\n")[0].split(maxsplit=1)
            name = words[0].decode("utf-8", "surrogateescape") if words else following
            if name is None or name == following:
                continue
            if name in entries:
                self._check_header(name, entries[name])
                raise ValueError(
                    f"{self._path} has two records named {name!r}, and {self._index.name} lists one; rename the other "
                    "and make the index again: a position must mean one base"
                )
            found.append(name)
        return found

    def _check_header(self, name: str, entry: _Entry) -> None:
        """Raise ValueError if the line before a record's letters is not its header."""
        first = max(0, entry.offset - _LONGEST_HEADER)
        before = self._content.read(first, entry.offset)
        line = before.rstrip(b"\r\n").rpartition(b"\n")[2]
        words = line.removeprefix(_MARK)[1:].split(maxsplit=1)
        is_header = line.removeprefix(_MARK).startswith(b">") and words and words[0] == _encoded(name)
        is_longer = len(line) >= _LONGEST_HEADER - 2 and first > 0
        if not before.endswith(b"\n") or not (is_header or is_longer):
            raise self._misfit(f"there is no header of {name!r} before byte {entry.offset:,}")

    def _misfit(self, what: str) -> ValueError:
        return ValueError(
            f"{self._index} does not fit {self._path}: {what}; delete the index and let it be made again, or copy the "
            "file again"
        )


def _read_index(path: Path) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
        if not line.strip():
            continue
        name, *numbers = line.split("\t")
        if len(numbers) != 4 or not all(value.isdecimal() and len(value) < 19 for value in numbers):
            raise ValueError(
                f"{path}, line {number:,} is no line of a .fai: wanted a name and four numbers, got {line!r}"
            )
        entry = _Entry(*map(int, numbers))
        if entry.length and not 0 < entry.line_bases <= entry.line_width:
            raise ValueError(f"{path}, line {number:,} is no line of a .fai: a line of {name!r} has no letters")
        if name in entries:
            raise ValueError(f"{path} has two records named {name!r}; rename one: a position must mean one base")
        entries[name] = entry
    if not any(entry.length for entry in entries.values()):
        raise ValueError(f"{path} lists no sequence; delete it and let it be made again")
    return entries


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
