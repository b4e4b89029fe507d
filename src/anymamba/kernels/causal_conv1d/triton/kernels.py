"""The kernels of the causal convolution in Triton.

A program has a tile of tokens and channels of one row. Where tokens or channels end inside a tile, masks say so. A
packed token knows its sequence and the offsets between which that lies; `inputs_at` reads what is before a sequence
from its initial state. R is the dtype of sums.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from anymamba.runtimes.triton.functions import sigmoid, store

NUMBERS = (
    *("x_row", "x_token", "dy_row", "dy_token", "w_channel", "w_tap"),
    *("length", "d_inner", "n_pieces"),
)
"""Arguments for whose values, such as multiples of 16, nothing is compiled anew."""


@triton.jit
def tile_of(length, d_inner, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """The row, tokens and channels of a program, and which of them exist."""
    blocks = (d_inner + BLOCK - 1) // BLOCK
    tiles = (length + TOKENS - 1) // TOKENS
    index = tl.program_id(0)
    channel = (index % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tile = index // blocks % tiles
    t = tile.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    row = (index // blocks // tiles).to(tl.int64)
    return row, t, channel, t < length, channel < d_inner, tile


@triton.jit
def sequences_at(sequence_of, offsets, row, t, is_token, length):
    """The sequence of each token, its start and its end."""
    if sequence_of is None:
        sequence = t * 0 + row
        return sequence, t * 0, t * 0 + length
    else:
        sequence = tl.load(sequence_of + t, mask=is_token, other=0).to(tl.int64)
        start = tl.load(offsets + sequence)
        return sequence, start, tl.load(offsets + sequence + 1)


@triton.jit
def inputs_at(x, initial, from_, sequence, start, channel, ok_t, ok_c, x_token, d_inner, WIDTH: tl.constexpr):
    """x at tokens `from_`, or the initial state of their sequence where they lie before its start."""
    ok = ok_t[:, None] & ok_c[None, :]
    before = (from_ < start)[:, None]
    found = tl.load(x + from_[:, None] * x_token + channel[None, :], mask=ok & (before == 0), other=0)
    if initial is not None:
        place = sequence * (WIDTH - 1) + (WIDTH - 1 + from_ - start)
        state = tl.load(initial + place[:, None] * d_inner + channel[None, :], mask=ok & before, other=0)
        found = tl.where(before, state, found)
    return found


@triton.jit
def sums_of(
    x, weight, bias, initial, sequence, start, t, channel, ok_t, ok_c, x_token, w_channel, w_tap, d_inner,
    WIDTH: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The convolution before SiLU."""
    total = tl.full([t.shape[0], channel.shape[0]], 0, R)
    for k in tl.static_range(WIDTH):
        w = tl.load(weight + channel * w_channel + k * w_tap, mask=ok_c, other=0).to(R)
        from_ = t + (k - (WIDTH - 1))
        value = inputs_at(x, initial, from_, sequence, start, channel, ok_t, ok_c, x_token, d_inner, WIDTH)
        total += w[None, :] * value.to(R)
    if bias is not None:
        total += tl.load(bias + channel, mask=ok_c, other=0).to(R)[None, :]
    return total


