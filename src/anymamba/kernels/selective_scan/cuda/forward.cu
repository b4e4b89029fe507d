// The selective scan forward, for real A and selective B and C: warps take consecutive pieces of a tile; the state
// travels from warp to warp, step by step, through shared memory. So there is one exponential a state and no second
// pass.
//
// PASS: FORWARD writes y, the last states and the saved ones. SUMMARY writes what leaves a chunk where nothing arrives,
// the product of its decays, and the sum of d if it is asked for; REVERSE does that for the gradient of the state, with
// time running backwards (then w is that of y before the gate, and C takes the place of B).
//
// Notation. d = delta after the softplus, w = d u, a = exp(d A), h the state; a = 2^(d rate).
//
// Launch: WARPS warps, or fewer where shared memory or tokens are few. Sixteen fill a multiprocessor, each with a piece
// of 8 tokens; two lanes share the states of two channels, or four do where there would be few blocks.
#include "pieces.cuh"

constexpr int INPUTS = PASS == SUMMARY ? 2 : 3, MATRICES = PASS == FORWARD ? 2 : 1;
// Steps whose states are handed on together: two were 5 % faster in float32, slower in the other types and layouts, and
// need too many registers where there are several groups of states.
constexpr int PER_LINK = DTYPE == FLOAT32 && SHARE == 2 && ONE_GROUP ? 2 : 1;

struct alignas(16) OfWarp {
    Element raw[2][INPUTS][TOKENS * BLOCK_CHANNELS];  // u or dy, delta, z: this piece and the next
    float d_and_w[TOKENS * BLOCK_CHANNELS * 2];
};
struct alignas(16) OfGroup {                           // of states, of one warp
    float matrices[MATRICES][GROUP * TOKENS + 4 * 4];  // B and C as (state, token); see row_of_state
    float carry[PLANE];                                // the state that leaves this warp's piece
    Barrier passed[STEPS];                             // it is there
    Element raw[2][MATRICES][TOKENS * GROUP];
};

// Every fourth state is moved on by 4 words, so that lanes with different states write to different banks.
DEVICE int row_of_state(int n) { return n * TOKENS + n / 4 * 4; }
// Of the lane's j-th state: the same, with what is known to the compiler apart.
DEVICE int row_of_step(int j, int part) {
    static_assert(4 % SHARE == 0, "");
    return row_of_state(j * SHARE) + part * TOKENS;
}

// d and w of a piece in shared memory; four channels a lane.
DEVICE void prepare(OfWarp& mine, int options, int stage, const float (&bias)[4], int tokens, bool full, int lane) {
    constexpr int LANES = BLOCK_CHANNELS / 4, AT_ONCE = 32 / LANES;
    keep(lane);  // else what follows from it is computed before the loop over tiles, and kept in memory
    const int c = lane % LANES * 4;
#pragma unroll
    for (int k = 0; k < (TOKENS + AT_ONCE - 1) / AT_ONCE; k++) {
        const int t = k * AT_ONCE + lane / LANES, place = t * BLOCK_CHANNELS + c;
        if (TOKENS % AT_ONCE != 0 && t >= TOKENS) continue;
        float x[4], d[4], w[4];
        read<DTYPE>(d, &mine.raw[stage][1][place]);
        read<DTYPE>(x, &mine.raw[stage][0][place]);
        if (PASS == REVERSE && options & HAS_Z) {
            float z[4];
            read<DTYPE>(z, &mine.raw[stage][INPUTS - 1][place]);
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] *= z[i] * sigmoid_fast(z[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) d[i] += bias[i];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float soft = softplus_fast<PRECISE>(d[i]);
            d[i] = options & HAS_SOFTPLUS ? soft : d[i];
        }
        if (!full && t >= tokens) d[0] = d[1] = d[2] = d[3] = 0.f;
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = PASS == REVERSE ? x[i] : d[i] * x[i];
        float4* out = reinterpret_cast<float4*>(&mine.d_and_w[place * 2]);
        out[0] = make_float4(d[0], w[0], d[1], w[1]), out[1] = make_float4(d[2], w[2], d[3], w[3]);
    }
}

// B and C of a piece as floats, (state, token); half a warp each, a lane for each state.
DEVICE void prepare_matrices(OfGroup& mine, int stage, int lane) {
    keep(lane);
    const int m = lane / GROUP, n = lane % GROUP;
    if (m >= MATRICES) return;
    const Element* row = mine.raw[stage][m] + n;
#pragma unroll
    for (int t = 0; t < TOKENS; t += 4) {
        float v[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float one[1];
            read<DTYPE>(one, row + (t + k) * GROUP);
            v[k] = one[0];
        }
        store(&mine.matrices[m][row_of_state(n) + t], v);
    }
}

