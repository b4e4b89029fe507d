// The gradients of the selective scan, for real A and selective B and C.
//
// A tile is the 64 tokens between saved states: PIECES pieces, of which each warp takes every fourth. For each tile, from
// the last to the first, the state runs forward through the pieces once more (nothing is kept but what enters each), then
// its gradient runs backward; both go from warp to warp, step by step, through the same places in shared memory. For one
// state
//
//     h = a h[t-1] + w B   recomputed;  y += C h
//     e = dh + C g         gradient of h;  g is that of the scan's own output
//     x = a e h[t-1]       gradient of d A:  dA += x d,  ddelta += x A,  dh = a e
//     dC += g h,  dB += w e,  du += d B e,  ddelta += u B e
//
// dB and dC are sums over channels: each block writes its part, sum_pieces adds them in order.
//
// Launch: four lanes share the states of four channels, so that sums over channels are short; 4 warps, and three blocks on
// a multiprocessor for registers' sake; for float32, whose tokens take more shared memory, two.
#include "pieces.cuh"

static_assert(SHARE == 4 && CHANNELS == 4 && TOKENS == 4, "the exchanges between lanes are written for these");
constexpr int PIECES = SAVED_EVERY / TOKENS, ROUNDS = PIECES / WARPS;
constexpr int ROW = TOKENS * BLOCK_CHANNELS, PLANE = GROUP * BLOCK_CHANNELS;

struct alignas(16) OfBlock {
    float entering[PIECES][PLANE];  // the state before a piece; later the gradient of that state; (state, channel)
    float saved[PLANE];             // entering[0] and saved take turns in being what was saved before the tile
    float d[PIECES][ROW];           // (token, channel)
    float matrices[PIECES][2][GROUP * TOKENS];  // B and C as (state, token)
    float g[WARPS][ROW];
    float bias[BLOCK_CHANNELS], D[BLOCK_CHANNELS];
    float exchange[WARPS][512];
    Element raw[WARPS][2][3 * ROW];  // u, delta, B, C or u, z, dy of a piece: this one and the next
    Barrier passed[PIECES][STEPS];   // what enters a piece is there: forward, then backward
};
struct alignas(16) OfGroup {  // of states
    float rates[PLANE], leaving[PLANE], dA[PLANE];  // leaving: the gradient that leaves the tile
    Barrier passed[STEPS];                          // it is there
};
constexpr int SUMS = 3 * SAVED_EVERY * BLOCK_CHANNELS;  // y, du, ddelta of a tile, where there are several groups

// Sums over the lanes that share channels of values (token, channel): lane i of them gets those of token i.
DEVICE void sum_to_owner(float (&out)[CHANNELS], const float (&values)[TOKENS][CHANNELS], float* exchange, int lane) {
    const int owner = lane / SHARE * SHARE, part = lane % SHARE;
    sync_warp();
#pragma unroll
    for (int t = 0; t < TOKENS; t++) store(exchange + (t * 32 + owner + (part ^ t)) * 4, values[t]);
    sync_warp();
    load(out, exchange + (part * 32 + owner + part) * 4);
#pragma unroll
    for (int i = 1; i < SHARE; i++) {
        float more[CHANNELS];
        load(more, exchange + (part * 32 + owner + (i ^ part)) * 4);
#pragma unroll
        for (int s = 0; s < CHANNELS; s++) out[s] += more[s];
    }
}

// Where in `exchange` a lane puts the values of its four tokens, and where the one that adds them up reads.
DEVICE int exchange_place(int which, int part, int owner) { return (which * 32 + part * 8 + ((owner + 2 * part) & 7)) * 4; }