@triton.jit(do_not_specialize=NUMBERS)
def forward(
    x, weight, bias, initial, sequence_of, offsets, y, x_row, x_token, w_channel, w_tap, length, d_inner,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row, t, channel, ok_t, ok_c, _ = tile_of(length, d_inner, TOKENS, BLOCK)
    sequence, start, _ = sequences_at(sequence_of, offsets, row, t, ok_t, length)
    total = sums_of(
        x + row * x_row, weight, bias, initial, sequence, start, t, channel, ok_t, ok_c, x_token, w_channel, w_tap,
        d_inner, WIDTH, R,
    )  # fmt: skip
    if SILU:
        total = total * sigmoid(total, False)
    place = y + (row * length + t[:, None]) * d_inner + channel[None, :]
    store(place, total, ok_t[:, None] & ok_c[None, :], False)


@triton.jit(do_not_specialize=NUMBERS)
def slopes(
    x, weight, bias, initial, sequence_of, offsets, dy, out, x_row, x_token, dy_row, dy_token, w_channel, w_tap,
    length, d_inner,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The gradient of the convolution before SiLU, in R."""
    row, t, channel, ok_t, ok_c, _ = tile_of(length, d_inner, TOKENS, BLOCK)
    sequence, start, _ = sequences_at(sequence_of, offsets, row, t, ok_t, length)
    ok = ok_t[:, None] & ok_c[None, :]
    g = tl.load(dy + row * dy_row + t[:, None] * dy_token + channel[None, :], mask=ok, other=0).to(R)
    if SILU:
        total = sums_of(
            x + row * x_row, weight, bias, initial, sequence, start, t, channel, ok_t, ok_c, x_token, w_channel,
            w_tap, d_inner, WIDTH, R,
        )  # fmt: skip
        s = sigmoid(total, False)
        g = g * s * (1.0 + total * (1.0 - s))
    tl.store(out + (row * length + t[:, None]) * d_inner + channel[None, :], g, mask=ok)


@triton.jit(do_not_specialize=NUMBERS)
def inputs(
    g, weight, dlast, sequence_of, offsets, dx, w_channel, w_tap, length, d_inner,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx from the slopes g after each token, and from the gradient of the last state."""
    row, t, channel, ok_t, ok_c, _ = tile_of(length, d_inner, TOKENS, BLOCK)
    sequence, _, end = sequences_at(sequence_of, offsets, row, t, ok_t, length)
    total = tl.full([TOKENS, BLOCK], 0, g.dtype.element_ty)
    for k in tl.static_range(WIDTH):
        to = t + (WIDTH - 1 - k)
        ok = (ok_t & (to < end))[:, None] & ok_c[None, :]
        w = tl.load(weight + channel * w_channel + k * w_tap, mask=ok_c, other=0).to(g.dtype.element_ty)
        slope = tl.load(g + (row * length + to[:, None]) * d_inner + channel[None, :], mask=ok, other=0)
        total += tl.where(ok, w[None, :] * slope, 0.0)
    j = t - end + (WIDTH - 1)
    ok = (ok_t & (j >= 0))[:, None] & ok_c[None, :]
    place = dlast + (sequence * (WIDTH - 1) + j)[:, None] * d_inner + channel[None, :]
    total += tl.load(place, mask=ok, other=0).to(g.dtype.element_ty)
    place = dx + (row * length + t[:, None]) * d_inner + channel[None, :]
    store(place, total, ok_t[:, None] & ok_c[None, :], False)


@triton.jit(do_not_specialize=NUMBERS)
def weights(
    x, initial, g, sequence_of, offsets, parts, x_row, x_token, length, d_inner, n_pieces,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Sums over a piece of time, (pieces, width + 1, channels): for each tap, and for the bias."""
    R: tl.constexpr = g.dtype.element_ty
    row, _, channel, _, ok_c, piece = tile_of(length, d_inner, PIECE, BLOCK)
    begin = piece.to(tl.int64) * PIECE
    part = parts + (row * n_pieces + piece) * (WIDTH + 1) * d_inner + channel
    for k in tl.static_range(WIDTH + 1):
        total = tl.full([BLOCK], 0, R)
        for t0 in tl.range(begin, tl.minimum(begin + PIECE, length), TOKENS):
            t = t0 + tl.arange(0, TOKENS)
            ok_t = t < length
            ok = ok_t[:, None] & ok_c[None, :]
            slope = tl.load(g + (row * length + t[:, None]) * d_inner + channel[None, :], mask=ok, other=0)
            if k < WIDTH:
                sequence, start, _end = sequences_at(sequence_of, offsets, row, t, ok_t, length)
                value = inputs_at(
                    x + row * x_row, initial, t + (k - (WIDTH - 1)), sequence, start, channel, ok_t, ok_c, x_token,
                    d_inner, WIDTH,
                )  # fmt: skip
                slope = slope * value.to(R)
            total += tl.sum(slope, 0)
        tl.store(part + k * d_inner, total, mask=ok_c)


@triton.jit
def place_of_state(offsets, d_inner, length, BLOCK: tl.constexpr):
    """The sequence and channels of a program, the row and tokens of the sequence."""
    blocks = (d_inner + BLOCK - 1) // BLOCK
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if offsets is None:
        return sequence, channel, sequence, sequence * 0, sequence * 0 + length
    else:
        return sequence, channel, sequence * 0, tl.load(offsets + sequence), tl.load(offsets + sequence + 1)


@triton.jit(do_not_specialize=NUMBERS)
def last_states(
    x, initial, offsets, last, x_row, x_token, length, d_inner, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The last width - 1 inputs of a sequence."""
    sequence, channel, row, start, end = place_of_state(offsets, d_inner, length, BLOCK)
    inside = channel < d_inner
    for j in tl.static_range(WIDTH - 1):
        t = end - (WIDTH - 1) + j
        value = tl.load(x + row * x_row + t * x_token + channel, mask=inside & (t >= start), other=0)
        if initial is not None:
            place = initial + (sequence * (WIDTH - 1) + (WIDTH - 1 + t - start)) * d_inner + channel
            value = tl.where(t >= start, value, tl.load(place, mask=inside & (t < start), other=0))
        tl.store(last + (sequence * (WIDTH - 1) + j) * d_inner + channel, value, mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def initial_states(
    g, weight, dlast, offsets, dinitial, w_channel, w_tap, length, d_inner, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The gradient of a sequence's initial state: row m is read by tap k at token m - k."""
    R: tl.constexpr = g.dtype.element_ty
    sequence, channel, row, start, end = place_of_state(offsets, d_inner, length, BLOCK)
    inside = channel < d_inner
    for m in tl.static_range(WIDTH - 1):
        total = tl.full([BLOCK], 0, R)
        for k in tl.static_range(m + 1):
            t = start + (m - k)
            ok = inside & (t < end)
            w = tl.load(weight + channel * w_channel + k * w_tap, mask=inside, other=0).to(R)
            slope = tl.load(g + (row * length + t) * d_inner + channel, mask=ok, other=0)
            total += tl.where(ok, w * slope, 0.0)
        j = m - (end - start)  # where the row is in the last state, if it still is
        place = dlast + (sequence * (WIDTH - 1) + j) * d_inner + channel
        total += tl.load(place, mask=inside & (j >= 0), other=0).to(R)
        place = dinitial + (sequence * (WIDTH - 1) + m) * d_inner + channel
        store(place, total, inside, False)
