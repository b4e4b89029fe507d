"""The folder of compiled CUDA kernels. Each file begins with a hash of what follows: a damaged one is not taken."""

from __future__ import annotations

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
    """Where compiled kernels are kept: what ANYMAMBA_CUDA_CACHE names, or in the user's cache."""
    wanted = os.environ.get(CACHE_VARIABLE)
    if wanted:
        return Path(wanted).expanduser()
    home = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    return Path(os.environ.get(home) or Path.home() / ".cache") / "anymamba" / "cuda"


def read(path: Path) -> bytes | None:
    """The cubin of a file that begins with its hash; None where there is none or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, cubin = content[:32], content[32:]
    return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None


def keep(path: Path, cubin: bytes) -> None:
    """Write a compiled kernel atomically. If that is impossible, warn once for the folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_bytes(hashlib.sha256(cubin).digest() + cubin)
    except OSError as error:
        folder = str(path.parent)
        if folder not in unkept:
            unkept[folder] = str(error)
            warnings.warn(
                f"compiled kernels are not kept for later processes: {error}; set {CACHE_VARIABLE} to a folder that "
                "can be written",
                RuntimeWarning,
                stacklevel=2,
            )


def can_keep() -> bool:
    """Whether the folder can be written, as far as is known."""
    folder = cache_folder()
    existing = next((f for f in (folder, *folder.parents) if f.exists()), folder)
    return str(folder) not in unkept and os.access(existing, os.W_OK)
