"""The folder of compiled CUDA kernels. Each file begins with a hash of what follows: a damaged one is not taken."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import warnings
from pathlib import Path

from anymamba.base.files import atomic_file

CACHE_VARIABLE = "ANYMAMBA_CUDA_CACHE"
"""Environment variable that moves the folder of compiled kernels."""

unkept: dict[str, str] = {}
"""Why a folder cannot be written, by its path."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: what ANYMAMBA_CUDA_CACHE names, or in the user's cache.

    The path still begins with `~` if that home folder is not known. Nothing is kept then.
    """
    wanted = os.environ.get(CACHE_VARIABLE)
    if wanted:
        folder = Path(wanted)
    else:
        home = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
        folder = Path(os.environ.get(home) or "~/.cache") / "anymamba" / "cuda"
    try:
        return folder.expanduser()
    except RuntimeError:
        return folder


def _require_home(path: Path) -> None:
    """Raise FileNotFoundError for a path that begins with `~`: it would be a folder of that name in the current one."""
    if str(path).startswith("~"):
        raise FileNotFoundError(errno.ENOENT, "the home folder is not known", str(path))


def read(path: Path) -> bytes | None:
    """The cubin of a file that begins with its hash; None where there is none or it is damaged."""
    try:
        _require_home(path)
        content = path.read_bytes()
    except OSError:
        return None
    digest, cubin = content[:32], content[32:]
    return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None


def keep(path: Path, cubin: bytes) -> None:
    """Write a compiled kernel atomically. If that is impossible, warn once for the folder, until it can be written."""
    folder = str(path.parent)
    try:
        _require_home(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_bytes(hashlib.sha256(cubin).digest() + cubin)
        unkept.pop(folder, None)
    except OSError as error:
        if folder not in unkept:
            unkept[folder] = str(error)
            warnings.warn(
                f"compiled kernels are not kept for later processes: {error}; set {CACHE_VARIABLE} to a folder that "
                "can be written",
                RuntimeWarning,
                stacklevel=2,
            )


def can_keep() -> bool:
    """Whether the folder can be written or made, as far as is known."""
    folder = cache_folder()
    if str(folder) in unkept:
        return False
    try:
        _require_home(folder)
        existing = next((f for f in (folder, *folder.parents) if _is_there(f)), folder)
        return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    except OSError:
        return False


def _is_there(path: Path) -> bool:
    """Whether there is anything at a path, also a link to nowhere. Raises OSError where that cannot be known."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True
