"""Which files a user means by paths, folders and patterns, and what their suffixes say."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

TEXT_SUFFIXES = (".txt", ".md", ".py")
ROW_SUFFIXES = (".jsonl", ".csv", ".parquet")
COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


def find_files(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """The files that paths mean, sorted and each once.

    Args:
        paths: files (any suffix; an unknown one is read as text), folders (searched for the suffixes that are known,
            hidden files and folders left out), or patterns with `*`, `?`, `[]` and `**`.
    Raises FileNotFoundError for a path or a pattern that leads to no file.
    """
    found: dict[str, Path] = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        for file in _expand(Path(path).expanduser()):
            found.setdefault(os.path.realpath(file), Path(os.path.abspath(file)))
    if not found:
        raise FileNotFoundError("no data files: give at least one file, folder or pattern")
    return sorted(found.values())


def file_format(file: Path) -> str:
    """The suffix of a file's format, in lower case and without that of a compression."""
    return suffixes(file)[0]


def suffixes(file: Path) -> tuple[str, str]:
    """(suffix of the format, suffix of the compression or "") in lower case."""
    last = file.suffix.lower()
    if last in COMPRESSION_SUFFIXES:
        return Path(file.stem).suffix.lower(), last
    return last, ""


def _expand(path: Path) -> list[Path]:
    """The files that one path means."""
    if path.is_dir():
        inside = _walk(path)
        if not inside:
            known = " ".join((*TEXT_SUFFIXES, *ROW_SUFFIXES))
            raise FileNotFoundError(
                f"no readable file in {path}: looked for {known}, also {' '.join(COMPRESSION_SUFFIXES)}"
            )
        return inside
    if path.is_file():
        return [path]
    if path.exists():
        raise ValueError(f"{path} is neither a file nor a folder; save the data to a file first")
    if not glob.has_magic(str(path)):
        raise FileNotFoundError(f"no such file or folder: {path}")
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    files = [file for match in matches for file in (_walk(match) if match.is_dir() else [match])]
    if not files:
        raise FileNotFoundError(f"the pattern {path} matches no file")
    return files


def _walk(folder: Path) -> list[Path]:
    """The files with known suffixes below a folder, symbolic links followed, each folder once."""
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            files = (Path(parent, name) for name in names if not name.startswith("."))
            found += [file for file in files if file_format(file) in TEXT_SUFFIXES + ROW_SUFFIXES and file.is_file()]
        seen.add(real)
    return found
