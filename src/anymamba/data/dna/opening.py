"""Chooses how a genome file is read."""

from __future__ import annotations

from pathlib import Path

from .packed import PackedReader, Progress, open_packed
from .reader import Reader


def open_file(path: Path, cache_dir: Path | None, progress: Progress | None) -> tuple[Reader, tuple[str, ...]]:
    """A reader of a genome file, and what was found or skipped in it, one line each."""
    if not path.is_file():
        what = "a folder; name the file in it" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}")
    reader = open_packed(path, cache_dir, progress)
    return reader, packed_notes(reader)


def packed_notes(reader: PackedReader) -> tuple[str, ...]:
    """What a packed file had beside the bases."""
    counts = reader.counts
    odd = {letter: n for letter, n in counts["letters"].items() if letter not in ("N", "lower")}
    lines = []
    if odd:
        listed = ", ".join(f"{n:,} {letter}" for letter, n in sorted(odd.items()))
        lines.append(f"letters other than A, C, G, T and N: {listed}")
    if counts["empty"]:
        lines.append(f"skipped {len(counts['empty']):,} empty records, the first {counts['empty'][0]!r}")
    if counts["comments"]:
        lines.append(f"skipped {counts['comments']:,} comment lines")
    return tuple(lines)
