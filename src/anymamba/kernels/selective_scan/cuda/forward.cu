// The selective scan forward, for real A and selective B and C: warps take consecutive pieces of a tile; the state travels
// from warp to warp, step by step, through shared memory. So there is one exponential a state and no second pass.
//
// PASS: FORWARD writes y, the last states and the saved ones. SUMMARY writes what leaves a chunk where nothing arrives, and
// the product of its decays; REVERSE does that for the gradient of the state, with time running backwards (then w is
// that of y before the gate, and C takes the place of B).
//
// Notation. d = delta after the softplus, w = d u, a = exp(d A), h the state; a = 2^(d rate).
//
// Launch: WARPS * TOKENS tokens a tile. Two lanes share the states of two channels (SHARE, CHANNELS = 2) and a piece has 8
// tokens where blocks are plenty; four lanes and 4 tokens make twice the blocks for small batches. plan.py chooses.
#include "pieces.cuh"

constexpr int INPUTS = PASS == SUMMARY ? 2 : 3, MATRICES = PASS == FORWARD ? 2 : 1;

struct alignas(16) OfWarp {
    Element raw[2][INPUTS][TOKENS * BLOCK_CHANNELS];  // u or dy, delta, z: this piece and the next
    float d_and_w[TOKENS * BLOCK_CHANNELS * 2];
};
struct alignas(16) OfGroup {  // of states, of one warp
    float matrices[MATRICES][GROUP * TOKENS];  // B and C as (state, token)
    float carry[GROUP * BLOCK_CHANNELS];       // the state that leaves this warp's piece, (state, channel)
    Barrier passed[STEPS];                     // it is there
    Element raw[2][MATRICES][TOKENS * GROUP];
};

// d and w of a piece in shared memory; two channels a lane.
DEVICE void prepare(OfWarp& mine, const Parameters& p, int stage, const float (&bias)[2], int tokens, int lane) {
    constexpr int PAIRS = BLOCK_CHANNELS / 2, AT_ONCE = 32 / PAIRS;
    const int c = lane % PAIRS * 2;
#pragma unroll
    for (int t = lane / PAIRS; t < TOKENS; t += AT_ONCE) {
        float x[2], d[2], w[2];
        read<DTYPE>(d, &mine.raw[stage][1][t * BLOCK_CHANNELS + c]);
        read<DTYPE>(x, &mine.raw[stage][0][t * BLOCK_CHANNELS + c]);
        if (PASS == REVERSE && p.z.data) {
            float z[2];
            read<DTYPE>(z, &mine.raw[stage][INPUTS - 1][t * BLOCK_CHANNELS + c]);
#pragma unroll
            for (int i = 0; i < 2; i++) x[i] *= z[i] * sigmoid_fast(z[i]);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            d[i] += bias[i];
            if (p.softplus) d[i] = softplus_fast(d[i]);
            d[i] = t < tokens ? d[i] : 0.f;
            w[i] = PASS == REVERSE ? x[i] : d[i] * x[i];
        }
        *reinterpret_cast<float4*>(&mine.d_and_w[(t * BLOCK_CHANNELS + c) * 2]) = make_float4(d[0], w[0], d[1], w[1]);
    }
}

// B and C of a piece as floats, (state, token).
DEVICE void prepare_matrices(OfGroup& mine, int stage, int lane) {
#pragma unroll
    for (int m = 0; m < MATRICES; m++) {
#pragma unroll
        for (int i = lane * 2; i < TOKENS * GROUP; i += 64) {
            float v[2];
            read<DTYPE>(v, &mine.raw[stage][m][i]);
            mine.matrices[m][i % GROUP * TOKENS + i / GROUP] = v[0];
            mine.matrices[m][(i % GROUP + 1) * TOKENS + i / GROUP] = v[1];
        }
    }
}