// Where a lane copies from, and where it writes y: in shared memory, since registers are short.
enum Placed { OF_INPUT, OF_DELTA, OF_Z, OF_MATRIX, OF_Y, N_PLACED };

// The tiles of a chunk that are worked on. What leaves a chunk depends only on the last of its packed sequences, or,
// backwards, on the first.
struct Tiles {
    int begin, end;
};
DEVICE Tiles tiles_of(const Parameters& p, const Place& at, int length, int tile_tokens) {
    Tiles tiles = {0, (length + tile_tokens - 1) / tile_tokens};
    if (PASS == SUMMARY && p.sequence_of) {
        const i64 start = start_of_sequence(p, p.sequence_of[at.end - 1]);
        if (start > at.begin) tiles.begin = int(start - at.begin) / tile_tokens;
    } else if (PASS == REVERSE && p.sequence_of) {
        const i64 stop = start_of_sequence(p, p.sequence_of[at.begin] + 1);
        if (stop < at.end) tiles.end = (int(stop - at.begin) + tile_tokens - 1) / tile_tokens;
    }
    return tiles;
}

KERNEL(THREADS, BLOCKS) scan(PARAMETER Parameters p) {
    const Place at = place_of_block(p, BLOCK_CHANNELS, PASS == REVERSE ? int(p.first_chunk) : 0);
    int lane = threadIdx.x % 32;
    keep(lane);
    const int warp = shuffle(int(threadIdx.x / 32), 0);
    const int warps = int(blockDim.x / 32), tile_tokens = warps * TOKENS;
    const int part = lane % SHARE, c0 = lane / SHARE * CHANNELS, my_count = at.count - c0;
    const int groups = groups_of(p), length = int(at.end - at.begin);
    const Tiles tiles = tiles_of(p, at, length, tile_tokens);

    const u8*(*places)[32] = reinterpret_cast<const u8*(*)[32]>(shared_memory());  // of each lane; see Placed
    float* rates = reinterpret_cast<float*>(places + N_PLACED);                    // a plane for each group
    OfWarp* of_warps = reinterpret_cast<OfWarp*>(rates + p.states * BLOCK_CHANNELS);
    OfGroup* of_groups = reinterpret_cast<OfGroup*>(of_warps + warps);
    OfWarp& mine = of_warps[warp];
    OfGroup* last_groups = of_groups + (warps - 1) * groups;
    // Offsets that the compiler does not see through: it would compute what it knows again for each barrier.
    int to_offset = int(reinterpret_cast<u8*>(of_groups + warp * groups) - shared_memory());
    int from_offset =
        int(reinterpret_cast<u8*>(of_groups + (warp == 0 ? warps - 1 : warp - 1) * groups) - shared_memory());
    keep(to_offset), keep(from_offset);
    OfGroup* my_groups = reinterpret_cast<OfGroup*>(shared_memory() + to_offset);
    const OfGroup* from_groups = reinterpret_cast<const OfGroup*>(shared_memory() + from_offset);

    const Rows &input = PASS == REVERSE ? p.dy : p.u, &matrix = PASS == REVERSE ? p.C : p.B;
    const int options = options_of(p), row_of_y = int(p.y.length) * int(sizeof(Element));

    // Tokens are counted from the chunk's start: `tile` is the first of a tile, `offset` + tile that of the warp's
    // piece.
    const int direction = PASS == REVERSE ? -tile_tokens : tile_tokens;
    const int offset = (PASS == REVERSE ? warps - 1 - warp : warp) * TOKENS;
    const bool is_regular = p.aligned && at.count >= BLOCK_CHANNELS && p.states == p.d_state;

    // ------------------------------------------------------------------------------------ copies from global memory
    // A lane's first copy of 16 bytes of the rows of a piece, from the chunk's first token on; and those of B and C,
    // half a warp each where both together fill one.
    constexpr int PER_ROW = BLOCK_CHANNELS / VECTOR, PER_STATES = GROUP / VECTOR;
    constexpr int UNITS = TOKENS * PER_ROW, UNITS_OF_MATRIX = TOKENS * PER_STATES;
    constexpr bool BOTH = MATRICES == 2 && UNITS_OF_MATRIX == 16;
    const auto row_of = [](const Rows& rows) { return int(rows.length) * int(sizeof(Element)); };
    const auto first_of = [&](const Rows& rows, int unit, int per_row, bool of_group) {
        const u8* from = start_of(rows, at, sizeof(Element), of_group) + unit % per_row * 16;
        return advance(from, unit / per_row, row_of(rows));
    };
    const Rows& lane_matrix = BOTH && lane >= 16 ? p.C : matrix;
    if (warp == 0) {
        const i64 first_y = at.row * p.y.batch + at.begin * p.y.length + at.channel + c0;
        places[OF_INPUT][lane] = first_of(input, lane, PER_ROW, false);
        places[OF_DELTA][lane] = first_of(p.delta, lane, PER_ROW, false);
        places[OF_Z][lane] = options & HAS_Z ? first_of(p.z, lane, PER_ROW, false) : nullptr;
        places[OF_MATRIX][lane] = first_of(lane_matrix, BOTH ? lane % 16 : lane, PER_STATES, true);
        places[OF_Y][lane] = PASS == FORWARD ? p.y.data + first_y * i64(sizeof(Element)) : nullptr;
    }
    sync_block();
    const auto copy_rows = [&](Element* to, const u8* first, int tile, int row) {
#pragma unroll
        for (int i = 0; i < (UNITS + 31) / 32; i++)
            if (UNITS % 32 == 0 || i * 32 + lane < UNITS)
                copy_16_bytes(to + (i * 32 + lane) * VECTOR, advance(first, tile + i * (32 / PER_ROW), row));
    };
    const auto copy_matrix = [&](Element* to, const u8* first, int tile, int row, int units) {
#pragma unroll
        for (int i = 0; i < (units + 31) / 32; i++)
            if (units % 32 == 0 || i * 32 + lane < units)
                copy_16_bytes(to + (i * 32 + lane) * VECTOR, advance(first, tile + i * (32 / PER_STATES), row));
    };
    const auto stage_full = [&](int tile, int into) {
        const int first = tile + offset;
        int own = lane;
        keep(own);
        const int row_of_matrix = BOTH && own >= 16 ? row_of(p.C) : row_of(matrix);
        copy_rows(mine.raw[into][0], places[OF_INPUT][lane], first, row_of(input));
        copy_rows(mine.raw[into][1], places[OF_DELTA][lane], first, row_of(p.delta));
        if (PASS != SUMMARY && options & HAS_Z)
            copy_rows(mine.raw[into][INPUTS - 1], places[OF_Z][lane], first, row_of(p.z));
#pragma unroll 1
        for (int g = 0; g < groups; g++) {
            Element* raw = my_groups[g].raw[into][0];
            const u8* of_group = places[OF_MATRIX][lane] + g * GROUP * int(sizeof(Element));
            copy_matrix(raw, of_group, first, row_of_matrix, BOTH ? 32 : UNITS_OF_MATRIX);
            if constexpr (MATRICES == 2 && !BOTH) {
                const u8* of_C = first_of(p.C, lane, PER_STATES, true) + g * GROUP * int(sizeof(Element));
                copy_matrix(raw + TOKENS * GROUP, of_C, first, row_of(p.C), UNITS_OF_MATRIX);
            }
        }
    };
    const auto stage_edge = [&](int tile, int tokens, int into) {  // a piece that is not full, tensor by tensor
        const Rows* const all[5] = {&input, &p.delta, PASS == SUMMARY ? nullptr : &p.z, &matrix,
                                    MATRICES == 2 ? &p.C : nullptr};
        for (int which = 0; which < 5; which++) {
            const Rows* rows = all[which];
            if (!rows || !rows->data) continue;
            const bool is_matrix = which >= 3;
            for (int g = 0; g < (is_matrix ? groups : 1); g++) {
                const u8* from = start_of(*rows, at, sizeof(Element), is_matrix) + g * GROUP * int(sizeof(Element));
                copy_elements(is_matrix ? my_groups[g].raw[into][which - 3] : mine.raw[into][which],
                              advance(from, tile + offset, row_of(*rows)), row_of(*rows), TOKENS, tokens,
                              is_matrix ? int(p.d_state) - g * GROUP : at.count, is_matrix ? GROUP : BLOCK_CHANNELS,
                              lane);
            }
        }
    };
    int sequences = -1;  // around the piece that is staged next
    const auto stage_piece = [&](int tile, int into) {
        const int tokens = length - tile - offset;
        if (is_regular && tokens >= TOKENS) {
            stage_full(tile, into);
        } else {
            stage_edge(tile, tokens, into);
        }
        end_of_copies();
        if (options & IS_PACKED) sequences = sequences_around(p, at.begin + tile + offset, TOKENS, lane);
    };
    int tile = (PASS == REVERSE ? tiles.end - 1 : tiles.begin) * tile_tokens;
    const int n_tiles = tiles.end - tiles.begin;
    stage_piece(tile, 0);

    const i64 scratch = ((at.row * p.n_chunks + at.chunk) * p.states) * p.channels + at.padded;
    for (int i = threadIdx.x; i < groups * PLANE; i += blockDim.x) {
        const int n = i / BLOCK_CHANNELS, c = i % BLOCK_CHANNELS, g = n / GROUP, place = place_in_plane(n % GROUP, c);
        rates[g * PLANE + place] = rate_of(p, at, n, c);
        last_groups[g].carry[place] = PASS == FORWARD ? arrival<false>(p, at, n, c) : 0.f;
    }
    for (int i = threadIdx.x; i < warps * groups * STEPS; i += blockDim.x)
        start_barrier(&of_groups[i / STEPS].passed[i % STEPS]);

    float bias[4], D[CHANNELS], total[CHANNELS];
    const int four = lane % (BLOCK_CHANNELS / 4) * 4;
    read_vector(bias, p.delta_bias, at.channel + four, at.count - four);
    read_vector(D, p.D, at.channel + c0, my_count);
#pragma unroll
    for (int s = 0; s < CHANNELS; s++) total[s] = 0.f;
    sync_block();

    // The first and the last token of the row, if they are here.
    const int start = at.begin == 0 ? 0 : -1, final = at.end == p.length ? length - 1 : -1;

#pragma unroll 1
    for (int k = 0; k < n_tiles; k++, tile += direction) {
        const int staged = k & 1, first = tile + offset, tokens = length - first, around = sequences;
        const bool full = is_regular && tokens >= TOKENS;
        wait_for_copies<0>();
        sync_warp();
        prepare(mine, options, staged, bias, tokens, full, lane);
        for (int g = 0; g < groups; g++) prepare_matrices(my_groups[g], staged, lane);
        sync_warp();
        if (k + 1 < n_tiles) stage_piece(tile + direction, staged ^ 1);

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
        const u32 parity = (warp == 0 ? k + 1 : k) & 1;  // the first warp of the first tile waits for nobody
        Boundaries edges =
            boundaries_of(options & IS_PACKED, around, tokens, TOKENS, first - start, final - first, lane);
        if (PASS == REVERSE && at.begin + first == 0) edges.starts &= ~1u;  // the row's first state has a gradient, too
        const bool saving = PASS == FORWARD && p.saved && first % SAVED_EVERY == 0 && tokens > 0;
        float* saved = reinterpret_cast<float*>(p.saved);
        if (saving) {
            const i64 n_saved = (p.length + SAVED_EVERY - 1) / SAVED_EVERY, index = (at.begin + first) / SAVED_EVERY;
            const i64 plane = (at.row * n_saved + index) * (p.channels / 32) + at.padded / 32;
            saved += (plane * p.states + part) * 32 + at.padded % 32 + c0;
        }

        const int own = lane * CHANNELS;  // in a step of a plane
        // What each sequence that begins here brings along, in the order of the run; of the first one it is read ahead.
        const u8* brought = PASS == REVERSE ? p.dlast_state : p.initial_state;
        const u32 entries = PASS == REVERSE ? edges.ends : edges.starts;
        const int first_entry = PASS == REVERSE ? last_bit(entries) : first_bit(entries);
        const auto states_at = [&](const u8* states, int t, int n) {
            return states_of<CHANNELS>(states, p, sequence_at(p, at, around, t), at.channel + c0, my_count, n + part);
        };

        float rate[CHANNELS], B[TOKENS];  // of the next step; they are read before the wait for this one's state
        const auto read_step = [&](int g, int j) {
            load(rate, rates + g * PLANE + j * 32 * CHANNELS + own);
            load(B, &my_groups[g].matrices[0][row_of_step(j, part)]);
        };
        const auto step = [&](int g, int j, const float (&given)[CHANNELS], auto with_edges) {
            constexpr bool EDGES = decltype(with_edges)::value;
            const OfGroup& from = from_groups[g];
            OfGroup& to = my_groups[g];
            const int place = j * 32 * CHANNELS + own, n = g * GROUP + j * SHARE;
            float h[CHANNELS], a[TOKENS][CHANNELS], wB[TOKENS][CHANNELS];
            if (EDGES) read_step(g, j);
#pragma unroll
            for (int t = 0; t < TOKENS; t++)
#pragma unroll
                for (int s = 0; s < CHANNELS; s++)
                    a[t][s] = exp2_fast(d[t][s] * rate[s]), wB[t][s] = PASS == REVERSE ? B[t] : w[t][s] * B[t];
            if (!EDGES && j + 1 < STEPS) read_step(g, j + 1);
            if (j % PER_LINK == 0) wait(&from.passed[j / PER_LINK], parity);
            load(h, &from.carry[place]);
            if (saving) store(saved + n * 32, h);
#pragma unroll
            for (int k = 0; k < TOKENS; k++) {
                const int t = PASS == REVERSE ? TOKENS - 1 - k : k;
                if (EDGES && entries >> t & 1) {
                    float other[CHANNELS] = {};
                    if (t != first_entry && brought) read_states(other, states_at(brought, t, n));
#pragma unroll
                    for (int s = 0; s < CHANNELS; s++) h[s] = t == first_entry ? given[s] : other[s];
                }
#pragma unroll
                for (int s = 0; s < CHANNELS; s++) {
                    h[s] = PASS == REVERSE ? a[t][s] * fmaf(wB[t][s], w[t][s], h[s]) : fmaf(a[t][s], h[s], wB[t][s]);
                    a[t][s] = h[s];
                    if (EDGES && PASS == REVERSE && edges.starts >> t & 1) h[s] = 0.f;
                }
            }
            store(&to.carry[place], h);
            if (j % PER_LINK == PER_LINK - 1) pass_on(&to.passed[j / PER_LINK], lane);
            if constexpr (PASS == FORWARD) {
                float C[TOKENS];
                load(C, &to.matrices[MATRICES - 1][row_of_step(j, part)]);
#pragma unroll
                for (int t = 0; t < TOKENS; t++)
#pragma unroll
                    for (int s = 0; s < CHANNELS; s++) y[t * CHANNELS + s] = fmaf(a[t][s], C[t], y[t * CHANNELS + s]);
                if constexpr (EDGES) {
                    for (u32 left = edges.ends; left; left &= left - 1) {
                        float last[CHANNELS];
                        const int end = first_bit(left);
#pragma unroll
                        for (int t = 0; t < TOKENS; t++)
#pragma unroll
                            for (int s = 0; s < CHANNELS; s++) last[s] = t == end ? a[t][s] : last[s];
                        states_at(p.last_state, end, n).write(last);
                    }
                }
            }
        };
        // Steps that are handed on together, without edges.
        const auto run_link = [&](int g, int link) {
            const OfGroup& from = from_groups[g];
            OfGroup& to = my_groups[g];
            float a[PER_LINK][TOKENS][CHANNELS], Bs[PER_LINK][TOKENS];
#pragma unroll
            for (int i = 0; i < PER_LINK; i++) {
                const int j = link * PER_LINK + i;
                load(rate, rates + g * PLANE + j * 32 * CHANNELS + own);
                load(Bs[i], &to.matrices[0][row_of_step(j, part)]);
#pragma unroll
                for (int t = 0; t < TOKENS; t++)
#pragma unroll
                    for (int s = 0; s < CHANNELS; s++) a[i][t][s] = exp2_fast(d[t][s] * rate[s]);
            }
            wait(&from.passed[link], parity);
#pragma unroll
            for (int i = 0; i < PER_LINK; i++) {
                const int j = link * PER_LINK + i, place = j * 32 * CHANNELS + own;
                float h[CHANNELS];
                load(h, &from.carry[place]);
                if (saving) store(saved + (g * GROUP + j * SHARE) * 32, h);
#pragma unroll
                for (int k = 0; k < TOKENS; k++) {
                    const int t = PASS == REVERSE ? TOKENS - 1 - k : k;
#pragma unroll
                    for (int s = 0; s < CHANNELS; s++)
                        a[i][t][s] = h[s] = PASS == REVERSE ? a[i][t][s] * fmaf(Bs[i][t], w[t][s], h[s])
                                                            : fmaf(a[i][t][s], h[s], w[t][s] * Bs[i][t]);
                }
                store(&to.carry[place], h);
            }
            pass_on(&to.passed[link], lane);
            if constexpr (PASS == FORWARD) {
#pragma unroll
                for (int i = 0; i < PER_LINK; i++) {
                    float C[TOKENS];
                    load(C, &to.matrices[MATRICES - 1][row_of_step(link * PER_LINK + i, part)]);
#pragma unroll
                    for (int t = 0; t < TOKENS; t++)
#pragma unroll
                        for (int s = 0; s < CHANNELS; s++)
                            y[t * CHANNELS + s] = fmaf(a[i][t][s], C[t], y[t * CHANNELS + s]);
                }
            }
        };
        if ((edges.starts | edges.ends) == 0) {
            const float nothing[CHANNELS] = {};
#pragma unroll 1
            for (int g = 0; g < groups; g++) {
                if constexpr (PER_LINK == 1) read_step(g, 0);
#pragma unroll
                for (int i = 0; i < STEPS / PER_LINK; i++) {
                    if constexpr (PER_LINK == 1) {
                        step(g, i, nothing, No());
                    } else {
                        run_link(g, i);
                    }
                }
            }
        } else {
            float given[CHANNELS], next[CHANNELS] = {};
            const auto read_ahead = [&](int i) {
                if (entries && brought && i < groups * STEPS)
                    states_at(brought, first_entry, i / STEPS * GROUP + i % STEPS * SHARE).read(next);
            };
            read_ahead(0);
#pragma unroll 1
            for (int i = 0; i < groups * STEPS; i++) {
#pragma unroll
                for (int s = 0; s < CHANNELS; s++) given[s] = next[s];
                read_ahead(i + 1);
                step(i / STEPS, i % STEPS, given, Yes());
            }
        }

        if constexpr (PASS == FORWARD) {
            constexpr int MINE = TOKENS / SHARE;  // tokens whose sums are this lane's
            sum_shared(y, part);
            const Element* raw = mine.raw[staged][0] + part * MINE * BLOCK_CHANNELS + c0;
            const auto each = [&](auto function) {
#pragma unroll
                for (int i = 0; i < MINE; i++) {
                    float out[CHANNELS];
#pragma unroll
                    for (int s = 0; s < CHANNELS; s++) out[s] = y[i * CHANNELS + s];
                    function(i, out);
#pragma unroll
                    for (int s = 0; s < CHANNELS; s++) y[i * CHANNELS + s] = out[s];
                }
            };
            each([&](int i, float (&out)[CHANNELS]) {
                float u[CHANNELS], z[CHANNELS];
                read<DTYPE>(u, raw + i * BLOCK_CHANNELS);
                read<DTYPE>(z, raw + (INPUTS - 1) * TOKENS * BLOCK_CHANNELS + i * BLOCK_CHANNELS);
#pragma unroll
                for (int s = 0; s < CHANNELS; s++) {
                    if (options & HAS_D) out[s] = fmaf(D[s], u[s], out[s]);
                    const float gate = z[s] * sigmoid_fast(z[s]);
                    if (options & HAS_Z) out[s] *= gate;
                }
            });
            u8* to = const_cast<u8*>(advance(places[OF_Y][lane], first + part * MINE, row_of_y));
            if (full) {
                each([&](int i, float (&out)[CHANNELS]) {
                    write<DTYPE>(reinterpret_cast<Element*>(to + i * row_of_y), out);
                });
            } else {
                each([&](int i, float (&out)[CHANNELS]) {
                    const bool inside = part * MINE + i < tokens;
                    write_some(to + i64(i) * row_of_y, false, out, inside ? my_count : 0);
                });
            }
            sync_warp();  // raw is filled again
        }
    }

    if constexpr (PASS != FORWARD) {
        sync_block();
        if (part == 0) store(&mine.d_and_w[c0], total);
        sync_block();
        float* states = reinterpret_cast<float*>(p.chunk_states) + scratch;
        float* decays = reinterpret_cast<float*>(p.chunk_decays) + scratch;
        for (int i = threadIdx.x; i < groups * PLANE; i += blockDim.x) {
            const int n = i / BLOCK_CHANNELS, c = i % BLOCK_CHANNELS, g = n / GROUP,
                      place = place_in_plane(n % GROUP, c);
            float sum = 0.f;
            for (int k = 0; k < warps; k++) sum += of_warps[k].d_and_w[c];
            states[n * p.channels + c] = last_groups[g].carry[place];
            decays[n * p.channels + c] = exp2_fast(sum * rates[g * PLANE + place]);
            if (n == 0 && p.chunk_steps)
                reinterpret_cast<float*>(p.chunk_steps)[(at.row * p.n_chunks + at.chunk) * p.channels + at.padded + c] =
                    sum;
        }
    }
}
