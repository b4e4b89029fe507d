"""A genome in a file, read in pieces: FASTA, compressed or not, .2bit, or an object of pyfaidx."""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from anymamba.base.errors import DataWarning

from .letters import COMPLEMENT, odd_in_words, odd_letters, translated
from .opening import empty_note, open_file
from .packed import PackedReader
from .reader import Reader
from .two_bit import TwoBitReader
from .wrapping import WrappedReader, is_wrappable

Strand = Literal["+", "-"]
MITOCHONDRION = ("chrM", "MT", "M", "chrMT")
_LISTED = 5  # names in a message


class Genome:
    """Named sequences of DNA with random access; only the letters that are asked for are read.

    Open one with `Genome.open`, as a context manager or with `close`.

    Args:
        reader: reads the letters.
        source: where they come from, for messages.
        notes: what was found or skipped when it was opened, one line each.
    """

    def __init__(self, reader: Reader, source: str, notes: tuple[str, ...] = ()) -> None:
        self._reader, self.source, self.notes = reader, source, notes
        self.lengths: dict[str, int] = reader.lengths
        """Bases of each sequence by its name."""
        self.others_read: Counter[str] = Counter()
        """Letters other than A, C, G and T that were read so far, counted at each reading; none where the file is
        packed or .2bit, whose letters `notes` counts."""
        self._told_of_names = False

    @staticmethod
    def open(
        source: Any, *, cache_dir: str | Path | None = None, progress: Callable[[int, int | None], None] | None = None
    ) -> Genome:
        """Open a genome.

        Args:
            source: a FASTA file, also compressed (.gz, .bgz, .bz2, .xz, .zst); a .2bit file of either byte order; or a
                `pyfaidx.Fasta` or another mapping from names to sequences that can be sliced. A FASTA file with an
                index (.fai, for bgzip also .gzi) that is not older than the file is read in place. Any other is packed
                once into the cache, at two bits a base.
            cache_dir: the folder of the cache; defaults to the one of token tables.
            progress: called with (bytes read, bytes of the file) while a file is packed.
        Raises FileNotFoundError if there is no such file, ValueError for a file that is damaged or is no DNA.
        """
        if is_wrappable(source):
            wrapped = WrappedReader(source)
            return Genome(wrapped, type(source).__name__, empty_note(wrapped.empty))
        path = Path(source).expanduser()
        reader, notes = open_file(path, None if cache_dir is None else Path(cache_dir), progress)
        return Genome(reader, str(path), notes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sequences, in the order of the file."""
        return tuple(self.lengths)

    @property
    def n_bases(self) -> int:
        """Bases in all sequences."""
        return sum(self.lengths.values())

    def resolve(self, name: str) -> str:
        """The genome's own name of a sequence that others call with or without "chr".

        chr1 and 1 are the same sequence, and so are chrM, MT, M and chrMT. The first time that a name is not the
        genome's own, a DataWarning says so. Raises ValueError, which lists names, for an unknown sequence.
        """
        if name in self.lengths:
            return name
        others = MITOCHONDRION if name in MITOCHONDRION else (name.removeprefix("chr"), f"chr{name}")
        found = [other for other in others if other in self.lengths]
        if len(found) != 1:
            raise ValueError(f"{self.source} has no sequence {name!r}; {self._some_names(name)}")
        if not self._told_of_names:
            self._told_of_names = True
            warnings.warn(
                f"{self.source} calls {name!r} {found[0]!r}; names with and without chr are taken as the same sequence",
                DataWarning,
                stacklevel=2,
            )
        return found[0]

    def fetch(self, name: str, start: int, end: int, *, strand: Strand = "+") -> str:
        """The bases [start, end) of a sequence, counted from 0 on the plus strand, in the case that the file has.

        Args:
            name: of the sequence, also with or without "chr".
            strand: "-" gives the reverse complement of these bases.
        Raises ValueError for an unknown name, a range outside the sequence, or another strand.
        """
        return self.letters(name, start, end, strand=strand).tobytes().decode("ascii")

    def letters(self, name: str, start: int, end: int, *, strand: Strand = "+") -> NDArray[np.uint8]:
        """`fetch` as (end - start,) ASCII codes."""
        name = self.resolve(name)
        if not 0 <= start <= end <= self.lengths[name]:
            raise ValueError(
                f"{name}:{start:,}-{end:,} is not a range of {name} in {self.source}, which has "
                f"{self.lengths[name]:,} bases; positions count from 0, and the end is not included"
            )
        if strand not in ("+", "-"):
            raise ValueError(f"strand must be '+' or '-', got {strand!r}")
        letters = self._reader.read(name, int(start), int(end))
        if not isinstance(self._reader, PackedReader | TwoBitReader):
            self.others_read += odd_letters(letters)
        return letters if strand == "+" else translated(letters[::-1], COMPLEMENT)

    def peek(self, name: str, start: int, end: int) -> NDArray[np.uint8]:
        """The letters of a range of a sequence that is known to exist; they do not count in `reading_notes`."""
        return self._reader.read(self.resolve(name), start, end)

    def unknown_runs(self, name: str) -> NDArray[np.int64]:
        """Where a sequence has N or an ambiguity code: (n_runs, 2) starts and ends, sorted; runs may touch.

        A sequence that is read in place is read to its end the first time; this does not count in `reading_notes`.
        """
        return self._reader.unknown_runs(self.resolve(name))

    def reading_notes(self) -> tuple[str, ...]:
        """What was found while a genome was read in place, one line each."""
        return (f"read (counted at each reading) {odd_in_words(self.others_read)}",) if self.others_read else ()

    def close(self) -> None:
        """Close the files; an object that was given stays open."""
        self._reader.close()

    def __enter__(self) -> Genome:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _some_names(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.names, 1)
        if near:
            return f"did you mean {near[0]!r}?"
        names = ", ".join(self.names[:_LISTED])
        more = f" and {len(self.names) - _LISTED:,} more" if len(self.names) > _LISTED else ""
        return f"it has {names}{more}; is it another assembly?"
