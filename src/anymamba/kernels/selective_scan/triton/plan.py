"""How a call of the Triton scan is split: by shapes, dtypes and device, nothing else."""

from __future__ import annotations

from typing import NamedTuple

import torch

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

SPLIT_STATES, SPLIT_LANES = 16, 4
"""States of a channel that a second forward kernel splits over lanes, and these lanes."""

SPLIT_WARPS_NEEDED = 8
"""Warps for each multiprocessor from which that kernel serves: it does not cut time into chunks."""

SPLIT_TILES = 2
"""Tiles of four tokens of a group of that kernel if B and C are in words of four. Others take more registers, and have
one tile. On an H200 one tile took 1.4 times as long, and programs of two or four warps as long as those of one."""


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


def splits(a: ScanArguments) -> bool:
    """Whether the forward kernel is the one that splits the states of a channel over lanes; see SPLIT_WARPS_NEEDED."""
    per_warp = triton.lanes(a.u) // SPLIT_LANES
    return (
        a.d_state == SPLIT_STATES
        and a.B.ndim == a.C.ndim == 4
        and not a.zoh
        and a.cu_seqlens is None
        and a.dtype == torch.float32
        and a.d_inner // a.n_groups % per_warp == 0
        and a.batch * a.d_inner // per_warp >= SPLIT_WARPS_NEEDED * triton.n_multiprocessors(a.u.device)
    )
