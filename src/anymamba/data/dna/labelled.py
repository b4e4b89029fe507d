"""Reads labelled sequences: a CSV, a folder in Genomic Benchmarks' layout, or FASTA with labels in its headers."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from ..documents import GENOME_SUFFIXES, file_format, open_decompressed
from .checks import Checked
from .fasta import FastaCounts, read_records
from .letters import as_dna, letters_of, other_letters, reverse_complement

Split = Literal["train", "valid", "test"]
SEQUENCE_FIELDS = ("seq", "sequence", "dna")
SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
"""Names of splits in tables, folders and BED files, in lower case."""
FASTA_SUFFIXES = tuple(suffix for suffix in GENOME_SUFFIXES if suffix != ".2bit")

EMPTY = "records without a sequence"
NO_DNA = "records with letters that DNA does not have"
NO_LABEL = "records without a label"
SHORT = "rows with fewer columns than the header"
COMMENTS = "comment lines"
OTHER_FILES = "files that are no .txt in the folder of a class"


class Sequence(NamedTuple):
    """A sequence and what is known of it."""

    name: str
    """The name in a FASTA file, the file's name, or the number of the row."""
    text: str
    """The letters, in the case of the file."""
    label: str | None
    split: Split | None
    """The split that the data has; None if it has none."""

    @property
    def digest(self) -> str:
        """Identifies the letters, whatever their case, the label, and the split that the data has."""
        return hashlib.sha256(f"{self.text.upper()}\t{self.label}\t{self.split}".encode()).hexdigest()[:16]

    @property
    def canonical(self) -> str:
        """The same text for a sequence and its reverse complement, as DNA or RNA."""
        upper = as_dna(self.text.upper())
        return min(upper, reverse_complement(upper))


class Labelled(NamedTuple):
    """Sequences, and what was skipped."""

    sequences: list[Sequence]
    skipped: dict[str, int]
    """How many records were skipped for which reason."""

    @property
    def classes(self) -> list[str]:
        """The labels, in order; numbers by their size."""
        found = {one.label for one in self.sequences if one.label is not None}
        return sorted(found, key=lambda label: (0, float(label), label) if _is_number(label) else (1, 0.0, label))

    @property
    def others(self) -> Counter[str]:
        """How many letters other than A, C, G, T and N there are, in upper case."""
        return sum((other_letters(letters_of(one.text)) for one in self.sequences), Counter())


def read_labelled(
    path: str | Path,
    *,
    label_field: str = "label",
    need_labels: bool = True,
    on_bad_row: Literal["error", "skip"] = "error",
) -> Labelled:
    """Read sequences.

    - .csv or .tsv, plain or compressed: a header with a column seq, sequence or dna, a column of labels, and perhaps
      one named split.
    - A folder in the layout of Genomic Benchmarks: train/<class>/*.txt and test/<class>/*.txt, or <class>/*.txt.
    - FASTA, plain or compressed: headers with label=..., as in `>name label=promoter`.

    Args:
        label_field: the column, or the word before "=" in headers.
        need_labels: whether a record without a label is a bad one.
        on_bad_row: what to do with a record without a sequence or a label, or with letters that DNA does not have.
    Raises ValueError, naming the record, for a bad one, and if nothing is left. FileNotFoundError if there is no such
    path.
    """
    path = Path(path).expanduser()
    bad = _Bad(on_bad_row == "skip")
    if path.is_dir():
        rows = _folder_rows(path, bad)
    else:
        kind = file_format(path)
        if kind in (".csv", ".tsv"):
            rows = _table_rows(path, "," if kind == ".csv" else "\t", label_field, need_labels, bad)
        elif kind in FASTA_SUFFIXES:
            rows = _fasta_rows(path, label_field, bad)
        else:
            raise ValueError(
                f"{path} must be a .csv, .tsv or FASTA file ({' '.join(FASTA_SUFFIXES)}), or a folder with a folder "
                "for each class; rename or convert it"
            )
    sequences = [row for row in rows if not bad.is_bad(path, row, need_labels)]
    if not sequences:
        skipped = "".join(f"; {n:,} {reason}" for reason, n in bad.skipped.items())
        raise ValueError(f"{path} has no sequence{skipped or ', it is empty'}")
    return Labelled(sequences, dict(bad.skipped))


class _Bad:
    """Counts bad records, or refuses them."""

    def __init__(self, skip: bool) -> None:
        self._skip = skip
        self.skipped: Counter[str] = Counter()

    def is_bad(self, path: Path, row: Sequence, need_labels: bool) -> bool:
        """Whether a record is skipped. Raises ValueError if bad ones are refused."""
        reason = _problem(row, need_labels)
        if reason is not None:
            self.add(f"{path}, {row.name}", *reason)
        return reason is not None

    def leave_out(self, reason: str, count: int) -> None:
        """Count what is left out by rule."""
        if count:
            self.skipped[reason] += count

    def add(self, where: str, reason: str, words: str) -> None:
        """Count a bad record, or raise."""
        if not self._skip:
            raise ValueError(f"{where}: {words}; correct it, or leave such records out (--on-bad-row skip)")
        self.skipped[reason] += 1