// Where a warp is: for each tile, from the last, and each group of states its pieces forward and then backward.
struct Visit {
    int tile, group, visit;
    DEVICE explicit Visit(int last_tile) : tile(last_tile), group(0), visit(0) {}
    DEVICE int turn() const { return visit / (2 * ROUNDS); }
    DEVICE bool is_forward() const { return visit % (2 * ROUNDS) < ROUNDS; }
    DEVICE int piece(int warp) const {
        const int step = visit % (2 * ROUNDS);
        return (step < ROUNDS ? step : 2 * ROUNDS - 1 - step) * WARPS + warp;
    }
    DEVICE void advance(int groups) {
        if (++visit % (2 * ROUNDS) == 0 && ++group == groups) group = 0, tile--;
    }
};

KERNEL(THREADS, BLOCKS) scan_backward(PARAMETER Parameters p) {
    const Place at = place_of_block(p, BLOCK_CHANNELS, 0);
    const int lane = threadIdx.x % 32, warp = shuffle(int(threadIdx.x / 32), 0);
    const int part = lane % SHARE, owner = lane / SHARE, c0 = owner * CHANNELS, my_count = at.count - c0;
    const int groups = int(p.states) / GROUP, length = int(at.end - at.begin);
    const int n_tiles = (length + SAVED_EVERY - 1) / SAVED_EVERY;
    const i64 first_tile = at.begin / SAVED_EVERY, n_saved = (p.length + SAVED_EVERY - 1) / SAVED_EVERY;

    OfBlock& block = *reinterpret_cast<OfBlock*>(shared_memory());
    OfGroup* of_groups = reinterpret_cast<OfGroup*>(&block + 1);
    float* sums = reinterpret_cast<float*>(of_groups + groups);
    float *exchange = block.exchange[warp], *my_g = block.g[warp];

    const u8 *start_u = start_of(p.u, at, sizeof(Element), false), *start_delta = start_of(p.delta, at, sizeof(Element), false);
    const u8 *start_z = start_of(p.z, at, sizeof(Element), false), *start_dy = start_of(p.dy, at, sizeof(Element), false);
    const u8 *start_B = start_of(p.B, at, sizeof(Element), true), *start_C = start_of(p.C, at, sizeof(Element), true);

    int sequences = -1;  // around the piece that is staged next
    Visit next(n_tiles - 1);
    const auto stage_next = [&]() {
        const int piece = next.piece(warp), from = next.tile * SAVED_EVERY + piece * TOKENS, tokens = length - from;
        Element* raw = block.raw[warp][next.visit & 1];
        stage<BLOCK_CHANNELS>(raw, start_u, p.u, from, tokens, at.count, lane);
        if (next.is_forward()) {
            const int column = next.group * GROUP, columns = int(p.d_state) - column, offset = column * int(sizeof(Element));
            stage<BLOCK_CHANNELS>(raw + ROW, start_delta, p.delta, from, tokens, at.count, lane);
            stage<GROUP>(raw + 2 * ROW, start_B + offset, p.B, from, tokens, columns, lane);
            stage<GROUP>(raw + 2 * ROW + TOKENS * GROUP, start_C + offset, p.C, from, tokens, columns, lane);
            if (piece == 0) {
                float* to = next.turn() & 1 ? block.saved : block.entering[0];
                const i64 plane = (at.row * n_saved + first_tile + next.tile) * p.states + next.group * GROUP;
                const float* saved = reinterpret_cast<const float*>(p.saved) + plane * p.channels + at.padded;
                for (int i = lane * 4; i < PLANE; i += 128)
                    copy_16_bytes(to + i, saved + i / BLOCK_CHANNELS * p.channels + i % BLOCK_CHANNELS, true);
            }
        } else {
            if (p.z.data) stage<BLOCK_CHANNELS>(raw + ROW, start_z, p.z, from, tokens, at.count, lane);
            stage<BLOCK_CHANNELS>(raw + 2 * ROW, start_dy, p.dy, from, tokens, at.count, lane);
        }
        end_of_copies();
        sequences = sequences_around(p, at.begin + from, TOKENS, lane);
        next.advance(groups);
    };
    stage_next();

    for (int i = threadIdx.x; i < groups * PLANE; i += THREADS) {
        const int c = i % BLOCK_CHANNELS, n = i / BLOCK_CHANNELS, group = i / PLANE, k = i % PLANE;
        const bool ok = c < at.count && n < p.d_state;
        const i64 arriving = ((at.row * p.n_chunks + at.chunk) * p.states + n) * p.channels + at.padded + c;
        of_groups[group].rates[k] =
            ok ? LOG2_E * reinterpret_cast<const float*>(p.A)[(at.channel + c) * p.d_state + n] : 0.f;
        of_groups[group].leaving[k] = p.n_chunks > 1 ? reinterpret_cast<const float*>(p.chunk_states)[arriving] : 0.f;
        of_groups[group].dA[k] = 0.f;
    }
    for (int i = threadIdx.x; i < PIECES * STEPS; i += THREADS) start_barrier(&block.passed[i / STEPS][i % STEPS]);
    for (int i = threadIdx.x; i < groups * STEPS; i += THREADS) start_barrier(&of_groups[i / STEPS].passed[i % STEPS]);
    if (warp == 0 && part == 0) {
        float v[CHANNELS];
        read_vector(v, p.delta_bias, at.channel + c0, my_count);
        store(block.bias + c0, v);
        read_vector(v, p.D, at.channel + c0, my_count);
        store(block.D + c0, v);
    }
    float dD[CHANNELS], dbias[CHANNELS], dA_of_step[CHANNELS];
#pragma unroll
    for (int s = 0; s < CHANNELS; s++) dD[s] = dbias[s] = dA_of_step[s] = 0.f;
    float* dA_place = of_groups[0].dA + part * BLOCK_CHANNELS + c0;  // of dA_of_step, which is not added yet
    sync_block();

#pragma unroll 1
    for (Visit now(n_tiles - 1); now.tile >= 0; now.advance(groups)) {
        const int tile = now.tile, group = now.group, piece = now.piece(warp);
        const int first = tile * SAVED_EVERY + piece * TOKENS, tokens = length - first;
        const int around = sequences;
        OfGroup& own = of_groups[group];
        const float* saved = now.turn() & 1 ? block.saved : block.entering[0];
        const Element* raw = block.raw[warp][now.visit & 1];
        wait_for_copies<0>();
        sync_warp();
        if (next.tile >= 0) stage_next();

        if (now.is_forward()) {  // the state, forward
            {
                float v[CHANNELS], bias[CHANNELS];
                load(bias, block.bias + c0);
                read<DTYPE>(v, raw + ROW + part * BLOCK_CHANNELS + c0);
#pragma unroll
                for (int s = 0; s < CHANNELS; s++) {
                    v[s] += bias[s];
                    if (p.softplus) v[s] = softplus_fast(v[s]);
                    v[s] = part < tokens ? v[s] : 0.f;
                }
                store(&block.d[piece][part * BLOCK_CHANNELS + c0], v);
                // 128 numbers of B and C: (which, token, state), four states a lane
                const int which = lane / 16, t = lane % 16 / 4, n = lane % 4 * 4;
                read<DTYPE>(v, raw + 2 * ROW + lane * 4);
#pragma unroll
                for (int i = 0; i < 4; i++) block.matrices[piece][which][(n + i) * TOKENS + t] = v[i];
            }
            sync_warp();
            if (piece == PIECES - 1) continue;  // its states are of no use yet
            float d[TOKENS][CHANNELS], w[TOKENS][CHANNELS];
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                load(d[t], &block.d[piece][t * BLOCK_CHANNELS + c0]);
                read<DTYPE>(w[t], raw + t * BLOCK_CHANNELS + c0);
#pragma unroll
                for (int s = 0; s < CHANNELS; s++) w[t][s] *= d[t][s];
            }
            const float* from = piece == 0 ? saved : block.entering[piece];
            const Boundaries edges = boundaries_of(p, around, at.begin + first, TOKENS, tokens, lane);
            const auto steps = [&](auto with_edges) {
                constexpr bool EDGES = decltype(with_edges)::value;
#pragma unroll (EDGES ? 1 : STEPS)
                for (int j = 0; j < STEPS; j++) {
                    const int n = j * SHARE + part, place = n * BLOCK_CHANNELS + c0;
                    float rate[CHANNELS], h[CHANNELS], a[TOKENS][CHANNELS], B[TOKENS];
                    load(rate, own.rates + place);
                    load(B, &block.matrices[piece][0][n * TOKENS]);
#pragma unroll
                    for (int t = 0; t < TOKENS; t++)
#pragma unroll
                        for (int s = 0; s < CHANNELS; s++) a[t][s] = exp2_fast(d[t][s] * rate[s]);
                    if (piece > 0) wait(&block.passed[piece][j], 0);
                    load(h, from + place);
#pragma unroll
                    for (int t = 0; t < TOKENS; t++) {
                        if (EDGES && edges.starts >> t & 1)
                            read_states(h, p.initial_state, p, sequence_at(p, at, around, t), at.channel + c0, my_count,
                                        group * GROUP + n);
#pragma unroll
                        for (int s = 0; s < CHANNELS; s++) h[s] = fmaf(a[t][s], h[s], w[t][s] * B[t]);
                    }
                    store(&block.entering[piece + 1][place], h);
                    sync_warp();
                    if (lane == 0) arrive(&block.passed[piece + 1][j]);
                }
            };
            if (edges.starts == 0) {
                steps(No());
            } else {
                steps(Yes());
            }
        } else {  // its gradient, backward
            {
                float z[CHANNELS], v[CHANNELS];
                read<DTYPE>(v, raw + 2 * ROW + part * BLOCK_CHANNELS + c0);
                if (p.z.data) {
                    read<DTYPE>(z, raw + ROW + part * BLOCK_CHANNELS + c0);
#pragma unroll
                    for (int s = 0; s < CHANNELS; s++) v[s] *= z[s] * sigmoid_fast(z[s]);
                }
                store(my_g + part * BLOCK_CHANNELS + c0, v);
            }
            sync_warp();
            const float* my_d = block.d[piece] + c0;  // read again where it is needed: registers are short
            float w[TOKENS][CHANNELS];
            float y[TOKENS][CHANNELS], q[TOKENS][CHANNELS], r[TOKENS][CHANNELS];  // sums of C h, B e and x rate
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                float d[CHANNELS];
                load(d, my_d + t * BLOCK_CHANNELS);
                read<DTYPE>(w[t], raw + t * BLOCK_CHANNELS + c0);
#pragma unroll
                for (int s = 0; s < CHANNELS; s++) w[t][s] *= d[s], y[t][s] = q[t][s] = r[t][s] = 0.f;
            }
            const bool is_first = piece == 0, is_last = piece == PIECES - 1;
            const float* from = is_first ? saved : block.entering[piece];
            const float* from_after = is_last ? own.leaving : block.entering[is_last ? 0 : piece + 1];
            float* to_before = is_first ? own.leaving : block.entering[piece];
            const Barrier* passed_after = is_last ? own.passed : block.passed[is_last ? 0 : piece + 1];
            Barrier* passed_before = is_first ? own.passed : block.passed[piece];
            const u32 parity = is_last ? (n_tiles - tile) & 1 : 1;  // at first there is nothing to wait for
            const Boundaries edges = boundaries_of(p, around, at.begin + first, TOKENS, tokens, lane);
            float* part_of_piece =
                reinterpret_cast<float*>(p.dB_parts) +
                ((((at.block * p.batch + at.row) * n_saved + first_tile + tile) * PIECES + piece) * groups + group) * 128;

            const auto steps = [&](auto with_edges) {
                constexpr bool EDGES = decltype(with_edges)::value;
#pragma unroll (EDGES ? 1 : STEPS / 2)
                for (int pair = 0; pair < STEPS / 2; pair++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int j = pair * 2 + half, n = j * SHARE + part, place = n * BLOCK_CHANNELS + c0;
                        float rate[CHANNELS], h[CHANNELS], dh[CHANNELS], B[TOKENS], C[TOKENS];
                        float a[TOKENS][CHANNELS], before[TOKENS][CHANNELS], after[TOKENS][CHANNELS];
                        float of_B[TOKENS], of_C[TOKENS];
                        load(rate, own.rates + place);
                        load(B, &block.matrices[piece][0][n * TOKENS]);
                        load(C, &block.matrices[piece][1][n * TOKENS]);
                        if (is_last) wait(&block.passed[piece][j], 0);  // all others have waited before
                        load(h, from + place);
#pragma unroll
                        for (int t = 0; t < TOKENS; t++) {
                            if (EDGES && edges.starts >> t & 1)
                                read_states(h, p.initial_state, p, sequence_at(p, at, around, t), at.channel + c0,
                                            my_count, group * GROUP + n);
                            float d[CHANNELS];
                            load(d, my_d + t * BLOCK_CHANNELS);
#pragma unroll
                            for (int s = 0; s < CHANNELS; s++) {
                                a[t][s] = exp2_fast(d[s] * rate[s]);
                                before[t][s] = h[s];
                                h[s] = fmaf(a[t][s], h[s], w[t][s] * B[t]);
                                after[t][s] = h[s];
                                y[t][s] = fmaf(C[t], h[s], y[t][s]);
                            }
                        }
                        wait(passed_after + j, parity);
                        load(dh, from_after + place);
#pragma unroll
                        for (int t = TOKENS - 1; t >= 0; t--) {
                            float g[CHANNELS];
                            load(g, my_g + t * BLOCK_CHANNELS + c0);
                            if (EDGES && edges.ends >> t & 1)
                                read_states(dh, p.dlast_state, p, sequence_at(p, at, around, t), at.channel + c0,
                                            my_count, group * GROUP + n);
                            of_B[t] = 0.f;
#pragma unroll
                            for (int s = 0; s < CHANNELS; s++) {
                                const float e = fmaf(C[t], g[s], dh[s]);
                                dh[s] = a[t][s] = e * a[t][s];
                                of_B[t] = fmaf(e, w[t][s], of_B[t]);
                                q[t][s] = fmaf(e, B[t], q[t][s]);
                            }
                            if (EDGES && edges.starts >> t & 1) {
                                const i64 sequence = sequence_at(p, at, around, t);
                                if (p.dinitial_state)
                                    write_states(p.dinitial_state, dh, p, sequence, at.channel + c0, my_count,
                                                 group * GROUP + n);
#pragma unroll
                                for (int s = 0; s < CHANNELS; s++) dh[s] = 0.f;
                            }
                        }
                        store(to_before + place, dh);
                        {  // in the order of the pieces, since the warp of the piece after has passed this on
                            float sum[CHANNELS];
                            load(sum, dA_place);
#pragma unroll
                            for (int s = 0; s < CHANNELS; s++) sum[s] += dA_of_step[s];
                            store(dA_place, sum);
                            dA_place = own.dA + place;
                        }
                        sync_warp();
                        if (lane == 0) arrive(passed_before + j);

#pragma unroll
                        for (int s = 0; s < CHANNELS; s++) dA_of_step[s] = 0.f;
#pragma unroll
                        for (int t = 0; t < TOKENS; t++) {
                            float g[CHANNELS], d[CHANNELS];
                            load(g, my_g + t * BLOCK_CHANNELS + c0);
                            load(d, my_d + t * BLOCK_CHANNELS);
                            of_C[t] = 0.f;
#pragma unroll
                            for (int s = 0; s < CHANNELS; s++) {
                                of_C[t] = fmaf(g[s], after[t][s], of_C[t]);
                                const float x = a[t][s] * before[t][s];
                                r[t][s] = fmaf(x, rate[s], r[t][s]);
                                dA_of_step[s] = fmaf(x, d[s], dA_of_step[s]);
                            }
                        }
                        store(exchange + exchange_place(half, part, owner), of_B);
                        store(exchange + exchange_place(2 + half, part, owner), of_C);
                    }
                    sync_warp();
                    {  // two lanes add up the four tokens of a state's B or C, over every other owner each
                        const int sum_of = lane / 2, which = sum_of / 8, half = sum_of / 4 % 2, of_part = sum_of % 4;
                        float sum[TOKENS];
                        load(sum, exchange + exchange_place(2 * which + half, of_part, lane % 2));
#pragma unroll
                        for (int i = 1; i < OWNERS / 2; i++) {
                            float more[TOKENS];
                            load(more, exchange + exchange_place(2 * which + half, of_part, 2 * i + lane % 2));
#pragma unroll
                            for (int t = 0; t < TOKENS; t++) sum[t] += more[t];
                        }
#pragma unroll
                        for (int t = 0; t < TOKENS; t++) sum[t] += shuffle_xor(sum[t], 1);
                        const int n = (pair * 2 + half) * SHARE + of_part;
                        if (lane % 2 == 0) store(part_of_piece + (which * GROUP + n) * TOKENS, sum);
                    }
                    sync_warp();
                }
            };
            if ((edges.starts | edges.ends) == 0) {
                steps(No());
            } else {
                steps(Yes());
            }

            float own_y[CHANNELS], own_q[CHANNELS], own_r[CHANNELS];  // of token `part`, over all states
            sum_to_owner(own_y, y, exchange, lane);
            sum_to_owner(own_q, q, exchange, lane);
            sum_to_owner(own_r, r, exchange, lane);
            if (groups > 1) {
                float* mine = sums + ((piece * TOKENS + part) * BLOCK_CHANNELS + c0);
                float* const all[] = {own_y, own_q, own_r};
#pragma unroll
                for (int k = 0; k < 3; k++) {
                    float sum[CHANNELS];
#pragma unroll
                    for (int s = 0; s < CHANNELS; s++) sum[s] = 0.f;
                    if (group > 0) load(sum, mine + k * SUMS / 3);
#pragma unroll
                    for (int s = 0; s < CHANNELS; s++) all[k][s] = sum[s] += all[k][s];
                    store(mine + k * SUMS / 3, sum);
                }
            }
            if (group + 1 == groups && part < tokens && my_count > 0) {
                const i64 index = (at.row * p.length + at.begin + first + part) * p.d_inner + at.channel + c0;
                const i64 offset = index * i64(sizeof(Element));
                const int row = part * BLOCK_CHANNELS + c0;
                float u[CHANNELS], of_d[CHANNELS], g[CHANNELS], D[CHANNELS], out[CHANNELS];
                load(D, block.D + c0);
                read<DTYPE>(u, raw + row);
                load(of_d, &block.d[piece][row]);
                load(g, my_g + row);
                if (p.z.data) {
                    float z[CHANNELS], dy[CHANNELS];
                    read<DTYPE>(z, raw + ROW + row);
                    read<DTYPE>(dy, raw + 2 * ROW + row);
#pragma unroll
                    for (int s = 0; s < CHANNELS; s++) {
                        const float gate = sigmoid_fast(z[s]), before_gate = p.D ? fmaf(D[s], u[s], own_y[s]) : own_y[s];
                        out[s] = dy[s] * before_gate * gate * fmaf(z[s], 1.f - gate, 1.f);
                    }
                    write_some(p.dz.data + offset, p.dz.aligned, out, my_count);
                }
#pragma unroll
                for (int s = 0; s < CHANNELS; s++) {
                    out[s] = own_q[s] * of_d[s];
                    if (p.D) out[s] = fmaf(D[s], g[s], out[s]);
                    dD[s] = fmaf(g[s], u[s], dD[s]);
                }
                write_some(p.du.data + offset, p.du.aligned, out, my_count);
#pragma unroll
                for (int s = 0; s < CHANNELS; s++) {
                    out[s] = fmaf(own_r[s], LN_2, u[s] * own_q[s]);
                    if (p.softplus) out[s] *= softplus_slope_fast(of_d[s]);
                    dbias[s] += out[s];
                }
                write_some(p.ddelta.data + offset, p.ddelta.aligned, out, my_count);
            }
            sync_warp();  // raw and g are filled again
        }
    }

    for (int w = WARPS - 1; w >= 0; w--) {  // what each warp has not added yet, in the order of the pieces
        sync_block();
        if (warp != w) continue;
        float sum[CHANNELS];
        load(sum, dA_place);
#pragma unroll
        for (int s = 0; s < CHANNELS; s++) sum[s] += dA_of_step[s];
        store(dA_place, sum);
    }
    sync_block();
    const i64 of_chunk = at.row * p.n_chunks + at.chunk;
    float* dA = reinterpret_cast<float*>(p.dA_parts) + of_chunk * p.states * p.channels + at.padded;
    for (int i = threadIdx.x; i < groups * PLANE; i += THREADS)
        dA[i / BLOCK_CHANNELS * p.channels + i % BLOCK_CHANNELS] = of_groups[i / PLANE].dA[i % PLANE];
    float* parts = block.entering[0] + (warp * 32 + lane) * 2 * CHANNELS;
    store(parts, dD);
    store(parts + CHANNELS, dbias);
    sync_block();
    for (int i = threadIdx.x; i < 2 * BLOCK_CHANNELS; i += THREADS) {
        const int which = i / BLOCK_CHANNELS, c = i % BLOCK_CHANNELS;
        float sum = 0.f;
        for (int k = 0; k < WARPS * SHARE; k++)
            sum += block.entering[0][((k / SHARE * 32 + c / CHANNELS * SHARE + k % SHARE) * 2 + which) * CHANNELS + c % CHANNELS];
        float* to = reinterpret_cast<float*>(which ? p.dbias_parts : p.dD_parts);
        if (to) to[of_chunk * p.channels + at.padded + c] = sum;
    }
}

