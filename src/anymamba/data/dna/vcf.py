"""Reads variants from VCF files, and checks them against a genome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from ..documents import open_decompressed
from .genome import Genome
from .letters import as_dna

BASES = frozenset("ACGT")

UNKNOWN = "alleles of sequences that the genome does not have"
BEYOND = "alleles beyond the ends of their sequence"
MISMATCH = "alleles whose REF is not what the genome has"
SYMBOLIC = "symbolic alleles, breakends and *"
MISSING = "records without an alternative allele"
LETTERS = "alleles with letters other than A, C, G and T"
SAME = "alleles that equal REF"
BAD = "lines that are no records"


class Variant(NamedTuple):
    """A place in a genome and what may stand there."""

    name: str
    """The genome's name of the sequence."""
    start: int
    """The first base of `ref`, counted from 0."""
    ref: str
    """The bases that the genome has there; may be empty, for an insertion."""
    alts: tuple[str, ...]
    """The alternative alleles; may be empty strings, for deletions."""


class Record(NamedTuple):
    """A line of a VCF file."""

    columns: tuple[str, ...]
    """All columns as they are in the file."""
    variant: Variant | None
    """The alleles that can be scored; None if there are none."""
    reasons: tuple[str | None, ...]
    """For each allele of ALT why it is skipped; None for one that `variant` has."""

    @property
    def alts(self) -> tuple[str, ...]:
        """The alleles of ALT as they are in the file."""
        return tuple(self.columns[4].split(","))


class Vcf:
    """The records of a VCF file (4.x), which may be compressed, checked against a genome.

    Positions count from 1. Skipped, by allele, are: those of sequences that the genome does not have (a name may have
    or lack "chr"), beyond its ends, with a REF that is not there, symbolic ones (<DEL>), breakends and *, those with
    letters other than A, C, G and T, and those equal to REF. Case does not count, and U is read as T.

    Args:
        path: of the file.
        genome: that of REF.
        on_bad_line: what to do with a line that has fewer than five columns or a position that is no number.
    """

    def __init__(self, path: str | Path, genome: Genome, *, on_bad_line: Literal["error", "skip"] = "error") -> None:
        self.path, self._genome, self._skip = Path(path), genome, on_bad_line == "skip"
        self.header: list[str] = []
        """The lines that begin with #, after `records` has passed them."""
        self.skipped: Counter[str] = Counter()
        """How many alleles were skipped for which reason, of the records so far."""
        self.n_alleles = 0
        """Alleles of the records so far that can be scored."""
        self.first_mismatch = ""
        """The first REF that is not in the genome."""
        self._own_name: dict[str, str | None] = {}

    def records(self) -> Iterator[Record]:
        """Read the file from its beginning. Raises ValueError, naming the line, for a bad line."""
        self.header, self.skipped, self.n_alleles, self.first_mismatch = [], Counter(), 0, ""
        with open_decompressed(self.path, lambda count: None) as stream:
            for number, raw in enumerate(stream, 1):
                line = raw.decode("utf-8", "surrogateescape").strip("\r\n")
                if number == 1:
                    line = line.removeprefix("\ufeff")
                if line.startswith("#"):
                    self.header.append(line)
                elif line.strip():
                    record = self._record(tuple(line.split("\t")), number)
                    if record is not None:
                        yield record

    def require_same_assembly(self) -> None:
        """Read the whole file and check it.

        Raises ValueError if no allele can be scored, or if most of those that can be compared have a REF that is not in
        the genome: the file is then of another assembly.
        """
        for _ in self.records():
            pass
        wrong = self.skipped[MISMATCH]
        if wrong > self.n_alleles and wrong:
            raise ValueError(
                f"{self.path} is of another assembly than {self._genome.source}: {wrong:,} of "
                f"{wrong + self.n_alleles:,} alleles have a REF that the genome does not have, the first is "
                f"{self.first_mismatch}"
            )
        if not self.n_alleles:
            skipped = "".join(f"; {n:,} {reason}" for reason, n in self.skipped.items())
            raise ValueError(f"{self.path} has no allele to score in {self._genome.source}{skipped or ', it is empty'}")

    def _record(self, columns: tuple[str, ...], number: int) -> Record | None:
        problem = ""
        if len(columns) < 5:
            problem = f"it has {len(columns)} columns separated by tabs, and needs five: CHROM POS ID REF ALT"
        elif not (columns[1].isdecimal() and columns[1].isascii()):
            problem = f"the position must be a whole number, got {columns[1]!r}"
        if problem and self._skip:
            self.skipped[BAD] += 1
            return None
        if problem:
            raise ValueError(
                f"{self.path}, line {number:,} is no record of a VCF file: {problem}; correct it, or leave such lines "
                "out with on_bad_line='skip' (--on-bad-row skip)"
            )
        return self._checked(columns)

    def _checked(self, columns: tuple[str, ...]) -> Record:
        """The record with the alleles that can be scored."""
        name, start, ref = self._resolved(columns[0]), int(columns[1]) - 1, read_allele(columns[3])
        whole = self._reason_of_place(name, start, ref, columns)
        alts = [read_allele(alt) for alt in columns[4].split(",")]
        reasons = tuple(whole or _reason_of_allele(alt, ref) for alt in alts)
        self.skipped.update(reason for reason in reasons if reason is not None)
        kept = tuple(alt for alt, reason in zip(alts, reasons, strict=True) if reason is None)
        self.n_alleles += len(kept)
        variant = Variant(name, start, ref, kept) if kept and name is not None else None
        return Record(columns, variant, reasons)

    def _reason_of_place(self, name: str | None, start: int, ref: str, columns: tuple[str, ...]) -> str | None:
        """Why all alleles of a record are skipped, or None."""
        if name is None:
            return UNKNOWN
        if columns[4] in (".", ""):
            return MISSING
        if not ref or set(ref) - BASES:
            return LETTERS
        if start < 0 or start + len(ref) > self._genome.lengths[name]:
            return BEYOND
        there = read_allele(self._genome.fetch(name, start, start + len(ref)))
        if there == ref:
            return None
        self.first_mismatch = self.first_mismatch or (
            f"{columns[0]}:{columns[1]} with {_short(ref)}, where the genome has {_short(there)}"
        )
        return MISMATCH

    def _resolved(self, name: str) -> str | None:
        """The genome's name of a sequence; None if it has none."""
        if name not in self._own_name:
            try:
                self._own_name[name] = self._genome.resolve(name)
            except ValueError:
                self._own_name[name] = None
        return self._own_name[name]


def read_allele(letters: str) -> str:
    """An allele, or what the genome has there, as they are compared: in upper case, with T for U."""
    return as_dna(letters.upper())


def _reason_of_allele(alt: str, ref: str) -> str | None:
    """Why one allele is skipped, or None."""
    if alt == "*" or set(alt) & set("<>[].:"):
        return SYMBOLIC
    if not alt or set(alt) - BASES:
        return LETTERS
    return SAME if alt == ref else None


def _short(bases: str) -> str:
    return bases if len(bases) <= 20 else f"{bases[:20]}... ({len(bases):,} bases)"
