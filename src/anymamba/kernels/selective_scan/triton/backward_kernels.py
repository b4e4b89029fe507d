"""The backward kernels of the selective scan in Triton; see forward_kernels.py for the layout.

The chunk is walked backwards, SAVED_EVERY tokens at a time: from the state that forward saved, those before every group
of TOKENS are computed once more (`checkpoints`), then those of a group are kept in registers. For a state

    e = dh + C g         gradient of h, g that of the scan's own output
    dC = g h,  dB = weight u e,  du += weight B e
    dh = a e             gradient of the state before
    dA += d dh h[t-1],   ddelta += A dh h[t-1] + a' B u e

where weight and a' are d and 1, or of the zero-order hold (a - 1) / A and a; dA has another term then. The gradients of
selective B and C are sums over channels: each block of channels writes its part, and the parts are added in order.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102 - Triton has no starred tuples, and a nested `if` may be resolved when it compiles.

import triton
import triton.language as tl

from anymamba.kernels.selective_scan.triton.forward_kernels import (
    NUMBERS,
    advance,
    columns,
    get_scratch,
    initial_states,
    numbers,
    place_of,
    put_scratch,
    put_states,
    rates_of,
    sequences_at,
    start_of_matrix,
    states_of,
    step_of,
    zeros,
)
from anymamba.runtimes.triton.functions import (
    LN2,
    LOG2E,
    exp2,
    expm1_ratio,
    expm1_ratio_slope,
    load,
    sigmoid,
    store,
)


@triton.jit
def sums_of_lanes(values, BLOCK: tl.constexpr, COUNT: tl.constexpr, LEVELS: tl.constexpr):
    """The sums over lanes of COUNT = 2^LEVELS vectors in one vector: lane i has sum i // (BLOCK / COUNT).

    Each level joins pairs of vectors: every lane keeps its half of one and gives the other away, so that all of it
    takes about as many exchanges as there are vectors.
    """
    lane = tl.arange(0, BLOCK)
    for level in tl.static_range(LEVELS):
        upper = (lane & (BLOCK >> (level + 1))) != 0
        joined = ()
        for k in tl.static_range(COUNT >> (level + 1)):
            other = values[k + (COUNT >> (level + 1))]
            given = tl.where(upper, values[k], other)
            joined = joined + (tl.where(upper, other, values[k]) + tl.gather(given, lane ^ (BLOCK >> (level + 1)), 0),)
        values = joined
    found = values[0]
    for level in tl.static_range(LEVELS, 10):
        if BLOCK >> (level + 1) > 0:
            found += tl.gather(found, lane ^ (BLOCK >> (level + 1)), 0)
    return found


@triton.jit(do_not_specialize=NUMBERS)
def reverse_summary(
    dy, delta, z, C, A, bias, dlast, sequence_of, chunk_states, chunk_steps,
    dy_row, dy_token, delta_row, delta_token, z_row, z_token,
    length, d_inner, d_state, first_state, per_group, n_groups, batch, chunk, n_chunks, first_chunk,
    N: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, CONSTANT_C: tl.constexpr, SOFTPLUS: tl.constexpr,
    WORD: tl.constexpr, WHOLE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The gradient of the state that arrives at a chunk, from its own outputs, and the sum of its steps."""
    R: tl.constexpr = A.dtype.element_ty
    _, channel, inside, group, ck, row = place_of(per_group, n_groups, batch, first_chunk, BLOCK)
    begin = ck.to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, length)
    rates = rates_of(A, channel, inside, d_state, first_state, N, WHOLE)
    zero = tl.full([BLOCK], 0, R)
    shift = load(bias + channel, inside, WHOLE) if bias is not None else zero
    if CONSTANT_C:
        Cs = columns(C, channel, inside, d_state, first_state, N, WHOLE)
    dh = zeros(zero, N)
    steps = zero
    n_tiles = (end - begin + TOKENS - 1) // TOKENS
    of_token = n_groups * d_state // WORD
    delta += row * delta_row + channel
    dy += row * dy_row + channel
    C += 0 if CONSTANT_C else start_of_matrix(row, group, length, n_groups, d_state, first_state, WORD)
    for k in tl.range(0, n_tiles):
        t0 = begin + (n_tiles - 1 - k) * TOKENS
        delta0 = delta + t0 * delta_token
        dy0 = dy + t0 * dy_token
        z0 = z + row * z_row + channel + t0 * z_token if z is not None else None
        C0 = C if CONSTANT_C else C + t0 * of_token
        for i in tl.static_range(TOKENS - 1, -1, -1):
            t = t0 + i
            is_token = t < end
            given = load(delta0 + i * delta_token, inside & is_token, WHOLE)
            d = step_of(given, shift, is_token, SOFTPLUS, WHOLE, FAST)
            g = load(dy0 + i * dy_token, inside & is_token, WHOLE).to(R)
            if z is not None:
                gate = load(z0 + i * z_token, inside & is_token, WHOLE).to(R)
                g = g * (gate * sigmoid(gate, FAST))
            if not CONSTANT_C:
                Cs = numbers(C0 + i * of_token, is_token, R, N, WORD, WHOLE)
            if sequence_of is not None:
                sequence, starts, ends = sequences_at(sequence_of, t, length, end)
                if ends:
                    dh = states_of(dlast, sequence, channel, inside, d_inner, d_state, first_state, N, WHOLE)
            before = ()
            for n in tl.static_range(N):
                before = before + (exp2(d * rates[n], FAST) * (dh[n] + g * Cs[n]),)
            dh = before
            if sequence_of is not None:
                if starts & (t > 0):  # the row's first state has a gradient, too
                    dh = zeros(zero, N)
            steps += d
    at = row * n_chunks + ck
    put_scratch(chunk_states, dh, at, channel, inside, d_inner, d_state, first_state, N, WHOLE)
    store(chunk_steps + at * d_inner + channel, steps, inside, WHOLE)


