"""Random access to FASTA in place, with the index of samtools: .fai, and .gzi for files of bgzip."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .checks import Checked, require_dna
from .letters import LETTERS
from .runs import scan_unknown

_LONGEST_HEADER = 8192  # bytes before and after a record that are looked at for a header
_AT_ONCE = 1 << 20  # bytes of a record whose line ends are looked at together
_NO_LETTERS = b">; \t\v\f"  # signs of headers and comments, and white space, which the reader without an index skips
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
    lists the first, and when the index does not fit what is read. What is read of a record, and its start, is checked
    as `read_fasta` does.
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
        self._unknown: dict[str, NDArray[np.int64]] = {}

    def read(self, name: str, start: int, end: int) -> NDArray[np.uint8]:
        """The letters [start, end) of a record as ASCII codes."""
        if start == end:
            return np.zeros(0, np.uint8)
        if name not in self._checked:
            self._check_header(name, self._entries[name])
            require_dna(str(self._path), name, self.lengths[name], partial(self._letters, name))
            self._checked.add(name)
        letters = Checked(str(self._path), name, start)(self._letters(name, start, end))
        return letters.copy()

    def unknown_runs(self, name: str) -> NDArray[np.int64]:
        """Where a record has N or an ambiguity code, (n_runs, 2); the first time the record is read to its end."""
        if name not in self._unknown:
            self._unknown[name] = scan_unknown(partial(self.read, name), self.lengths[name])
        return self._unknown[name]

    def close(self) -> None:
        """Close the file."""
        self._content.close()

    def _letters(self, name: str, start: int, end: int) -> bytes:
        """The letters [start, end) of a record, which may be of a protein. Raises ValueError if the index misfits."""
        entry = self._entries[name]
        lines = self._content.read(entry.byte_of(start), entry.byte_of(end - 1) + 1)
        letters = lines.translate(None, b"\r\n")
        wrong = letters.translate(None, LETTERS)
        if len(letters) != end - start or (wrong and not self._fits(entry)):
            found = f"{chr(wrong[0])!r}" if wrong else f"{len(letters):,} letters"
            raise self._misfit(f"at {name}:{start:,}-{end:,} there is {found}")
        return letters

    def _fits(self, entry: _Entry) -> bool:
        """Whether a record has its line ends where the index has them, and nothing that an index does not count."""
        n_lines = max(1, _AT_ONCE // entry.line_width)
        for start in range(0, entry.length, n_lines * entry.line_bases):
            first, last = entry.byte_of(start), entry.byte_of(min(start + n_lines * entry.line_bases, entry.length) - 1)
            lines = self._content.read(first, last + 1)
            if len(lines) != last + 1 - first or len(lines) != len(lines.translate(None, _NO_LETTERS)):
                return False
            found = np.frombuffer(lines, np.uint8)
            is_end = (found == ord("\n")) | (found == ord("\r"))
            if not np.array_equal(is_end, np.arange(len(lines)) % entry.line_width >= entry.line_bases):
                return False
        return self._content.read(entry.end, entry.end + 1) in (b"", b"\n", b"\r")

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