// dB and dC from the parts of blocks of channels, (block, row, piece, group of states, B or C, state, token).
KERNEL(256, 1) sum_pieces(PARAMETER Parameters p) {
    const i64 groups = p.states / GROUP, pieces = (p.length + SAVED_EVERY - 1) / SAVED_EVERY * PIECES;
    const i64 units = p.batch * pieces * groups * 2 * GROUP, i = i64(blockIdx.x) * 256 + threadIdx.x;
    if (i >= units * p.n_groups) return;
    const i64 of_group = i / units, unit = i % units, n = unit / (2 * GROUP) % groups * GROUP + unit % GROUP;
    const i64 piece = unit / (2 * GROUP * groups) % pieces, row = unit / (2 * GROUP * groups) / pieces;
    const bool is_C = unit / GROUP % 2;
    const float* parts = reinterpret_cast<const float*>(p.dB_parts) + (of_group * p.blocks_of_group * units + unit) * TOKENS;
    float sum[TOKENS];
    load(sum, parts);
#pragma unroll 8
    for (i64 k = 1; k < p.blocks_of_group; k++) {
        float more[TOKENS];
        load(more, parts + k * units * TOKENS);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) sum[t] += more[t];
    }
    if (n >= p.d_state) return;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const i64 token = piece * TOKENS + t;
        if (token < p.length)
            write_as<float>(is_C ? p.dC : p.dB, ((row * p.length + token) * p.n_groups + of_group) * p.d_state + n,
                            int(is_C ? p.dC_dtype : p.dB_dtype), sum[t]);
    }
}
