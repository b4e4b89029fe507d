"""Chooses how a genome file is read."""

from __future__ import annotations

from pathlib import Path

from ..documents import format_by_content
from .content import BgzipFile, MappedFile
from .indexed import IndexedReader
from .letters import odd_in_words
from .packed import PackedReader, Progress, open_packed
from .reader import Reader
from .two_bit import TwoBitReader


def open_file(path: Path, cache_dir: Path | None, progress: Progress | None) -> tuple[Reader, tuple[str, ...]]:
    """A reader of a genome file, and what was found or skipped in it, one line each."""
    if not path.is_file():
        what = "is a folder; name the file in it" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"the genome {path} {what}")
    if is_two_bit(path):
        two_bit = TwoBitReader(path)
        if not two_bit.lengths:
            raise ValueError(f"{path} has no sequence: all of its {len(two_bit.empty)} are empty")
        return two_bit, _two_bit_notes(two_bit)
    indexed, notes = _open_indexed(path)
    if indexed is not None:
        return indexed, notes + empty_note(indexed.empty) + _unlisted_note(indexed.unlisted)
    packed = open_packed(path, cache_dir, progress)
    return packed, notes + packed_notes(packed)


def is_two_bit(path: Path) -> bool:
    """Whether a file is .2bit by its name or its first bytes."""
    with path.open("rb") as file:
        return path.suffix.lower() == ".2bit" or format_by_content(file.read(4)) == "2bit"


def _open_indexed(path: Path) -> tuple[IndexedReader | None, tuple[str, ...]]:
    """A reader in place, where the indices are there and not older than the file."""
    index, blocks = path.with_name(f"{path.name}.fai"), path.with_name(f"{path.name}.gzi")
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    needed = [index, blocks] if compressed else [index]
    if not all(file.is_file() for file in needed) or not path.stat().st_size:
        return None, ()
    old = [file for file in needed if file.stat().st_mtime_ns < path.stat().st_mtime_ns]
    if old:
        return None, (f"{old[0]} is older than {path.name} and is not used",)
    content = BgzipFile(path, blocks) if compressed else MappedFile(path)
    try:
        return IndexedReader(path, index, content), ()
    except BaseException:
        content.close()
        raise


def packed_notes(reader: PackedReader) -> tuple[str, ...]:
    """What a packed file had beside the bases."""
    counts = reader.counts
    odd = {letter: n for letter, n in counts["letters"].items() if letter != "lower"}
    lines = [odd_in_words(odd)] if odd else []
    if counts["comments"]:
        lines.append(f"skipped {counts['comments']:,} comment lines")
    return (*lines, *empty_note(counts["empty"]))


def _two_bit_notes(reader: TwoBitReader) -> tuple[str, ...]:
    """What a .2bit file had beside the bases."""
    unknown = reader.n_unknown
    return (*([odd_in_words({"N": unknown})] if unknown else []), *empty_note(reader.empty))


def empty_note(names: list[str]) -> tuple[str, ...]:
    """A line about records without a letter, if there are any."""
    plural = "" if len(names) == 1 else "s"
    return (f"skipped {len(names):,} empty record{plural}, the first {names[0]!r}",) if names else ()


def _unlisted_note(names: list[str]) -> tuple[str, ...]:
    return (f"skipped records that the index does not list, the first {names[0]!r}",) if names else ()
