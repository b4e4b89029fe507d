"""The compiled CPU module: loaded once, and why it is absent.

This version ships none; `reason()` is what `anymamba info` prints for the backend `cpu`.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType


@cache
def load() -> ModuleType | None:
    """The compiled module, or None where it is not installed."""
    try:
        return importlib.import_module("anymamba._native")
    except ImportError:
        return None


def reason() -> str | None:
    """Why the compiled module is absent, in words; None where it is there."""
    return None if load() is not None else "this version has no compiled CPU kernels"
