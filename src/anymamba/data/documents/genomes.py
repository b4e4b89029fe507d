"""Detects files of DNA and proteins, which are no text: their headers and line breaks would become tokens."""

from __future__ import annotations

import re
from pathlib import Path

FORMATS = {
    **dict.fromkeys((".fa", ".fasta", ".fna", ".ffn", ".faa", ".frn"), "FASTA"),
    **dict.fromkeys((".fastq", ".fq"), "FASTQ"),
    ".2bit": "2bit",
}
"""The formats of such files by suffix, without that of the compression."""
PROTEIN_SUFFIXES = (".faa",)
GENOME_SUFFIXES = (".fa", ".fasta", ".fna", ".ffn", ".frn", ".2bit")
"""The suffixes of files of DNA or RNA."""

_TWO_BIT = (b"\x1aA'C", b"C'A\x1a")  # the signature in either byte order
_NUCLEOTIDES = re.compile(rb"[ACGTURYSWKMBDHVN*.-]+", re.IGNORECASE)
_AMINO_ACIDS = re.compile(rb"[A-Z*-]+")
_LINES = 200  # number of lines to look at


def format_by_content(first: bytes) -> str | None:
    """The sequence format of a file from its first bytes, or None.

    FASTA is a line that begins with > and then only letters of DNA, or long lines of capitals. Text that begins with a
    quotation (>) does not match.
    """
    if first.startswith(_TWO_BIT):
        return "2bit"
    if not first.startswith(b">"):
        return None
    lines = [line.rstrip() for line in first.split(b"\n", _LINES)[:_LINES]]
    sequences = [line for line in lines if line and not line.startswith((b">", b";"))]
    if not sequences:
        return None
    is_protein = max(map(len, sequences)) >= 20 and all(map(_AMINO_ACIDS.fullmatch, sequences))
    return "FASTA" if is_protein or all(map(_NUCLEOTIDES.fullmatch, sequences)) else None


def refusal(file: Path, kind: str, sign: str) -> ValueError:
    """The error for a file of sequences among texts; `sign` says how it was recognised, by "name" or "content"."""
    if kind == "FASTQ" or file_suffix(file) in PROTEIN_SUFFIXES:
        way_out = "reads and proteins are not read; leave it out"
    else:
        way_out = (
            "DNA is read by `anymamba train`, if all of its data are genomes and BED files, and by `anymamba dna`; "
            "leave it out"
        )
    rename = "if it is plain text, rename it to .txt" if sign == "name" else "if it is DNA, rename it to .fa"
    return ValueError(
        f"{file} is {kind} by its {sign} and is not read as text, since headers and line breaks would become tokens; "
        f"{way_out}, or {rename}"
    )


def file_suffix(file: Path) -> str:
    """The suffix of a file's format; one of a compression is skipped."""
    return next((s.lower() for s in reversed(file.suffixes[-2:]) if s.lower() in FORMATS), "")