@triton.jit(do_not_specialize=NUMBERS)
def scan_backward(
    u, delta, z, dy, B, C, A, D, bias, initial, dlast, sequence_of, chunk_states, saved, checkpoints, partial,
    du, ddelta, dz, dinitial, dA_parts, dB_parts, dC_parts, dD_parts, dbias_parts, token_parts,
    u_row, u_token, delta_row, delta_token, z_row, z_token, dy_row, dy_token,
    length, d_inner, d_state, first_state, per_group, n_groups, batch, chunk, n_chunks,
    N: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, SAVED_EVERY: tl.constexpr, ARRIVES: tl.constexpr, CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr, SOFTPLUS: tl.constexpr, ZOH: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    WORD: tl.constexpr, WHOLE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk.

    `token_parts` are sums over the block's channels, for dB, dC or both: COUNT = 2^LEVELS numbers a token, WIDTH of
    each, which is not below N.
    """
    R: tl.constexpr = A.dtype.element_ty
    block, channel, inside, group, ck, row = place_of(per_group, n_groups, batch, 0, BLOCK)
    begin = ck.to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, length)
    of_chunk = row * n_chunks + ck
    rates = rates_of(A, channel, inside, d_state, first_state, N, WHOLE)
    zero = tl.full([BLOCK], 0, R)
    shift = load(bias + channel, inside, WHOLE) if bias is not None else zero
    skip = load(D + channel, inside, WHOLE) if D is not None else zero
    if CONSTANT_B:
        Bs = columns(B, channel, inside, d_state, first_state, N, WHOLE)
        dBs = zeros(zero, N)
    if CONSTANT_C:
        Cs = columns(C, channel, inside, d_state, first_state, N, WHOLE)
        dCs = zeros(zero, N)
    if ARRIVES:
        dh = get_scratch(chunk_states, of_chunk, channel, inside, d_inner, d_state, first_state, N, WHOLE)
    elif sequence_of is None:
        dh = states_of(dlast, row, channel, inside, d_inner, d_state, first_state, N, WHOLE)
    else:
        dh = zeros(zero, N)
    dAs = zeros(zero, N)
    dD = zero
    dbias = zero
    lane = tl.arange(0, BLOCK)
    of_token = n_groups * d_state // WORD
    u += row * u_row + channel
    delta += row * delta_row + channel
    dy += row * dy_row + channel
    B += 0 if CONSTANT_B else start_of_matrix(row, group, length, n_groups, d_state, first_state, WORD)
    C += 0 if CONSTANT_C else start_of_matrix(row, group, length, n_groups, d_state, first_state, WORD)
    token_part = (block.to(tl.int64) * batch + row) * length * COUNT + lane // (BLOCK // COUNT if COUNT > 0 else 1)
    size = batch * length * d_inner.to(tl.int64)
    n_saved = (length + SAVED_EVERY - 1) // SAVED_EVERY
    n_pieces = (end - begin + SAVED_EVERY - 1) // SAVED_EVERY
    for back in tl.range(0, n_pieces):
        piece = n_pieces - 1 - back
        first = begin + piece * SAVED_EVERY
        n_tiles = (tl.minimum(end - first, SAVED_EVERY) + TOKENS - 1) // TOKENS
        at = row * n_saved + first // SAVED_EVERY
        h = get_scratch(saved, at, channel, inside, d_inner, d_state, first_state, N, WHOLE)
        for k in tl.range(0, n_tiles):
            at = tl.program_id(0).to(tl.int64) * (SAVED_EVERY // TOKENS) + k
            put_scratch(checkpoints, h, at, lane, inside, BLOCK, N, 0, N, True)
            t0 = first + k * TOKENS
            u0 = u + t0 * u_token
            delta0 = delta + t0 * delta_token
            B0 = B if CONSTANT_B else B + t0 * of_token
            for i in tl.static_range(TOKENS):
                t = t0 + i
                is_token = t < end
                x = load(u0 + i * u_token, inside & is_token, WHOLE).to(R)
                given = load(delta0 + i * delta_token, inside & is_token, WHOLE)
                d = step_of(given, shift, is_token, SOFTPLUS, WHOLE, FAST)
                if not CONSTANT_B:
                    Bs = numbers(B0 + i * of_token, is_token, R, N, WORD, WHOLE)
                if sequence_of is not None:
                    sequence, starts, _ = sequences_at(sequence_of, t, length, end)
                    if starts:
                        h = initial_states(
                            initial, sequence, channel, inside, zero, d_inner, d_state, first_state, N, WHOLE
                        )
                h = advance(h, d, x, rates, Bs, N, ZOH, FAST)
        for back_tile in tl.range(0, n_tiles):
            k = n_tiles - 1 - back_tile
            t0 = first + k * TOKENS
            at = tl.program_id(0).to(tl.int64) * (SAVED_EVERY // TOKENS) + k
            h = get_scratch(checkpoints, at, lane, inside, BLOCK, N, 0, N, True)
            u0 = u + t0 * u_token
            delta0 = delta + t0 * delta_token
            dy0 = dy + t0 * dy_token
            z0 = z + row * z_row + channel + t0 * z_token if z is not None else None
            B0 = B if CONSTANT_B else B + t0 * of_token
            C0 = C if CONSTANT_C else C + t0 * of_token
            out0 = row * length * d_inner + channel + t0 * d_inner
            befores = ()
            afters = ()
            decays = ()
            ys = ()
            ds = ()
            for i in tl.static_range(TOKENS):
                t = t0 + i
                is_token = t < end
                x = load(u0 + i * u_token, inside & is_token, WHOLE).to(R)
                given = load(delta0 + i * delta_token, inside & is_token, WHOLE)
                d = step_of(given, shift, is_token, SOFTPLUS, WHOLE, FAST)
                if not CONSTANT_B:
                    Bs = numbers(B0 + i * of_token, is_token, R, N, WORD, WHOLE)
                if not CONSTANT_C:
                    Cs = numbers(C0 + i * of_token, is_token, R, N, WORD, WHOLE)
                if sequence_of is not None:
                    sequence, starts, _ = sequences_at(sequence_of, t, length, end)
                    if starts:
                        h = initial_states(
                            initial, sequence, channel, inside, zero, d_inner, d_state, first_state, N, WHOLE
                        )
                own = zero
                after = ()
                decay = ()
                for n in tl.static_range(N):
                    a = exp2(d * rates[n], FAST)
                    weight = d * expm1_ratio(d * rates[n] * LN2, a) if ZOH else d
                    new = a * h[n] + weight * x * Bs[n]
                    own += new * Cs[n]
                    after = after + (new,)
                    decay = decay + (a,)
                befores = befores + (h,)
                afters = afters + (after,)
                decays = decays + (decay,)
                ys = ys + (own,)
                ds = ds + (d,)
                h = after
            for i in tl.static_range(TOKENS - 1, -1, -1):
                t = t0 + i
                is_token = t < end
                ok = inside & is_token
                x = load(u0 + i * u_token, ok, WHOLE).to(R)
                d = ds[i]
                of_y = load(dy0 + i * dy_token, ok, WHOLE).to(R)
                g = of_y
                if z is not None:
                    gate = load(z0 + i * z_token, ok, WHOLE).to(R)
                    opened = sigmoid(gate, FAST)
                    g = of_y * (gate * opened)
                if not CONSTANT_B:
                    Bs = numbers(B0 + i * of_token, is_token, R, N, WORD, WHOLE)
                if not CONSTANT_C:
                    Cs = numbers(C0 + i * of_token, is_token, R, N, WORD, WHOLE)
                if sequence_of is not None:
                    sequence, starts, ends = sequences_at(sequence_of, t, length, end)
                    if ends:
                        dh = states_of(dlast, sequence, channel, inside, d_inner, d_state, first_state, N, WHOLE)
                of_x = zero
                of_d = zero
                new_dh = ()
                new_dA = ()
                new_dB = ()
                new_dC = ()
                for n in tl.static_range(N):
                    a = decays[i][n]
                    e = dh[n] + g * Cs[n]
                    drive = e * Bs[n]
                    arriving = a * e
                    p = arriving * befores[i][n]
                    dA = dAs[n] + p * d
                    of_d += p * rates[n]
                    weight = d
                    if ZOH:
                        xA = d * rates[n] * LN2
                        ratio = expm1_ratio(xA, a)
                        weight = d * ratio
                        dA += x * d * d * expm1_ratio_slope(xA, a, ratio) * drive
                        of_d += (x * a * drive) * LOG2E
                        of_x += weight * drive
                    else:
                        of_x += drive
                    dB = x * weight * e
                    dC = g * afters[i][n]
                    if CONSTANT_B:
                        new_dB = new_dB + (dBs[n] + dB,)
                    else:
                        new_dB = new_dB + (dB if WHOLE else tl.where(inside, dB, 0.0),)
                    if CONSTANT_C:
                        new_dC = new_dC + (dCs[n] + dC,)
                    else:
                        new_dC = new_dC + (dC if WHOLE else tl.where(inside, dC, 0.0),)
                    new_dA = new_dA + (dA,)
                    new_dh = new_dh + (arriving,)
                dh = new_dh
                dAs = new_dA
                values = ()
                if CONSTANT_B:
                    dBs = new_dB
                else:
                    values = values + new_dB + zeros(zero, WIDTH - N)
                if CONSTANT_C:
                    dCs = new_dC
                else:
                    values = values + new_dC + zeros(zero, WIDTH - N)
                if COUNT > 0:
                    written = is_token & (lane % (BLOCK // COUNT) == 0)
                    sums = sums_of_lanes(values, BLOCK, COUNT, LEVELS)
                    store(token_parts + token_part + t * COUNT, sums, written, WHOLE and COUNT == BLOCK)
                of_d = of_d * LN2
                if not ZOH:
                    of_d += x * of_x
                    of_x = d * of_x
                own = ys[i]
                out = out0 + i * d_inner
                if not FIRST:
                    own += load(partial + out, ok, WHOLE)
                    of_x += load(partial + size + out, ok, WHOLE)
                    of_d += load(partial + 2 * size + out, ok, WHOLE)
                if LAST:
                    if z is not None:
                        slope = opened * (1.0 + gate * (1.0 - opened))
                        store(dz + out, of_y * (own + skip * x) * slope, ok, WHOLE)
                    if SOFTPLUS:
                        raw = load(delta0 + i * delta_token, ok, WHOLE).to(R) + shift
                        of_d = tl.where(raw > 20.0, of_d, of_d * sigmoid(raw, FAST))
                    store(du + out, of_x + skip * g, ok, WHOLE)
                    store(ddelta + out, of_d, ok, WHOLE)
                    dD += g * x
                    dbias += of_d if WHOLE else tl.where(is_token, of_d, 0.0)
                else:
                    store(partial + out, own, ok, WHOLE)
                    store(partial + size + out, of_x, ok, WHOLE)
                    store(partial + 2 * size + out, of_d, ok, WHOLE)
                if sequence_of is not None:
                    if starts:
                        if dinitial is not None:
                            put_states(dinitial, dh, sequence, channel, inside, d_inner, d_state, first_state, N, WHOLE)
                        dh = zeros(zero, N)
    put_scratch(dA_parts, dAs, of_chunk, channel, inside, d_inner, d_state, first_state, N, WHOLE)
    if CONSTANT_B:
        put_scratch(dB_parts, dBs, of_chunk, channel, inside, d_inner, d_state, first_state, N, WHOLE)
    if CONSTANT_C:
        put_scratch(dC_parts, dCs, of_chunk, channel, inside, d_inner, d_state, first_state, N, WHOLE)
    if LAST:
        if dD_parts is not None:
            store(dD_parts + of_chunk * d_inner + channel, dD, inside, WHOLE)
        if dbias_parts is not None:
            store(dbias_parts + of_chunk * d_inner + channel, dbias, inside, WHOLE)
    if dinitial is not None and sequence_of is None:
        if ck == 0:
            put_states(dinitial, dh, row, channel, inside, d_inner, d_state, first_state, N, WHOLE)