def _problem(row: Sequence, need_labels: bool) -> tuple[str, str] | None:
    """The reason and the words for a record that cannot be used."""
    if not row.text:
        return EMPTY, "it has no sequence"
    try:
        letters_of(row.text)
    except ValueError as error:
        return NO_DNA, str(error)
    checked = Checked("", row.name)
    checked(row.text.encode("ascii"))
    if checked.is_protein:
        return NO_DNA, "more than half of its letters are ambiguity codes, as in a protein; only DNA and RNA are read"
    if need_labels and not row.label:
        return NO_LABEL, "it has no label"
    return None


@contextmanager
def _text_of(path: Path) -> Iterator[io.TextIOWrapper]:
    with open_decompressed(path, lambda count: None) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        try:
            yield text
        finally:
            text.detach()


def _table_rows(path: Path, delimiter: str, label: str, need_labels: bool, bad: _Bad) -> Iterator[Sequence]:
    with _text_of(path) as stream:
        rows = csv.reader(stream, delimiter=delimiter)
        try:
            header = [name.strip() for name in next(rows, [])]
            pick = _picker(path, header, label, need_labels)
            for number, row in enumerate(rows, 1):
                if not row:
                    continue
                if len(row) < len(header):
                    bad.add(f"{path}, row {number:,}", SHORT, f"it has {len(row)} of {len(header)} columns")
                    continue
                yield pick(f"row {number:,}", row)
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num:,}: malformed table ({error})") from None


def _picker(path: Path, header: list[str], label: str, need_labels: bool) -> Callable[[str, list[str]], Sequence]:
    """What makes a sequence from the cells of a row."""
    lower = [name.lower() for name in header]
    text_at = next((lower.index(name) for name in SEQUENCE_FIELDS if name in lower), None)
    if text_at is None:
        raise ValueError(
            f"{path} has no column {', '.join(SEQUENCE_FIELDS[:-1])} or {SEQUENCE_FIELDS[-1]}; its columns are "
            f"{', '.join(header) or 'none'}; rename one"
        )
    label_at = header.index(label) if label in header else None
    if label_at is None and need_labels:
        raise ValueError(
            f"{path} has no column {label!r}; its columns are {', '.join(header)}; choose one with label_field "
            "(--label-field)"
        )
    split_at = lower.index("split") if "split" in lower else None

    def pick(name: str, row: list[str]) -> Sequence:
        split = None if split_at is None else _split_named(path, row[split_at].strip())
        text = "".join(row[text_at].split())
        return Sequence(name, text, None if label_at is None else row[label_at].strip() or None, split)

    return pick


def _split_named(path: Path, name: str) -> Split:
    if name.lower() not in SPLIT_NAMES:
        raise ValueError(f"{path}: the splits are {', '.join(SPLIT_NAMES)}, got {name!r}; rename it")
    return SPLIT_NAMES[name.lower()]


def _folder_rows(folder: Path, bad: _Bad) -> Iterator[Sequence]:
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    splits = [path for path in inside if path.name.lower() in SPLIT_NAMES]
    if splits and len(splits) < len(inside):
        others = ", ".join(path.name for path in inside if path not in splits)
        raise ValueError(f"{folder} has folders of splits and others: {others}; move one kind away")
    read = 0
    for top in splits or [folder]:
        split = SPLIT_NAMES[top.name.lower()] if splits else None
        for label in sorted(path for path in top.iterdir() if path.is_dir() and not path.name.startswith(".")):
            for file in sorted(path for path in label.iterdir() if path.suffix.lower() == ".txt"):
                text = "".join(file.read_text(encoding="utf-8-sig", errors="surrogateescape").split())
                read += 1
                yield Sequence(str(file.relative_to(folder)), text, label.name, split)
    bad.leave_out(OTHER_FILES, sum(file.is_file() for file in folder.rglob("*")) - read)


def _fasta_rows(path: Path, label: str, bad: _Bad) -> Iterator[Sequence]:
    found = re.compile(rf"(?:^|[\s;|]){re.escape(label)}=([^\s;|]+)")
    counts = FastaCounts()
    with open_decompressed(path, lambda count: None) as stream:
        for name, header, pieces in read_records(path, stream, counts):
            text = b"".join(pieces).decode("utf-8", "surrogateescape")
            given = found.search(header)
            yield Sequence(name, text, given[1] if given else None, None)
    bad.leave_out(COMMENTS, counts.comments)
    for name in counts.empty:
        bad.add(f"{path}, record {name}", EMPTY, "it has no sequence")


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d+(\.\d+)?", text) is not None
