"""How a call of the Triton scan is split: by shapes, dtypes and device, nothing else."""

from __future__ import annotations

from typing import NamedTuple

from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.runtimes import triton

SAVED_EVERY = 64
"""Tokens between saved states, and of the shortest chunk."""

SLAB = 16
"""States of a launch: those of a channel are in the registers of one lane."""

FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 32, 24
"""Programs for each multiprocessor that a launch should have, from chunks of time if need be."""

FORWARD_TOKENS, BACKWARD_TOKENS = 4, 2
"""Tokens of a group, whose loads are issued together. More of them in backward do not fit into registers."""


class Slab(NamedTuple):
    """States that a launch works on."""

    first: int
    n: int
    is_first: bool
    is_last: bool


def slabs(d_state: int) -> list[Slab]:
    """The slabs of a state, in order; y is their sum."""
    return [Slab(n, min(SLAB, d_state - n), n == 0, n + SLAB >= d_state) for n in range(0, d_state, SLAB)]


def forward_tokens(a: ScanArguments) -> int:
    """Tokens of a group of the forward kernel: 1 where a state takes many registers."""
    return 1 if a.zoh or a.dtype.itemsize > 4 else FORWARD_TOKENS


def backward_tokens(a: ScanArguments) -> int:
    return 1 if a.zoh or a.dtype.itemsize > 4 else BACKWARD_TOKENS


def block(a: ScanArguments) -> int:
    """Channels of a program: one a lane. The sums of a token, of 16 states of dB and dC, fit into a block."""
    return triton.lanes(a.u)


def chunk(a: ScanArguments, n_blocks: int, programs: int) -> int:
    """Tokens of a chunk: so many chunks that the GPU has enough programs; in the interpreter the shortest ones."""
    wanted = programs * triton.n_multiprocessors(a.u.device)
    longest = -(-a.length // SAVED_EVERY)
    n_chunks = min(longest, -(-wanted // n_blocks)) if wanted else longest
    return -(-longest // n_chunks) * SAVED_EVERY
