"""How OpenMP's threads wait for each other. It is read once, when torch is loaded."""

from __future__ import annotations

import os

SETTINGS = {"GOMP_SPINCOUNT": "20000"}
"""Rounds that a thread of GNU's OpenMP spins before it sleeps.

By default it spins for milliseconds. On a quiet machine that costs nothing. Beside another busy process, the threads
that wait use up the time of the one that has work. `python -m benchmarks.busy` measures both.
"""
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Variables by which a user has already chosen."""


def set_waiting() -> None:
    """Have threads that wait give up the processor soon, unless the environment says otherwise."""
    if not any(name in os.environ for name in CHOICES):
        os.environ.update(SETTINGS)
