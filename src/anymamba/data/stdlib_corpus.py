"""Real text on every machine: source and documentation of the running Python's standard library."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

_SUFFIXES = (".py", ".txt", ".rst", ".md")
_HELD_OUT_PERCENT = 5

# Left out: packages that are not part of the library, its tests (many distributions do not have them, and the corpus
# should be much the same everywhere), and files that the build writes for one machine.
_OTHER_FOLDERS = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")
_BUILT_PREFIXES = ("_sysconfigdata", "config-", "_sysconfig_vars")


def standard_library() -> Path:
    """The folder of the standard library; in a virtual environment, that of the base interpreter."""
    return Path(os.path.abspath(sysconfig.get_path("stdlib")))


def standard_library_files() -> list[Path]:
    """The library's source and documentation, sorted; about 750 files and 12 MB in Python 3.11.

    The documentation is the docstrings, `pydoc_data/topics.py` (the language reference, 0.76 MB, the largest file)
    and the text files. The generated tables in `encodings` are kept: they are an eighth of it at most. Tests and files
    written by the build for one machine are left out.
    """
    found = []
    for parent, folders, names in os.walk(standard_library()):
        folders[:] = [name for name in folders if name not in _OTHER_FOLDERS and not _is_private(name)]
        found += [Path(parent, name) for name in names if Path(name).suffix in _SUFFIXES and not _is_private(name)]
    if not found:
        raise FileNotFoundError(f"this Python has no source of its standard library in {standard_library()}")
    return sorted(found)


def is_held_out(name: str | Path) -> bool:
    """Whether a file is for evaluation: a hash of its path inside the standard library picks 5 % of all files.

    Args:
        name: the file's path, or its path inside the standard library (`json/decoder.py`); the result is the same.
    """
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(standard_library()):
        path = path.relative_to(standard_library())
    digest = hashlib.sha256(path.as_posix().encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % 100 < _HELD_OUT_PERCENT


def _is_private(name: str) -> bool:
    return name.startswith((".", *_BUILT_PREFIXES))
