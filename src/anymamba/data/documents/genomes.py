"""Files of DNA and proteins, which are refused: read as text, their headers and line breaks would become tokens."""

from __future__ import annotations

import re
from pathlib import Path

FORMATS = {
    **dict.fromkeys((".fa", ".fasta", ".fna", ".ffn", ".faa", ".frn"), "FASTA"),
    **dict.fromkeys((".fastq", ".fq"), "FASTQ"),
    ".2bit": "2bit",
}
"""Suffixes of such files, without that of a compression, and their formats."""

_TWO_BIT = (b"\x1aA'C", b"C'A\x1a")  # the signature in either byte order
_NUCLEOTIDES = re.compile(rb"[ACGTURYSWKMBDHVN*.-]+", re.IGNORECASE)
_AMINO_ACIDS = re.compile(rb"[A-Z*-]+")
_LINES = 200  # that are looked at


def format_by_content(first: bytes) -> str | None:
    """The format of sequences that a file's first bytes are of; None where they are of none.

    FASTA is a line that begins with > and then nothing but letters of DNA, or long lines of capitals. A text that
    begins with a quotation is neither.
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
    """The error for a file of sequences; `sign` says how the format shows, "name" or "content"."""
    rename = "; if it is plain text, rename it to .txt" if sign == "name" else ""
    return ValueError(
        f"{file} is {kind} by its {sign}, and DNA and proteins are not read yet: as text, headers and line breaks "
        f"would become tokens and records would run together; leave it out, or write each sequence as a row of a "
        f".jsonl file{rename}"
    )
