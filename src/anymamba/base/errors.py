"""What goes wrong with files: broken ones, those of a newer release, and what other programs make of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT_VERSION = "format_version"
"""The key of a file's format version, in formats of our own; a file without it has version 1."""


class CheckpointError(RuntimeError):
    """A checkpoint that is truncated, corrupt, of another model, or of a kind that is refused."""


class CheckpointWarning(UserWarning):
    """A checkpoint was written whole, but another program that reads it will do something otherwise."""


def require_format_version(values: Mapping[str, Any], newest: int, where: Path | str) -> None:
    """Raise CheckpointError for a file of a newer format version than `newest`, which is the one that we write."""
    version = values.get(FORMAT_VERSION, 1)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{where}: {FORMAT_VERSION} must be an integer of at least 1, got {version!r}")
    if version > newest:
        raise CheckpointError(
            f"{where} has format version {version}, and this anymamba reads versions up to {newest}; upgrade it: "
            "pip install --upgrade anymamba"
        )
