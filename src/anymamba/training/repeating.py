"""Runs that repeat bit for bit on a GPU, whatever torch's fastest algorithms do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
"""torch wants this variable to be set before the process multiplies the first matrices on a GPU."""


def prepare() -> None:
    """Set the variable for the rest of the process, if nobody has. After a product on a GPU it is too late: torch then
    raises RuntimeError in `repeatable` and names the variable, which is to be set before the process starts."""
    os.environ.setdefault(CUBLAS, ":4096:8")


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """torch takes only algorithms that give the same bits each time, if `wanted`; its settings come back afterwards.

    The kernels of this package always do. Attention's backward pass in torch adds up in any order otherwise. An
    operation of torch that has no such algorithm raises RuntimeError on a GPU.
    """
    if not wanted:
        yield
        return
    prepare()
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