KERNEL(THREADS, BLOCKS) scan(PARAMETER Parameters p) {
    const Place at = place_of_block(p, BLOCK_CHANNELS, PASS == REVERSE);
    const int lane = threadIdx.x % 32, warp = shuffle(int(threadIdx.x / 32), 0);
    const int part = lane % SHARE, c0 = lane / SHARE * CHANNELS, my_count = at.count - c0;
    const int groups = int(p.states) / GROUP, length = int(at.end - at.begin), n_tiles = (length + TILE - 1) / TILE;

    float* rates = reinterpret_cast<float*>(shared_memory());  // (state, channel), and a step more, which is not used
    OfWarp* of_warps = reinterpret_cast<OfWarp*>(rates + (p.states + SHARE) * BLOCK_CHANNELS);
    OfGroup* of_groups = reinterpret_cast<OfGroup*>(of_warps + WARPS);
    OfWarp& mine = of_warps[warp];
    OfGroup* my_groups = of_groups + warp * groups;
    OfGroup* last_groups = of_groups + (WARPS - 1) * groups;
    const OfGroup* from_groups = of_groups + (warp == 0 ? WARPS - 1 : warp - 1) * groups;

    const Rows& input = PASS == REVERSE ? p.dy : p.u;
    const u8 *start_u = start_of(input, at, sizeof(Element), false), *start_z = start_of(p.z, at, sizeof(Element), false);
    const u8* start_delta = start_of(p.delta, at, sizeof(Element), false);
    const u8 *start_B = start_of(p.B, at, sizeof(Element), true), *start_C = start_of(p.C, at, sizeof(Element), true);

    const int direction = PASS == REVERSE ? -TILE : TILE;
    int first = PASS == REVERSE ? (n_tiles - 1) * TILE + (WARPS - 1 - warp) * TOKENS : warp * TOKENS;
    int sequences = -1;  // around the piece that is staged next
    const auto stage_piece = [&](int from, int into) {
        const int tokens = length - from;
        stage<BLOCK_CHANNELS>(mine.raw[into][0], start_u, input, from, tokens, at.count, lane);
        stage<BLOCK_CHANNELS>(mine.raw[into][1], start_delta, p.delta, from, tokens, at.count, lane);
        if (PASS != SUMMARY && p.z.data)
            stage<BLOCK_CHANNELS>(mine.raw[into][INPUTS - 1], start_z, p.z, from, tokens, at.count, lane);
        for (int g = 0; g < groups; g++) {
            const int column = g * GROUP, columns = int(p.d_state) - column;
            const Rows& first_matrix = PASS == REVERSE ? p.C : p.B;
            const u8* start = (PASS == REVERSE ? start_C : start_B) + column * sizeof(Element);
            stage<GROUP>(my_groups[g].raw[into][0], start, first_matrix, from, tokens, columns, lane);
            if constexpr (MATRICES == 2)
                stage<GROUP>(my_groups[g].raw[into][1], start_C + column * sizeof(Element), p.C, from, tokens, columns,
                             lane);
        }
        end_of_copies();
        sequences = sequences_around(p, at.begin + from, TOKENS, lane);
    };
    stage_piece(first, 0);

    read_rates(rates, p, at, int(p.states));
    const i64 arriving = ((at.row * p.n_chunks + at.chunk) * p.states) * p.channels + at.padded;
    const float* arrivals = reinterpret_cast<const float*>(p.chunk_states) + arriving;
    for (int i = threadIdx.x; i < p.states * BLOCK_CHANNELS; i += THREADS) {
        const int n = i / BLOCK_CHANNELS, c = i % BLOCK_CHANNELS;
        last_groups[n / GROUP].carry[i % (GROUP * BLOCK_CHANNELS)] =
            PASS == FORWARD && p.n_chunks > 1 ? arrivals[n * p.channels + c] : 0.f;
    }
    for (int i = threadIdx.x; i < WARPS * groups * STEPS; i += THREADS)
        start_barrier(&of_groups[i / STEPS].passed[i % STEPS]);

    float bias[2], D[CHANNELS], total[CHANNELS];
    const int pair = lane % (BLOCK_CHANNELS / 2) * 2;
    read_vector(bias, p.delta_bias, at.channel + pair, at.count - pair);
    read_vector(D, p.D, at.channel + c0, my_count);
#pragma unroll
    for (int s = 0; s < CHANNELS; s++) total[s] = 0.f;
    sync_block();

#pragma unroll 1
    for (int tile = 0; tile < n_tiles; tile++, first += direction) {
        const int stage_of_tile = tile & 1, tokens = length - first;
        const int around = sequences;
        wait_for_copies<0>();
        sync_warp();
        prepare(mine, p, stage_of_tile, bias, tokens, lane);
        for (int g = 0; g < groups; g++) prepare_matrices(my_groups[g], stage_of_tile, lane);
        sync_warp();
        if (tile + 1 < n_tiles) stage_piece(first + direction, stage_of_tile ^ 1);

        float d[TOKENS][CHANNELS], w[TOKENS][CHANNELS], y[TOKENS * CHANNELS];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            float both[2 * CHANNELS];
            load(both, &mine.d_and_w[(t * BLOCK_CHANNELS + c0) * 2]);
#pragma unroll
            for (int s = 0; s < CHANNELS; s++) {
                d[t][s] = both[2 * s], w[t][s] = both[2 * s + 1], y[t * CHANNELS + s] = 0.f;
                if (PASS != FORWARD) total[s] += d[t][s];
            }
        }
        const u32 parity = (warp == 0 ? tile + 1 : tile) & 1;  // the first warp of the first tile waits for nobody
        const Boundaries edges = boundaries_of(p, around, at.begin + first, TOKENS, tokens, lane);
        const bool saving = PASS == FORWARD && p.saved && first % SAVED_EVERY == 0 && tokens > 0;
        float* saved = reinterpret_cast<float*>(p.saved);
        if (saving) {
            const i64 n_saved = (p.length + SAVED_EVERY - 1) / SAVED_EVERY, index = (at.begin + first) / SAVED_EVERY;
            saved += ((at.row * n_saved + index) * p.states + part) * p.channels + at.padded + c0;
        }

        if ((edges.starts | edges.ends) == 0) {
            float next[TOKENS][CHANNELS];  // the decays of the next step, computed while this one waits
            const float* my_rates = rates + part * BLOCK_CHANNELS + c0;
            {
                float rate[CHANNELS];
                load(rate, my_rates);
#pragma unroll
                for (int t = 0; t < TOKENS; t++)
#pragma unroll
                    for (int s = 0; s < CHANNELS; s++) next[t][s] = exp2_fast(d[t][s] * rate[s]);
            }
#pragma unroll 1
            for (int g = 0; g < groups; g++, my_rates += GROUP * BLOCK_CHANNELS) {
                const OfGroup& from = from_groups[g];
                OfGroup& to = my_groups[g];
#pragma unroll
                for (int j = 0; j < STEPS; j++) {
                    const int n = j * SHARE + part, place = n * BLOCK_CHANNELS + c0;
                    float rate[CHANNELS], h[CHANNELS], a[TOKENS][CHANNELS], after[TOKENS][CHANNELS], B[TOKENS];
                    load(B, &to.matrices[0][n * TOKENS]);
                    load(rate, my_rates + (j + 1) * SHARE * BLOCK_CHANNELS);
#pragma unroll
                    for (int t = 0; t < TOKENS; t++)
#pragma unroll
                        for (int s = 0; s < CHANNELS; s++) a[t][s] = next[t][s];
                    wait(&from.passed[j], parity);
                    load(h, &from.carry[place]);
                    if (saving) store(saved + (g * GROUP + j * SHARE) * p.channels, h);
#pragma unroll
                    for (int i = 0; i < TOKENS; i++) {
                        const int t = PASS == REVERSE ? TOKENS - 1 - i : i;
#pragma unroll
                        for (int s = 0; s < CHANNELS; s++) {
                            h[s] = PASS == REVERSE ? a[t][s] * fmaf(B[t], w[t][s], h[s])
                                                   : fmaf(a[t][s], h[s], w[t][s] * B[t]);
                            after[t][s] = h[s];
                            next[t][s] = exp2_fast(d[t][s] * rate[s]);
                        }
                    }
                    store(&to.carry[place], h);
                    sync_warp();
                    if (lane == 0) arrive(&to.passed[j]);
                    if constexpr (PASS == FORWARD) {
                        float C[TOKENS];
                        load(C, &to.matrices[MATRICES - 1][n * TOKENS]);
#pragma unroll
                        for (int t = 0; t < TOKENS; t++)
#pragma unroll
                            for (int s = 0; s < CHANNELS; s++)
                                y[t * CHANNELS + s] = fmaf(after[t][s], C[t], y[t * CHANNELS + s]);
                    }
                }
            }
        } else {  // sequences start or end here
#pragma unroll 1
            for (int i = 0; i < groups * STEPS; i++) {
                const int g = i / STEPS, j = i % STEPS, n = j * SHARE + part, place = n * BLOCK_CHANNELS + c0;
                float rate[CHANNELS], h[CHANNELS], B[TOKENS], C[TOKENS];
                load(B, &my_groups[g].matrices[0][n * TOKENS]);
                load(C, &my_groups[g].matrices[MATRICES - 1][n * TOKENS]);
                load(rate, rates + g * GROUP * BLOCK_CHANNELS + place);
                wait(&from_groups[g].passed[j], parity);
                load(h, &from_groups[g].carry[place]);
                if (saving) store(saved + (g * GROUP + j * SHARE) * p.channels, h);
#pragma unroll
                for (int k = 0; k < TOKENS; k++) {
                    const int t = PASS == REVERSE ? TOKENS - 1 - k : k;
                    const bool starts = edges.starts >> t & 1, ends = edges.ends >> t & 1;
                    i64 sequence = 0;
                    if (starts | ends) sequence = sequence_at(p, at, around, t);
                    if (PASS != REVERSE && starts)
                        read_states(h, p.initial_state, p, sequence, at.channel + c0, my_count, g * GROUP + n);
                    if (PASS == REVERSE && ends)
                        read_states(h, p.dlast_state, p, sequence, at.channel + c0, my_count, g * GROUP + n);
#pragma unroll
                    for (int s = 0; s < CHANNELS; s++) {
                        const float a = exp2_fast(d[t][s] * rate[s]);
                        h[s] = PASS == REVERSE ? a * fmaf(B[t], w[t][s], h[s]) : fmaf(a, h[s], w[t][s] * B[t]);
                        if (PASS == FORWARD) y[t * CHANNELS + s] = fmaf(h[s], C[t], y[t * CHANNELS + s]);
                        if (PASS == REVERSE && starts) h[s] = 0.f;
                    }
                    if (PASS == FORWARD && ends)
                        write_states(p.last_state, h, p, sequence, at.channel + c0, my_count, g * GROUP + n);
                }
                store(&my_groups[g].carry[place], h);
                sync_warp();
                if (lane == 0) arrive(&my_groups[g].passed[j]);
            }
        }

        if constexpr (PASS == FORWARD) {
            sum_shared(y, part);
#pragma unroll
            for (int i = 0; i < TOKENS / SHARE; i++) {
                const int t = part * (TOKENS / SHARE) + i;
                if (t >= tokens) continue;
                float x[CHANNELS], out[CHANNELS];
#pragma unroll
                for (int s = 0; s < CHANNELS; s++) out[s] = y[i * CHANNELS + s];
                if (p.D) {
                    read<DTYPE>(x, &mine.raw[stage_of_tile][0][t * BLOCK_CHANNELS + c0]);
#pragma unroll
                    for (int s = 0; s < CHANNELS; s++) out[s] = fmaf(D[s], x[s], out[s]);
                }
                if (p.z.data) {
                    read<DTYPE>(x, &mine.raw[stage_of_tile][INPUTS - 1][t * BLOCK_CHANNELS + c0]);
#pragma unroll
                    for (int s = 0; s < CHANNELS; s++) out[s] *= x[s] * sigmoid_fast(x[s]);
                }
                const i64 index = (at.row * p.length + at.begin + first + t) * p.d_inner + at.channel + c0;
                write_some(p.y.data + index * i64(sizeof(Element)), p.y.aligned, out, my_count);
            }
            sync_warp();  // raw is filled again
        }
    }

    if constexpr (PASS != FORWARD) {
        sync_block();
        if (part == 0) store(&mine.d_and_w[c0], total);
        sync_block();
        float *states = reinterpret_cast<float*>(p.chunk_states) + arriving;
        float *decays = reinterpret_cast<float*>(p.chunk_decays) + arriving;
        for (int i = threadIdx.x; i < p.states * BLOCK_CHANNELS; i += THREADS) {
            const int n = i / BLOCK_CHANNELS, c = i % BLOCK_CHANNELS;
            float sum = 0.f;
            for (int k = 0; k < WARPS; k++) sum += of_warps[k].d_and_w[c];
            states[n * p.channels + c] = last_groups[n / GROUP].carry[i % (GROUP * BLOCK_CHANNELS)];
            decays[n * p.channels + c] = exp2_fast(sum * rates[i]);
        }
    }
}
