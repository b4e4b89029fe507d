"""Finds the files that paths, folders and patterns name, and the format of each from its suffix."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from .genomes import FORMATS, refusal

TEXT_SUFFIXES = (".txt", ".md", ".py")
ROW_SUFFIXES = (".jsonl", ".csv", ".parquet")
COMPRESSION_SUFFIXES = (".gz", ".bgz", ".bz2", ".xz", ".zst")
READ = f"{' '.join(TEXT_SUFFIXES + ROW_SUFFIXES)}, also with {' '.join(COMPRESSION_SUFFIXES)}"
"""The suffixes that can be read, for messages."""
_LISTED = 8  # most suffixes that a message lists with their own counts


def find_files(
    paths: str | Path | Iterable[str | Path],
    exclude: Sequence[str] = (),
    formats: Sequence[str] = TEXT_SUFFIXES + ROW_SUFFIXES,
) -> list[Path]:
    """The files that paths name, sorted and without duplicates.

    Args:
        paths: files (any suffix; an unknown one is read as text), folders (searched for `formats`; hidden files and
            folders are skipped), or patterns with `*`, `?`, `[]` and `**`.
        exclude: patterns of files and folders to leave out: `*.min.py`, `tests`, `build/*.txt`. A pattern is compared
            with the end of the path, below the folder that `paths` names where it names one.
        formats: the suffixes to search folders for.
    Raises FileNotFoundError if a path or a pattern gives no file, ValueError for a file of DNA or proteins whose suffix
    is not among the formats.
    """
    found: dict[str, Path] = {}
    excluded = 0
    for path in [paths] if isinstance(paths, str | Path) else paths:
        root = Path(path).expanduser()
        for file in _expand(root, formats):
            if is_excluded(file.relative_to(root) if root.is_dir() else file, exclude):
                excluded += 1
            else:
                found.setdefault(os.path.realpath(file), Path(os.path.abspath(file)))
    if excluded and not found:
        raise FileNotFoundError(f"no data files: {', '.join(exclude)} (--exclude) leaves out all {excluded:,} of them")
    if not found:
        raise FileNotFoundError("no data files: give at least one file, folder or pattern")
    for file in found.values():
        if file_format(file) in FORMATS and file_format(file) not in formats:
            raise refusal(file, FORMATS[file_format(file)], "name")
    return sorted(found.values())


def is_excluded(path: Path, patterns: Sequence[str]) -> bool:
    """Whether a file or one of the folders in its path matches a pattern."""
    return any(part.match(pattern) for pattern in patterns for part in (path, *path.parents) if part.name)


def file_format(file: Path) -> str:
    """The suffix of a file's format, in lower case and without that of the compression."""
    return suffixes(file)[0]


def suffixes(file: Path) -> tuple[str, str]:
    """(suffix of the format, suffix of the compression or "") in lower case."""
    last = file.suffix.lower()
    if last in COMPRESSION_SUFFIXES:
        return Path(file.stem).suffix.lower(), last
    return last, ""


def _expand(path: Path, formats: Sequence[str]) -> list[Path]:
    """The files that one path names."""
    if path.is_dir():
        readable, others = _walk(path, formats)
        if not readable:
            raise FileNotFoundError(f"no readable file in {path}: {_sought_and_found(others, formats)}")
        return readable
    if path.is_file():
        return [path]
    if path.exists():
        raise ValueError(f"{path} is neither a file nor a folder; save the data to a file first")
    if not glob.has_magic(str(path)):
        raise FileNotFoundError(f"no such file or folder: {path}")
    return _matches(path, formats)


def _matches(pattern: Path, formats: Sequence[str]) -> list[Path]:
    """The files that a pattern matches, and those in the folders that it matches."""
    matches = [Path(match) for match in glob.glob(str(pattern), recursive=True)]
    if not matches:
        raise FileNotFoundError(f"the pattern {pattern} matches no file")
    files, others = [match for match in matches if not match.is_dir()], []
    for folder in [match for match in matches if match.is_dir()]:
        readable, rest = _walk(folder, formats)
        files += readable
        others += rest
    if not files:
        raise FileNotFoundError(f"the pattern {pattern} matches no readable file: {_sought_and_found(others, formats)}")
    return files


def _walk(folder: Path, formats: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The files below a folder with the suffixes of some formats, and those with others.

    Symbolic links are followed, but each folder is read once. Hidden files and folders are skipped.
    """
    readable: list[Path] = []
    others: list[Path] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        for file in [Path(parent, name) for name in names if real not in seen and not name.startswith(".")]:
            if file.is_file():
                known = file_format(file) in formats
                (readable if known else others).append(file)
        seen.add(real)
    return readable, others


def _sought_and_found(files: list[Path], formats: Sequence[str]) -> str:
    """The end of a message if no file has a known suffix: the suffixes that can be read, those found, the way out."""
    counts = Counter("".join(suffixes(file)) for file in set(files))  # a pattern may find a file through two folders
    kinds = sorted(counts.items(), key=lambda kind: (-kind[1], kind[0]))
    found = [f"{count:,} {suffix or 'without an ending'}" for suffix, count in kinds]
    if len(kinds) > _LISTED:
        found[_LISTED:] = [f"{sum(count for _, count in kinds[_LISTED:]):,} with other endings"]
    sequences = sorted({FORMATS[file_format(file)] for file in files if file_format(file) in FORMATS})
    refused = f"; DNA and proteins ({', '.join(sequences)}) are not text" if sequences else ""
    sought = READ if tuple(formats) == TEXT_SUFFIXES + ROW_SUFFIXES else " ".join(formats)
    return (
        f"looked for {sought}, found {', '.join(found) or 'no file that is not hidden'}{refused}; a text file with "
        f"another ending is read when it is named itself or by a pattern"
    )
