"""Errors and warnings about files, how an error is told in one line, and the check of a file's format version."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT_VERSION = "format_version"
"""The key that holds the version of our own file formats. A file without it has version 1."""


class CheckpointError(RuntimeError):
    """A checkpoint is truncated, corrupt, from another model, or of a kind that is refused."""


class InUseError(RuntimeError):
    """Another process is writing the file or folder."""


class CheckpointWarning(UserWarning):
    """A checkpoint is complete, but another program that reads it will compute something different."""


class DataWarning(UserWarning):
    """Data was read, but not all of it, or not used as asked."""


def one_line(error: BaseException) -> str:
    """An error's message on one line; for an OSError `file: reason`."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return f"the name {error.object!r} is not valid UTF-8, which is needed here; rename it"
    return " ".join(str(error).split()) or type(error).__name__


def require_format_version(values: Mapping[str, Any], newest: int, where: Path | str) -> None:
    """Raise CheckpointError if a file's format version is above `newest`, the version that this release writes."""
    version = values.get(FORMAT_VERSION, 1)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{where}: {FORMAT_VERSION} must be an integer of at least 1, got {version!r}")
    if version > newest:
        raise CheckpointError(
            f"{where} has format version {version}, and this anymamba reads versions up to {newest}; upgrade it: "
            "pip install --upgrade anymamba"
        )
