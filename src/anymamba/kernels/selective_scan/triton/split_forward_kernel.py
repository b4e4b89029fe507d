"""The forward kernel of the selective scan in Triton for many rows and channels: a channel's states are on four lanes.

A program is one warp, with a block of channels and the whole of time: it needs no chunks, whose states would be
computed twice. Tensors have one number a lane, and four lanes in a row belong to one channel. Each has four of its 16
states.

Time goes in tiles of four tokens. In a tile, each of the four lanes has one of the tokens, so that what does not depend
on the state (softplus, gate, D u) is computed once for a token. `from_lane` hands a token to all four lanes, and
`sum_over_lanes` adds up what each of them has found for the four tokens.

Tensors have one dimension because Triton then has only one layout to choose: lane i has number i.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102 - as in forward_kernels.py.

import triton
import triton.language as tl

from anymamba.kernels.selective_scan.triton.forward_kernels import (
    NUMBERS,
    put_scratch,
    put_states,
    rates_of,
    start_of_matrix,
    states_of,
    step_of,
    unpacked,
    words_at,
    zeros,
)
from anymamba.runtimes.triton.functions import exp2, load, sigmoid, store

LANES = tl.constexpr(4)
"""Lanes of a channel, and tokens of a tile."""


@triton.jit
def lane_place(per_group, n_groups, BLOCK: tl.constexpr):
    """The channel of each lane, which of its four lanes it is, the group and the row. Blocks fill their group."""
    of_group = per_group // BLOCK
    block = tl.program_id(0) % (of_group * n_groups)
    row = (tl.program_id(0) // (of_group * n_groups)).to(tl.int64)
    index = tl.arange(0, BLOCK * LANES)
    return (block * BLOCK + index // LANES).to(tl.int64), index % LANES, block // of_group, row


@triton.jit
def from_lane(x, i: tl.constexpr, FAST: tl.constexpr):
    """What lane i of the four lanes of a channel has."""
    if FAST:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x1c1f, -1;", "=f,f,r", [x, i], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.gather(x, tl.arange(0, x.shape[0]) // LANES * LANES + i, 0)


@triton.jit
def from_other(x, BIT: tl.constexpr, FAST: tl.constexpr):
    """What the lane has whose number differs in a bit."""
    if FAST:
        return tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, -1;", "=f,f,r", [x, BIT], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.gather(x, tl.arange(0, x.shape[0]) ^ BIT, 0)


@triton.jit
def exchange(zero, one, part, BIT: tl.constexpr, FAST: tl.constexpr):
    """Sums over two lanes that differ in a bit: the lane whose bit is 0 gets that of `zero`, the other one of `one`."""
    is_one = (part & BIT) != 0
    return tl.where(is_one, one, zero) + from_other(tl.where(is_one, zero, one), BIT, FAST)


@triton.jit
def sum_over_lanes(found, part, FAST: tl.constexpr):
    """The sums over the four lanes of what each has found for tokens 0 to 3, as a tile."""
    low = exchange(found[0], found[1], part, 1, FAST)
    high = exchange(found[2], found[3], part, 1, FAST)
    return exchange(low, high, part, 2, FAST)


@triton.jit
def moved(places, strides, tokens):
    """Places so many tokens later."""
    found = ()
    for k in tl.static_range(len(places)):
        found = found + (places[k] + tokens * strides[k],)
    return found


@triton.jit
def group_at(
    rows, strides, matrices, t, part, length,
    N: tl.constexpr, OF_TOKEN: tl.constexpr, WORD: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Tiles of u, delta and z, and words of B and C of each token, of the group that begins at t and these places."""
    tiles = ()
    for row in tl.static_range(len(rows)):
        of_row = ()
        for k in tl.static_range(TILES):
            place = rows[row] + k * LANES * strides[row]
            of_row = of_row + (load(place, t + k * LANES + part < length, WHOLE),)
        tiles = tiles + (of_row,)
    words = ()
    for m in tl.static_range(2):
        of_matrix = ()
        for i in tl.static_range(TILES * LANES):
            is_token = t + i + part * 0 < length
            of_matrix = of_matrix + (words_at(matrices[m] + i * OF_TOKEN, is_token, N // WORD, WHOLE),)
        words = words + (of_matrix,)
    return tiles, words


@triton.jit
def run_tile(h, d, x, rates, Bs, Cs, part, WORD: tl.constexpr, FAST: tl.constexpr):
    """The states after the four tokens of a tile, and the tile of C h. Bs and Cs: their words for each token."""
    drive = d * x
    found = ()
    for i in tl.static_range(LANES):
        B = unpacked(Bs[i], d.dtype, WORD)
        C = unpacked(Cs[i], d.dtype, WORD)
        d_i = from_lane(d, i, FAST)
        drive_i = from_lane(drive, i, FAST)
        after = ()
        for n in tl.static_range(len(h)):
            after = after + (exp2(d_i * rates[n], FAST) * h[n] + drive_i * B[n],)
        h = after
        total = h[0] * C[0]
        for n in tl.static_range(1, len(h)):
            total += h[n] * C[n]
        found = found + (total,)
    return h, sum_over_lanes(found, part, FAST)


@triton.jit
def run_group(
    h, group, y, t, part, length, d_inner, rates, shift, skip,
    SOFTPLUS: tl.constexpr, WORD: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The states after the group that begins at t; puts its y."""
    tiles, words = group
    for k in tl.static_range(TILES):
        is_token = t + k * LANES + part < length
        x = tiles[0][k].to(shift.dtype)
        d = step_of(tiles[1][k], shift, is_token, SOFTPLUS, WHOLE, FAST)
        Bs = words[0][k * LANES : (k + 1) * LANES]
        Cs = words[1][k * LANES : (k + 1) * LANES]
        h, total = run_tile(h, d, x, rates, Bs, Cs, part, WORD, FAST)
        total += skip * x
        if len(tiles) == 3:
            gate = tiles[2][k].to(shift.dtype)
            total = total * (gate * sigmoid(gate, FAST))
        store(y + k * LANES * d_inner, total, is_token, WHOLE)
    return h


@triton.jit(do_not_specialize=NUMBERS)
def scan_split(
    u, delta, z, B, C, A, D, bias, initial, saved, y, last,
    u_row, u_token, delta_row, delta_token, z_row, z_token,
    length, d_inner, d_state, per_group, n_groups,
    BLOCK: tl.constexpr, N: tl.constexpr, OF_TOKEN: tl.constexpr, TILES: tl.constexpr, SAVED_EVERY: tl.constexpr,
    SOFTPLUS: tl.constexpr, WORD: tl.constexpr, WHOLE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The whole of time of a block of channels: y, the last states and, every SAVED_EVERY tokens, the states before."""
    TOKENS: tl.constexpr = TILES * LANES
    channel, part, group, row = lane_place(per_group, n_groups, BLOCK)
    first, inside = part * N, part < LANES
    rates = rates_of(A, channel, inside, d_state, first, N, True)
    zero = tl.full([BLOCK * LANES], 0, A.dtype.element_ty)
    shift = tl.load(bias + channel) if bias is not None else zero
    skip = tl.load(D + channel) if D is not None else zero
    h = zeros(zero, N)
    if initial is not None:
        h = states_of(initial, row, channel, inside, d_inner, d_state, first, N, True)
    rows = (u + row * u_row + channel + part * u_token, delta + row * delta_row + channel + part * delta_token)
    strides = (u_token, delta_token)
    if z is not None:
        rows = rows + (z + row * z_row + channel + part * z_token,)
        strides = strides + (z_token,)
    start = start_of_matrix(row, group, length, n_groups, d_state, 0, WORD) + part * (N // WORD)
    matrices = (B + start, C + start)
    y += row * length * d_inner + channel + part * d_inner
    n_saved = (length + SAVED_EVERY - 1) // SAVED_EVERY
    now = group_at(rows, strides, matrices, 0, part, length, N, OF_TOKEN, WORD, TILES, WHOLE)
    # Two groups in turn: each is loaded while the other is run. The branches keep the compiler of NVIDIA from putting
    # off these loads until they are needed, and two names for the groups from copying registers.
    for t0 in tl.range(0, (length + 2 * TOKENS - 1) // (2 * TOKENS) * (2 * TOKENS), 2 * TOKENS):
        t1 = t0 + TOKENS
        t2 = t0 + 2 * TOKENS
        to_t1 = TOKENS if t1 < length or not WHOLE else 0  # without masks, stay where there are tokens
        to_t2 = 2 * TOKENS if t2 < length or not WHOLE else 0
        rows_1 = moved(rows, strides, to_t1)
        matrices_1 = moved(matrices, (OF_TOKEN, OF_TOKEN), to_t1)
        later = group_at(rows_1, strides, matrices_1, t1, part, length, N, OF_TOKEN, WORD, TILES, WHOLE)
        if saved is not None:
            if t0 % SAVED_EVERY == 0:
                at = row * n_saved + t0 // SAVED_EVERY
                put_scratch(saved, h, at, channel, inside, d_inner, d_state, first, N, True)
        if t0 < length:
            h = run_group(h, now, y, t0, part, length, d_inner, rates, shift, skip, SOFTPLUS, WORD, TILES, WHOLE, FAST)
        rows = moved(rows, strides, to_t2)
        matrices = moved(matrices, (OF_TOKEN, OF_TOKEN), to_t2)
        now = group_at(rows, strides, matrices, t2, part, length, N, OF_TOKEN, WORD, TILES, WHOLE)
        if t1 < length:
            y1 = y + TOKENS * d_inner
            h = run_group(
                h, later, y1, t1, part, length, d_inner, rates, shift, skip, SOFTPLUS, WORD, TILES, WHOLE, FAST
            )
        y += 2 * TOKENS * d_inner
    put_states(last, h, row, channel, inside, d_inner, d_state, first, N, True)
