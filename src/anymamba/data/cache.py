"""The cache of token tables and packed genomes: their keys, what is in it, and deleting them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from anymamba.base.files import own_file, remove_folder

FORMAT = 3  # part of a table's key: raise it if the same input gives another table
SOURCES_FILE = "sources.json"
_KEY = re.compile("[0-9a-f]{64}")


def default_cache() -> Path:
    """The folder where tables are cached; it may be deleted while nothing uses it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "anymamba" / "tokens"


def table_key(options: list[Any], files: Iterable[Path]) -> str:
    """The name of a table in the cache: a hash of its inputs, of files their names, sizes and times.

    Args:
        options: what decides the table beside the files, as JSON.
    """
    digest = hashlib.sha256(json.dumps(options).encode())
    for file in files:
        stat = file.stat()
        digest.update(json.dumps([str(file), str(file.resolve()), stat.st_size, stat.st_mtime_ns]).encode())
    return digest.hexdigest()


class Sources(NamedTuple):
    """What a table was made from, for those who look into the cache."""

    options: list[Any]
    tokenizer: str
    n_documents: int
    n_tokens: int
    files: list[str]

    def write(self, folder: Path) -> None:
        """Write it into a table's folder."""
        (folder / SOURCES_FILE).write_text(json.dumps(self._asdict()), encoding="utf-8")


class CachedTable(NamedTuple):
    """A table in the cache."""

    folder: Path
    n_bytes: int
    """Its size on disk."""
    last_used: float
    """When it was last built or used, in seconds since 1970."""
    sources: Sources | None
    """What it was made from; None for tables of earlier releases, which did not note it."""
    stale: str | None
    """Why no command will use it again; None if one can."""


def mark_used(folder: Path) -> None:
    """Note that a table is used now. A cache that cannot be written stays as it is."""
    with suppress(OSError):
        os.utime(folder)


def cached_tables(cache: Path) -> list[CachedTable]:
    """The tables in a cache, the last used one first. Nothing is checked against its digest."""
    tables = []
    for folder in cache.iterdir() if cache.is_dir() else ():
        if _KEY.fullmatch(folder.name):
            with suppress(FileNotFoundError):  # another process has just deleted it
                tables.append(_cached_table(folder))
    return sorted(tables, key=lambda table: -table.last_used)


def remove_table(table: CachedTable) -> None:
    """Delete a table. Raises InUseError if another process is building it."""
    with own_file(table.folder, wait=0), suppress(FileNotFoundError):
        remove_folder(table.folder)


def _cached_table(folder: Path) -> CachedTable:
    n_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    sources, stale = None, None
    if (folder / SOURCES_FILE).exists():
        try:
            sources = Sources(**json.loads((folder / SOURCES_FILE).read_text(encoding="utf-8")))
            stale = _why_stale(folder, sources)
        except (ValueError, TypeError):
            stale = f"{SOURCES_FILE} is damaged"
    return CachedTable(folder, n_bytes, folder.stat().st_mtime, sources, stale)


def _why_stale(folder: Path, sources: Sources) -> str | None:
    """Why a table will not be used again: its key would be another one now."""
    if sources.options[:1] != [FORMAT]:
        return "made by another version of anymamba"
    try:
        key = table_key(sources.options, map(Path, sources.files))
    except FileNotFoundError as error:
        return f"{error.filename} no longer exists"
    except OSError as error:
        return f"{error.filename} cannot be read"
    return None if key == folder.name else "a file has changed"
