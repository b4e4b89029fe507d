"""Digests of the files in a folder that this package saved. They are kept beside the files and checked on load.

The hash is SHA-256. Current x86 and ARM processors have instructions for it, which make it the fastest one in `hashlib`
(about 2 GB/s on one core). `sha256sum` and the pages of the Hugging Face hub show the same digests.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from anymamba.base.errors import FORMAT_VERSION, CheckpointError, require_format_version
from anymamba.base.files import write_json

NAME = "anymamba_manifest.json"
VERSION = 1
"""The format version that is written, and the newest that is read."""
_THREADS = 4  # files hashed at once


class FileDigest(NamedTuple):
    """What a manifest says of one file."""

    bytes: int
    sha256: str


def check(folder: Path, way_out: str | None = None) -> frozenset[str]:
    """Compare the files of a folder with its manifest and return the names of those compared; none without a manifest.

    Files that the manifest does not list and files that are missing are not compared.

    Args:
        way_out: the end of the error message; defaults to how a model folder is loaded without the check.
    Raises CheckpointError, naming the file, if one has changed, or if the manifest cannot be read.
    """
    path = folder / NAME
    if way_out is None:
        way_out = f"copy it again; if it was changed on purpose, delete {path} or pass --no-verify (verify=False)"
    while (text := _text(path)) is not None:
        files = _parsed(text, path)
        try:
            problem = _first_problem(folder, files)
        except FileNotFoundError:  # another process has just removed a file
            continue
        if problem is None:
            return frozenset(name for name in files if (folder / name).exists())
        if _text(path) == text:  # otherwise another process is saving to the folder
            raise CheckpointError(f"{problem}; {way_out}")
    return frozenset()


def write(folder: Path) -> None:
    """Write the manifest of all files in a folder, without hidden ones."""
    names = (path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    _write(folder, _digests(folder, names))


@contextmanager
def rewritten(folder: Path) -> Iterator[list[str]]:
    """Keep a folder's manifest correct while the block writes files there and appends their names to the list.

    The manifest is moved away first and written last: a process that is killed in between leaves a folder without one,
    which loads unchecked. If the block fails before it has replaced a listed file, the manifest is moved back.
    """
    path, aside = folder / NAME, folder / f".{NAME}.{os.getpid()}.tmp"
    text = _text(path)
    try:
        old = {} if text is None else _parsed(text, path)
    except CheckpointError:
        old = {}
    before = {name: _identity(folder / name) for name in old}
    if text is not None:
        path.rename(aside)
    names: list[str] = []
    try:
        yield names
    except BaseException:
        if text is not None and all(_identity(folder / name) == was for name, was in before.items()):
            aside.rename(path)
        raise
    finally:
        aside.unlink(missing_ok=True)
    kept = {name: entry for name, entry in old.items() if name not in names and (folder / name).exists()}
    if names or kept:
        _write(folder, kept | _digests(folder, names))


def sha256(path: Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(folder: Path, files: Mapping[str, FileDigest]) -> None:
    entries = {name: files[name]._asdict() for name in sorted(files)}
    write_json(folder / NAME, {FORMAT_VERSION: VERSION, "files": entries})


def _digests(folder: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """The digests of several files. hashlib releases the interpreter's lock, so threads use several cores."""
    paths = [folder / name for name in names]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(sha256, paths))
    return {path.name: FileDigest(path.stat().st_size, digest) for path, digest in zip(paths, digests, strict=True)}


def _first_problem(folder: Path, files: Mapping[str, FileDigest]) -> str | None:
    """The first file that is not as the manifest says, and why; None if there is none. Sizes are compared first."""
    present = [name for name in files if (folder / name).exists()]
    for name in present:
        size, wanted = (folder / name).stat().st_size, files[name].bytes
        if size != wanted:
            return f"{folder / name} is truncated or was replaced: it was saved with {wanted:,} bytes and has {size:,}"
    found = _digests(folder, present)
    for name in present:
        if found[name] != files[name]:
            return f"{folder / name} is damaged or was replaced: its SHA-256 is not that in {NAME}"
    return None


def _text(path: Path) -> str | None:
    """A manifest's text; None without one."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _parsed(text: str, path: Path) -> dict[str, FileDigest]:
    """The entries of a manifest. Raises CheckpointError for text that is none."""
    try:
        values = json.loads(text)
        require_format_version(values, VERSION, path)
        files = {name: FileDigest(entry["bytes"], entry["sha256"]) for name, entry in values["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); delete it to load the folder unchecked") from error
    for name in files:
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise CheckpointError(f"{path}: {name!r} must be a file beside it; delete it to load the folder unchecked")
    return files


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is replaced or written to."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
