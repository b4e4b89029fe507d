"""Files and folders that are written whole or not at all, whatever stops the process or fills the disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, flushed to disk, when the block ends well."""
    temporary = _beside(path)
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A path beside `path`, of a folder that the block makes, which takes its place, flushed to disk, at a good end.

    Raises OSError where `path` is a folder that holds something, unless `replace` lets it go.
    """
    temporary = _beside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        for entry in [*temporary.iterdir(), temporary]:
            flush(entry)
        if path.exists():
            shutil.rmtree(path) if replace else path.rmdir()
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file of text, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any, indent: int | None = 2) -> None:
    """Write a file of JSON, whole or not at all. Raises ValueError for numbers that JSON does not know."""
    write_text(path, json.dumps(values, indent=indent, allow_nan=False) + "\n")


def flush(path: Path) -> None:
    """Have a file or folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
