"""Reads intervals from BED files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

from ..documents import open_decompressed
from .checks import OLD_LINE_ENDS
from .genome import Genome, Strand


class Interval(NamedTuple):
    """A stretch of a sequence: bases [start, end), counted from 0 on the plus strand."""

    name: str
    start: int
    end: int
    strand: Strand = "+"
    """The strand that is read; "-" gives the reverse complement."""
    label: str = ""
    """The fourth column of a BED file."""


HEADER = "header and comment lines"
UNKNOWN = "intervals of sequences that the genome does not have"
BEYOND = "intervals beyond the end of their sequence"
EMPTY = "intervals without a base"
BAD = "lines that are no intervals"
WORDS_OF_NAMES = (("start", "begin", "from", "pos", "left"), ("end", "stop", "to", "right"))
"""Of which the names of the columns of starts and ends have one."""


def read_bed(
    path: str | Path, genome: Genome, *, on_bad_line: Literal["error", "skip"] = "error"
) -> tuple[list[Interval], dict[str, int]]:
    """The intervals of a BED file, which may be compressed, and how many lines were skipped for which reason.

    Columns are separated by tabs, or by spaces in a line without a tab: the sequence (with or without "chr"), start,
    end, and, where there are more, label, score (not used) and strand ("." is "+"). Further columns are not used.
    Skipped are: header lines (browser, track, #, and one first line with names of columns, such as chrom, start and
    end), intervals of unknown sequences, and those that are empty or end beyond their sequence.

    Args:
        on_bad_line: what to do with a line that is no interval: fewer than three columns, positions that are no numbers
            or are negative, an end before the start, or an unknown strand.
    Raises ValueError, naming the line, for a bad line, for line ends of CR alone, and for a file without an interval in
    the genome.
    """
    reading = _BedLines(Path(path), genome, on_bad_line == "skip")
    intervals = reading.intervals()
    if not intervals:
        skipped = "".join(f"; skipped {reason}: {n:,}" for reason, n in reading.skipped.items())
        raise ValueError(
            f"{path} has no interval of {genome.source}{skipped or ', it is empty'}{_other_assembly(reading, genome)}"
        )
    return intervals, dict(reading.skipped)


def _other_assembly(reading: _BedLines, genome: Genome) -> str:
    if not reading.skipped[UNKNOWN] + reading.skipped[BEYOND]:
        return ""
    return f"; the first is {reading.first}, and the genome begins with {genome.names[0]}: is it another assembly?"


class _BedLines:
    """Reads one file."""

    def __init__(self, path: Path, genome: Genome, skip: bool) -> None:
        self._path, self._genome, self._skip = path, genome, skip
        self.skipped: Counter[str] = Counter()
        self.first = ""
        self._may_be_names = True
        self._own_name: dict[str, str | None] = {}

    def intervals(self) -> list[Interval]:
        """The intervals that the genome has."""
        found = []
        with open_decompressed(self._path, lambda count: None) as stream:
            for number, raw in enumerate(stream, 1):
                line = raw.decode("utf-8", "surrogateescape").strip("\r\n")
                if number == 1:
                    line = line.removeprefix("\ufeff")
                if "\r" in line:
                    raise ValueError(f"{self._path}: {OLD_LINE_ENDS}")
                columns = line.split("\t") if "\t" in line else line.split()
                if self._is_header(line, columns):
                    self.skipped[HEADER] += bool(line.strip())
                    continue
                interval = self._interval(columns, number)
                if interval is not None:
                    found.append(interval)
        self.skipped += Counter()  # drops reasons with a count of 0
        return found

    def _is_header(self, line: str, columns: list[str]) -> bool:
        if not line.strip() or line.startswith("#") or columns[0] in ("browser", "track"):
            return True
        is_first, self._may_be_names = self._may_be_names, False
        return is_first and len(columns) >= 3 and self._are_names([column.strip() for column in columns[:3]])

    def _are_names(self, columns: list[str]) -> bool:
        """Whether three columns name sequence, start and end, as in "chrom start end"."""
        first = columns[0]
        own = {first, f"chr{first}", first.removeprefix("chr")} & self._genome.lengths.keys()
        pairs = zip(columns[1:], WORDS_OF_NAMES, strict=True)
        return not own and all(any(word in column.lower() for word in words) for column, words in pairs)

    def _interval(self, columns: list[str], number: int) -> Interval | None:
        """The interval of a line, or None where it is skipped."""
        interval = self._parsed(columns, number)
        if interval is None:
            self.skipped[BAD] += 1
            return None
        self.first = self.first or f"{interval.name}:{interval.start}-{interval.end}"
        name = self._resolved(interval.name)
        if name is None:
            self.skipped[UNKNOWN] += 1
        elif interval.end > self._genome.lengths[name]:
            self.skipped[BEYOND] += 1
        elif interval.start == interval.end:
            self.skipped[EMPTY] += 1
        else:
            return interval._replace(name=name)
        return None

    def _parsed(self, columns: list[str], number: int) -> Interval | None:
        """The columns as an interval. None for a bad line that is skipped."""
        problem = "it has fewer than three columns"
        if len(columns) >= 3:
            name, start, end, *rest = (column.strip() for column in columns)
            strand = rest[2] if len(rest) > 2 else "."
            if not (start.isdecimal() and end.isdecimal() and start.isascii() and end.isascii()):
                problem = f"start and end must be whole numbers, got {start!r} and {end!r}"
            elif int(start) > int(end):
                problem = f"the end {end} is before the start {start}"
            elif strand not in ("+", "-", "."):
                problem = f"the strand must be +, - or ., got {strand!r}"
            else:
                return Interval(name, int(start), int(end), "-" if strand == "-" else "+", rest[0] if rest else "")
        if self._skip:
            return None
        raise ValueError(
            f"{self._path}, line {number:,} is no interval of a BED file: {problem}; correct it, or leave such lines "
            "out with on_bad_line='skip' (--on-bad-row skip)"
        )

    def _resolved(self, name: str) -> str | None:
        """The genome's name of a sequence; None if it has none."""
        if name not in self._own_name:
            try:
                self._own_name[name] = self._genome.resolve(name)
            except ValueError:
                self._own_name[name] = None
        return self._own_name[name]


def whole_sequences(genome: Genome) -> list[Interval]:
    """An interval for each sequence of a genome."""
    return [Interval(name, 0, length) for name, length in genome.lengths.items()]
