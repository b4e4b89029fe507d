"""The forward kernels of the selective scan in Triton.

Lanes are channels. A program has a block of channels, a chunk of time and a slab of at most 16 states, each of them a
vector of its own in registers. More states take several launches, which add up y in `partial`. Where there are too few
rows and channels for the GPU, time is cut into chunks: SUMMARY runs each chunk from zero, `carry` finds the states that
arrive at each chunk from these, and a second run starts from those. Where there are many, `split_forward_kernel.py` has
a faster kernel for the commonest scans.

Rates are in units of log2(e), so that a decay is 2^(d rate). R is float32 or float64, the dtype of A. Scratch tensors
have channels last. `WHOLE` says that tokens fill their groups and channels their blocks, so that nothing needs a mask.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102 - Triton has no starred tuples, and a nested `if` may be resolved when it compiles.

import triton
import triton.language as tl

from anymamba.runtimes.triton.functions import LN2, LOG2E, exp2, expm1_ratio, load, sigmoid, softplus, store

NUMBERS = (
    *("u_row", "u_token", "delta_row", "delta_token", "z_row", "z_token", "dy_row", "dy_token"),
    *("length", "d_inner", "d_state", "first_state", "per_group", "n_groups", "batch", "chunk", "n_chunks"),
    "first_chunk",
)
"""Arguments for whose values, such as multiples of 16, nothing is compiled anew."""


@triton.jit
def place_of(per_group, n_groups, batch, first_chunk, BLOCK: tl.constexpr):
    """The block of channels, its channels, whether they exist, their group, the chunk and the row of a program."""
    of_group = (per_group + BLOCK - 1) // BLOCK
    index = tl.program_id(0)
    block = index % (of_group * n_groups)
    rest = index // (of_group * n_groups)
    group = block // of_group
    in_group = block % of_group * BLOCK + tl.arange(0, BLOCK)
    channel = (group * per_group + in_group).to(tl.int64)
    row = (rest % batch).to(tl.int64)
    return block, channel, in_group < per_group, group, rest // batch + first_chunk, row


@triton.jit
def zeros(like, N: tl.constexpr):
    """N vectors of zeros."""
    found = ()
    for _ in tl.static_range(N):
        found = found + (tl.full(like.shape, 0, like.dtype),)
    return found


@triton.jit
def columns(matrix, channel, inside, d_state, first_state, N: tl.constexpr, WHOLE: tl.constexpr):
    """The slab of a matrix (channels, states)."""
    found = ()
    for n in tl.static_range(N):
        found = found + (load(matrix + channel * d_state + first_state + n, inside, WHOLE),)
    return found


@triton.jit
def rates_of(A, channel, inside, d_state, first_state, N: tl.constexpr, WHOLE: tl.constexpr):
    """The slab of A in units of log2(e)."""
    found = ()
    for n in tl.static_range(N):
        found = found + (load(A + channel * d_state + first_state + n, inside, WHOLE) * LOG2E,)
    return found


@triton.jit
def states_of(states, sequence, channel, inside, d_inner, d_state, first_state, N: tl.constexpr, WHOLE: tl.constexpr):
    """The slab of a sequence of (sequences, channels, states)."""
    first = states + sequence * d_inner * d_state
    return columns(first, channel, inside, d_state, first_state, N, WHOLE)


@triton.jit
def initial_states(
    initial, sequence, channel, inside, zero, d_inner, d_state, first_state, N: tl.constexpr, WHOLE: tl.constexpr
):
    """The slab with which a sequence begins."""
    if initial is not None:
        return states_of(initial, sequence, channel, inside, d_inner, d_state, first_state, N, WHOLE)
    else:
        return zeros(zero, N)


@triton.jit
def step_of(delta, shift, is_token, SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr, FAST: tl.constexpr):
    """delta with its bias and after the softplus; 0 where there is no token: the state stays as it is."""
    d = delta.to(shift.dtype) + shift
    if SOFTPLUS:
        d = softplus(d, FAST)
    if not WHOLE:
        d = tl.where(is_token, d, 0.0)
    return d


@triton.jit
def put_states(
    states, h, sequence, channel, inside, d_inner, d_state, first_state, N: tl.constexpr, WHOLE: tl.constexpr
):
    first = states + sequence * d_inner * d_state
    for n in tl.static_range(N):
        store(first + channel * d_state + first_state + n, h[n], inside, WHOLE)


@triton.jit
def get_scratch(scratch, index, channel, inside, d_inner, d_state, first_state, N: tl.constexpr, WHOLE: tl.constexpr):
    """The slab of scratch (index, states, channels)."""
    found = ()
    for n in tl.static_range(N):
        place = scratch + (index.to(tl.int64) * d_state + first_state + n) * d_inner + channel
        found = found + (load(place, inside, WHOLE),)
    return found


@triton.jit
def put_scratch(
    scratch, h, index, channel, inside, d_inner, d_state, first_state, N: tl.constexpr, WHOLE: tl.constexpr
):
    for n in tl.static_range(N):
        place = scratch + (index.to(tl.int64) * d_state + first_state + n) * d_inner + channel
        store(place, h[n], inside, WHOLE)


@triton.jit
def start_of_matrix(row, group, length, n_groups, d_state, first_state, WORD: tl.constexpr):
    """Where the row, group and slab of a dense (batch, length, groups, states) begin."""
    return ((row * length * n_groups + group) * d_state + first_state) // WORD


@triton.jit
def words_at(first, is_token, COUNT: tl.constexpr, WHOLE: tl.constexpr):
    """The words of a token of B or C."""
    found = ()
    for k in tl.static_range(COUNT):
        found = found + (load(first + k, is_token, WHOLE),)
    return found


@triton.jit
def unpacked(words, R: tl.constexpr, WORD: tl.constexpr):
    """The numbers in words. WORD: the numbers that an int64 holds, four bfloat16 or two float32; or 1."""
    found = ()
    for k in tl.static_range(len(words)):
        value = words[k]
        if WORD == 1:
            found = found + (value.to(R),)
        else:
            low = value.to(tl.int32)
            high = (value >> 32).to(tl.int32)
            if WORD == 2:
                found = found + (low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
            else:
                found = found + (
                    (low << 16).to(tl.float32, bitcast=True),
                    (low & -65536).to(tl.float32, bitcast=True),
                    (high << 16).to(tl.float32, bitcast=True),
                    (high & -65536).to(tl.float32, bitcast=True),
                )
    return found


@triton.jit
def numbers(first, is_token, R: tl.constexpr, N: tl.constexpr, WORD: tl.constexpr, WHOLE: tl.constexpr):
    """The slab of a token of B or C."""
    return unpacked(words_at(first, is_token, N // WORD, WHOLE), R, WORD)


@triton.jit
def sequences_at(sequence_of, t, length, end):
    """The sequence of a token, and whether the token is its first and its last one."""
    sequence = tl.load(sequence_of + t, mask=t < end, other=-1)
    before = tl.load(sequence_of + t - 1, mask=(t > 0) & (t < end), other=-1)
    after = tl.load(sequence_of + t + 1, mask=t + 1 < length, other=-1)
    return sequence.to(tl.int64), (t < end) & (sequence != before), (t < end) & (sequence != after)


@triton.jit
def advance(h, d, x, rates, B, N: tl.constexpr, ZOH: tl.constexpr, FAST: tl.constexpr):
    """The states after a token whose step is d and whose input is x."""
    after = ()
    for n in tl.static_range(N):
        a = exp2(d * rates[n], FAST)
        weight = d * expm1_ratio(d * rates[n] * LN2, a) if ZOH else d
        after = after + (a * h[n] + weight * x * B[n],)
    return after


@triton.jit(do_not_specialize=NUMBERS)
def scan(
    u, delta, z, B, C, A, D, bias, initial, sequence_of, chunk_states, chunk_steps, saved, partial, y, last,
    u_row, u_token, delta_row, delta_token, z_row, z_token,
    length, d_inner, d_state, first_state, per_group, n_groups, batch, chunk, n_chunks, first_chunk,
    N: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, SAVED_EVERY: tl.constexpr, SUMMARY: tl.constexpr,
    ARRIVES: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, SOFTPLUS: tl.constexpr,
    ZOH: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, WORD: tl.constexpr, WHOLE: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """A chunk of time: y and the last states, or in SUMMARY its end state from zero and the sum of its steps."""
    R: tl.constexpr = A.dtype.element_ty
    _, channel, inside, group, ck, row = place_of(per_group, n_groups, batch, first_chunk, BLOCK)
    begin = ck.to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, length)
    rates = rates_of(A, channel, inside, d_state, first_state, N, WHOLE)
    zero = tl.full([BLOCK], 0, R)
    shift = load(bias + channel, inside, WHOLE) if bias is not None else zero
    skip = load(D + channel, inside, WHOLE) if D is not None else zero
    if CONSTANT_B:
        Bs = columns(B, channel, inside, d_state, first_state, N, WHOLE)
    if CONSTANT_C:
        Cs = columns(C, channel, inside, d_state, first_state, N, WHOLE)
    if ARRIVES:
        h = get_scratch(chunk_states, row * n_chunks + ck, channel, inside, d_inner, d_state, first_state, N, WHOLE)
    elif initial is not None and sequence_of is None and not SUMMARY:
        h = states_of(initial, row, channel, inside, d_inner, d_state, first_state, N, WHOLE)
    else:
        h = zeros(zero, N)
    steps = zero
    n_saved = (length + SAVED_EVERY - 1) // SAVED_EVERY
    of_token = n_groups * d_state // WORD
    u += row * u_row + channel
    delta += row * delta_row + channel
    B += 0 if CONSTANT_B else start_of_matrix(row, group, length, n_groups, d_state, first_state, WORD)
    C += 0 if CONSTANT_C else start_of_matrix(row, group, length, n_groups, d_state, first_state, WORD)
    out = row * length * d_inner + channel
    for t0 in tl.range(begin, end, TOKENS):
        if saved is not None:
            if t0 % SAVED_EVERY == 0:
                at = row * n_saved + t0 // SAVED_EVERY
                put_scratch(saved, h, at, channel, inside, d_inner, d_state, first_state, N, WHOLE)
        us = ()
        ds = ()
        zs = ()
        totals = ()  # stored after the loads of all tokens, which the compiler may move up to here
        u0 = u + t0 * u_token  # multiplications in 64 bits take several instructions
        delta0 = delta + t0 * delta_token
        z0 = z + row * z_row + channel + t0 * z_token if z is not None else None
        out0 = out + t0 * d_inner
        B0 = B if CONSTANT_B else B + t0 * of_token
        C0 = C if CONSTANT_C else C + t0 * of_token
        for i in tl.static_range(TOKENS):
            is_token = t0 + i < end
            us = us + (load(u0 + i * u_token, inside & is_token, WHOLE),)
            ds = ds + (load(delta0 + i * delta_token, inside & is_token, WHOLE),)
            if z is not None and LAST and not SUMMARY:
                zs = zs + (load(z0 + i * z_token, inside & is_token, WHOLE),)
        for i in tl.static_range(TOKENS):
            t = t0 + i
            is_token = t < end
            x = us[i].to(R)
            d = step_of(ds[i], shift, is_token, SOFTPLUS, WHOLE, FAST)
            if not CONSTANT_B:
                Bs = numbers(B0 + i * of_token, is_token, R, N, WORD, WHOLE)
            if sequence_of is not None:
                sequence, starts, ends = sequences_at(sequence_of, t, length, end)
                if starts:
                    h = initial_states(
                        initial, sequence, channel, inside, zero, d_inner, d_state, first_state, N, WHOLE
                    )
            h = advance(h, d, x, rates, Bs, N, ZOH, FAST)
            if SUMMARY:
                steps += d
            else:
                if not CONSTANT_C:
                    Cs = numbers(C0 + i * of_token, is_token, R, N, WORD, WHOLE)
                total = skip * x if FIRST and LAST else zero
                for n in tl.static_range(N):
                    total += h[n] * Cs[n]
                if not FIRST:  # added as a whole: a sum over many states, one by one, would round more
                    total += load(partial + out0 + i * d_inner, inside & is_token, WHOLE)
                    if LAST:
                        total += skip * x
                if LAST and z is not None:
                    gate = zs[i].to(R)
                    total = total * (gate * sigmoid(gate, FAST))
                totals = totals + (total,)
                if sequence_of is not None:
                    if ends:
                        put_states(last, h, sequence, channel, inside, d_inner, d_state, first_state, N, WHOLE)
        if not SUMMARY:
            for i in tl.static_range(TOKENS):
                place = (y if LAST else partial) + out0 + i * d_inner
                store(place, totals[i], inside & (t0 + i < end), WHOLE)
    if SUMMARY:
        at = row * n_chunks + ck
        put_scratch(chunk_states, h, at, channel, inside, d_inner, d_state, first_state, N, WHOLE)
        store(chunk_steps + at * d_inner + channel, steps, inside, WHOLE)
    elif sequence_of is None:
        if ck == n_chunks - 1:
            put_states(last, h, row, channel, inside, d_inner, d_state, first_state, N, WHOLE)


@triton.jit(do_not_specialize=NUMBERS)
def carry(
    A, states, steps, sequence_of, initial, length, d_inner, d_state, batch, chunk, n_chunks,
    BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """In place of the states that leave each chunk, from zero, those that arrive at it. Lanes are (state, channel)."""
    R: tl.constexpr = A.dtype.element_ty
    per_row = (d_inner * d_state + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // per_row).to(tl.int64)
    lane = (tl.program_id(0) % per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < d_inner * d_state
    channel = lane % d_inner
    of_matrix = channel * d_state + lane // d_inner
    rate = tl.load(A + of_matrix, mask=inside, other=0) * LOG2E
    h = tl.full([BLOCK], 0, R)
    if initial is not None and sequence_of is None:
        h = tl.load(initial + row * d_inner * d_state + of_matrix, mask=inside, other=0)
    for k in tl.range(0, n_chunks):
        ck = n_chunks - 1 - k if REVERSE else k
        at = row * n_chunks + ck
        leaves = inside & (k < n_chunks - 1)
        leaving = tl.load(states + at * d_inner * d_state + lane, mask=leaves, other=0)
        step = tl.load(steps + at * d_inner + channel, mask=leaves, other=0)
        tl.store(states + at * d_inner * d_state + lane, h, mask=inside)
        passed = exp2(rate * step, False) * h
        if sequence_of is not None:
            passed = tl.where(passes(sequence_of, ck.to(tl.int64) * chunk, length, chunk, REVERSE), passed, 0.0)
        h = leaving + passed


@triton.jit
def passes(sequence_of, begin, length, chunk, REVERSE: tl.constexpr):
    """Whether a state passes through the chunk: no sequence starts in it or, backwards, ends."""
    from_ = begin if REVERSE else begin - 1
    to = from_ + chunk
    exists = (from_ >= 0) & (to < length)
    same = tl.load(sequence_of + from_, mask=exists, other=0) == tl.load(sequence_of + to, mask=exists, other=1)
    return exists & same
