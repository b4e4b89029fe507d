// The gradients of the selective scan, for real A and selective B and C.
//
// A tile is the 64 tokens between saved states: PIECES pieces, which warps take in turn. For each tile, from the last
// to the first, the state runs forward through the pieces once more (nothing is kept but what enters each), then its
// gradient runs backward; both go from warp to warp, step by step, through the same places in shared memory. For one
// state
//
//     h = a h[t-1] + w B   recomputed;  y += C h
//     e = dh + C g         gradient of h;  g is that of the scan's own output
//     x = a e h[t-1]       gradient of d A:  dA += x d,  ddelta += x A,  dh = a e
//     dC += g h,  dB += w e,  du += d B e,  ddelta += u B e
//
// dB and dC are sums over channels: each block writes its part, sum_pieces adds them in order.
//
// A turn is a tile and a group of states. Warps take the pieces of all turns one after the other, so that each warp is
// a little later than the one before it and does not wait for long. AHEAD, the forward run of the next turn goes along
// with the backward run of this one; it takes two sides of shared memory, which turns use alternately. The
// forward run begins with the pieces with which the backward run ends: on every other use of a side their places are in
// the opposite order, so that those are taken first that were left first.
//
// Launch: four lanes share the states of four channels, so that sums over channels are short. One block of 8 warps on a
// multiprocessor: with all registers (255 a lane) a step keeps its tokens in them. Where shared memory is short, 4
// warps and not AHEAD.
#define DOUBLE 0
#define COMPLEX 0
#include "pieces.cuh"
#include "sums.cuh"

static_assert(SHARE == 4 && CHANNELS == 4 && TOKENS == 4, "the exchanges between lanes want these");
constexpr int PIECES = SAVED_EVERY / TOKENS, SIDES = AHEAD ? 2 : 1;
static_assert(PIECES % WARPS == 0, "");
constexpr int ROW = TOKENS * BLOCK_CHANNELS;
constexpr int UNITS_OF_ROW = ROW / VECTOR, UNITS_OF_MATRIX = TOKENS * GROUP / VECTOR;  // copies of 16 bytes
constexpr int COPIES = (3 * UNITS_OF_ROW + 31) / 32;                                   // of a lane for a piece

// Where a lane copies from: the rows of a tensor from the chunk's first token on.
struct alignas(16) Source {
    const u8* from;
    int row, group;  // bytes from a token to the next, and from a group of states to the next
};
constexpr int PER_LINK = 2, LINKS = STEPS / PER_LINK;  // steps of the forward run that are handed on together
enum { FORWARD_RUN, BACKWARD_RUN };

DEVICE Source read_source(const Source* from) {  // at once
    const float4 v = *reinterpret_cast<const float4*>(from);
    const u64 address = u64(float_as_bits(v.y)) << 32 | float_as_bits(v.x);
    return {reinterpret_cast<const u8*>(address), int(float_as_bits(v.z)), int(float_as_bits(v.w))};
}

// Turns whose first state is kept. That of a turn is asked for by warp 0 in the last round of the turn before it, after
// it has waited for the last warp's piece of the round before; by then that warp has done the turn four before it.
constexpr int SAVED_TURNS = 4;

struct alignas(16) OfBlock {
    float exchange[WARPS][512];                              // first, so that places in it are changed by bits
    float between[SIDES][PIECES][PLANE];                     // the state after a piece; later its gradient
    float saved[SAVED_TURNS][PLANE];                         // the state before the first piece of a turn
    float d[SIDES * PIECES * ROW], w[SIDES * PIECES * ROW];  // see place_in_row
    float matrices[SIDES][PIECES][2][GROUP * TOKENS];        // B and C as (state, token)
    float g[WARPS * ROW];
    float bias[BLOCK_CHANNELS], D[BLOCK_CHANNELS];
    float dA[WARPS][PLANE];
    Source sources[2][COPIES][32];
    float totals[2 * CHANNELS][THREADS];  // of dD and dbias
    const u8* places[2][32];         // of each lane, in dB_parts and in the rows that are written: registers are short
    Element raw[WARPS][2][3 * ROW];  // of a piece: u, delta, B, C for the forward run and u, z, dy for the other
    Barrier arrived[SIDES][PIECES][LINKS];   // forward: the state after the piece is there
    Barrier prepared[SIDES][PIECES];         // d, w, B and C of the piece are
    Barrier returned[SIDES][PIECES][STEPS];  // backward: the gradient of the state after the piece is there
    Barrier finished[SIDES][PIECES];         // the piece's place may be taken
    Place at;
};
struct alignas(16) OfGroup {             // of states
    float rates[PLANE], leaving[PLANE];  // leaving: the gradient that leaves the tile
    Barrier left[STEPS];                 // it is there
};
// Where in its side a piece of a turn is.
DEVICE int slot_of(u32 turn, int piece) { return turn / SIDES & 1 ? PIECES - 1 - piece : piece; }
// The parity of a piece's barriers `arrived` and `returned`, which the last piece has no use for: it shares its slot
// with the first one, whose barriers so pass a phase on every other use.
DEVICE u32 phase_of_piece(u32 turn, int piece) { return turn / (piece == 0 ? 2 * SIDES : SIDES) & 1; }

constexpr u32 LONG = 16;  // turns after which sums over time are added to others: the longer a sum, the more it rounds

constexpr int SUMS = 3 * SAVED_EVERY * BLOCK_CHANNELS;  // y, du, ddelta of a tile, where there are several groups

// Rows (token, channel): an owner's channels of token 0 are at `row`, a multiple of ROW, + owner * CHANNELS; those of
// others in an order in which banks do not conflict.
DEVICE int place_in_row(int row, int t) { return (row ^ (t * 2 * CHANNELS)) + t * BLOCK_CHANNELS; }

// Sums over the lanes that share channels of values (token, channel): lane i of them gets those of token i.
// `writes` and `reads` are where the lane's part of its own token is: other parts and tokens differ in two bits.
DEVICE void sum_to_owner(float (&out)[CHANNELS], const float (&values)[TOKENS][CHANNELS], float* exchange, int writes,
                         int reads) {
    sync_warp();
#pragma unroll
    for (int t = 0; t < TOKENS; t++) store(exchange + t * 128 + (writes ^ (t * 4)), values[t]);
    sync_warp();
    load(out, exchange + reads);
#pragma unroll
    for (int i = 1; i < SHARE; i++) {
        float more[CHANNELS];
        load(more, exchange + (reads ^ (i * 4)));
#pragma unroll
        for (int s = 0; s < CHANNELS; s++) out[s] += more[s];
    }
}

KERNEL(THREADS, BLOCKS) scan_backward(PARAMETER Parameters p) {
    OfBlock& block = *reinterpret_cast<OfBlock*>(shared_memory());
    if (threadIdx.x == 0) block.at = place_of_block(p, BLOCK_CHANNELS, 0);
    sync_block();
    const Place& at = block.at;
    int lane = threadIdx.x % 32;
    keep(lane);
    const int warp = shuffle(int(threadIdx.x / 32), 0);
    const int part = lane % SHARE, owner = lane / SHARE, c0 = owner * CHANNELS, my_count = at.count - c0;
    const int groups = groups_of(p), length = int(at.end - at.begin);
    const int n_tiles = (length + SAVED_EVERY - 1) / SAVED_EVERY;
    const u32 n_turns = n_tiles * groups;
    const i64 first_tile = at.begin / SAVED_EVERY, n_saved = (p.length + SAVED_EVERY - 1) / SAVED_EVERY;
    // The first and the last token of the row, if they are here.
    const int start = at.begin == 0 ? 0 : -1, final = at.end == p.length ? length - 1 : -1;
    const bool is_regular = p.aligned && at.count >= BLOCK_CHANNELS && p.states == p.d_state;
    const int own = lane * CHANNELS;  // in a step of a plane

    OfGroup* of_groups = reinterpret_cast<OfGroup*>(&block + 1);
    float* sums = reinterpret_cast<float*>(of_groups + groups);
    float *const exchange = &block.exchange[0][0], *const my_g = block.g;
    // In `exchange`: for sum_to_owner; where the lane puts values of its tokens for dB and dC, and where it adds them
    // up.
    const int sum_writes = warp * 512 + owner * 16 + part * 4, sum_reads = sum_writes + part * 128;
    const int of_part = lane / 2 % 4, of_half = lane / 8 % 2, of_matrix = lane / 16;
    const int matrix_writes = warp * 512 + part * 32 + (owner ^ (2 * part)) * 4;
    const int matrix_reads = warp * 512 + (of_matrix * 2 + of_half) * 128 + of_part * 32 + (2 * of_part + lane % 2) * 4;
    const int options = options_of(p);
    const i64 first_part = ((at.block * p.batch + at.row) * n_saved + first_tile) * PIECES * groups;
    if (warp == 0) {
        const i64 first_out = (at.row * p.length + at.begin) * p.d_inner + at.channel + c0;
        block.places[0][lane] =
            p.dB_parts + (first_part * 2 * GROUP + of_matrix * GROUP + of_half * SHARE + of_part) * TOKENS * 4;
        block.places[1][lane] = reinterpret_cast<const u8*>(first_out * i64(sizeof(Element)));
    }
    Element* const raw_forward = block.raw[warp][0];
    Element* const raw_backward = block.raw[warp][1];

    // ------------------------------------------------------------------------------------ copies from global memory
    const Rows* const runs[2][4] = {{&p.u, &p.delta, &p.B, &p.C}, {&p.u, p.z.data ? &p.z : &p.dy, &p.dy, nullptr}};
    for (int i = threadIdx.x; i < 2 * COPIES * 32; i += THREADS) {
        const int run = i / (COPIES * 32), unit = i % (COPIES * 32), of_rows = run == FORWARD_RUN ? 2 : 3;
        const bool is_matrix = unit >= of_rows * UNITS_OF_ROW;
        const int in = is_matrix ? unit - of_rows * UNITS_OF_ROW : unit,
                  per_tensor = is_matrix ? UNITS_OF_MATRIX : UNITS_OF_ROW;
        const int which = (is_matrix ? of_rows : 0) + in / per_tensor, k = in % per_tensor;
        const int per_token = (is_matrix ? GROUP : BLOCK_CHANNELS) / VECTOR;
        Source source = {nullptr, 0, 0};
        if (which < 4 && runs[run][which]) {
            const Rows& rows = *runs[run][which];
            source.row = int(rows.length) * int(sizeof(Element));
            source.from =
                start_of(rows, at, sizeof(Element), is_matrix) + k % per_token * 16 + k / per_token * source.row;
            source.group = is_matrix ? GROUP * int(sizeof(Element)) : 0;
        }
        block.sources[run][unit / 32][unit % 32] = source;
    }
    // The pieces that are not full, tensor by tensor.
    const auto stage_edge = [&](Element* to, int run, int first, int tokens, int group) {
        for (int which = 0; which < 4; which++) {
            const Rows* rows = runs[run][which];
            if (!rows) continue;
            const bool is_matrix = run == FORWARD_RUN && which > 1;
            const int columns = is_matrix ? int(p.d_state) - group * GROUP : at.count,
                      row = int(rows->length) * int(sizeof(Element));
            const u8* from = start_of(*rows, at, sizeof(Element), is_matrix) +
                             (is_matrix ? group * GROUP * int(sizeof(Element)) : 0);
            Element* into = to + (is_matrix ? 2 * ROW + (which - 2) * TOKENS * GROUP : which * ROW);
            copy_elements(into, advance(from, first, row), row, TOKENS, tokens, columns,
                          is_matrix ? GROUP : BLOCK_CHANNELS, lane);
        }
    };
    const auto stage_piece = [&](Element* to, int run, int tile, int piece, int group) {
        const int first = tile * SAVED_EVERY + piece * TOKENS, tokens = length - first;
        if (is_regular && tokens >= TOKENS) {
            const u8* from[COPIES];
#pragma unroll
            for (int i = 0; i < COPIES; i++) {
                const Source source = read_source(block.sources[run][i] + lane);
                from[i] = advance(source.from, first, source.row) + (ONE_GROUP ? 0 : group * source.group);
            }
#pragma unroll
            for (int i = 0; i < COPIES; i++)
                if (i * 32 + lane < 3 * UNITS_OF_ROW) copy_16_bytes(to + (i * 32 + lane) * VECTOR, from[i]);
        } else {
            stage_edge(to, run, first, tokens, group);
        }
    };
    const auto tile_of = [&](u32 turn) { return ONE_GROUP ? int(turn) : int(turn / u32(groups)); };
    const auto group_of = [&](u32 turn) { return ONE_GROUP ? 0 : int(turn % u32(groups)); };
    int around_forward = -1, around_backward = -1;  // sequences around the pieces that are staged
    const auto stage_forward = [&](u32 turn, int piece) {
        if (turn >= n_turns) return;
        const int tile = n_tiles - 1 - tile_of(turn), group = group_of(turn);
        stage_piece(raw_forward, FORWARD_RUN, tile, piece, group);
        if (piece == 0) {
            const i64 plane = (at.row * n_saved + first_tile + tile) * (p.channels / 32) + at.padded / 32;
            const float* saved = reinterpret_cast<const float*>(p.saved) + (plane * p.states + group * GROUP) * 32;
#pragma unroll
            for (int k = 0; k < PLANE / CHANNELS / 32; k++) {
                const int i = k * 32 + lane, n = i / OWNERS, c = i % OWNERS * CHANNELS;
                copy_16_bytes(block.saved[turn % SAVED_TURNS] + place_in_plane(n, c), saved + i * CHANNELS);
            }
        }
        end_of_copies();
        if (options & IS_PACKED)
            around_forward = sequences_around(p, at.begin + tile * SAVED_EVERY + piece * TOKENS, TOKENS, lane);
    };
    const auto stage_backward = [&](u32 turn, int piece) {
        const int tile = n_tiles - 1 - tile_of(turn);
        stage_piece(raw_backward, BACKWARD_RUN, tile, piece, 0);
        end_of_copies();
        if (options & IS_PACKED)
            around_backward = sequences_around(p, at.begin + tile * SAVED_EVERY + piece * TOKENS, TOKENS, lane);
    };

    for (int i = threadIdx.x; i < groups * PLANE; i += THREADS) {
        const int n = i / BLOCK_CHANNELS, c = i % BLOCK_CHANNELS, g = n / GROUP, place = place_in_plane(n % GROUP, c);
        of_groups[g].rates[place] = rate_of(p, at, n, c);
        of_groups[g].leaving[place] = arrival<true>(p, at, n, c);
    }
    for (int i = lane; i < PLANE; i += 32) block.dA[warp][i] = 0.f;
    constexpr int BARRIERS = SIDES * PIECES * (LINKS + STEPS + 2);
    for (int i = threadIdx.x; i < BARRIERS; i += THREADS) start_barrier(&block.arrived[0][0][0] + i);
    for (int i = threadIdx.x; i < groups * STEPS; i += THREADS) start_barrier(&of_groups[i / STEPS].left[i % STEPS]);
    if (warp == 0 && part == 0) {
        float v[CHANNELS];
        read_vector(v, p.delta_bias, at.channel + c0, my_count);
        store(block.bias + c0, v);
        read_vector(v, p.D, at.channel + c0, my_count);
        store(block.D + c0, v);
    }
    float dD[CHANNELS], dbias[CHANNELS];
#pragma unroll
    for (int s = 0; s < CHANNELS; s++) {
        dD[s] = dbias[s] = 0.f;
        block.totals[s][threadIdx.x] = block.totals[CHANNELS + s][threadIdx.x] = 0.f;
    }
    sync_block();

    const auto initial = [&](float (&h)[CHANNELS], const States<CHANNELS>& states) {
#pragma unroll
        for (int s = 0; s < CHANNELS; s++) h[s] = 0.f;
        if (p.initial_state) read_states(h, states);
    };

    // ------------------------------------------------------------------------------------ the state, forward
    const auto run_forward = [&](u32 turn, int piece, int around) {
        const int tile = n_tiles - 1 - tile_of(turn), group = group_of(turn), side = turn % SIDES;
        const int first = tile * SAVED_EVERY + piece * TOKENS, tokens = length - first;
        const int slot = slot_of(turn, piece), slot_before = slot_of(turn, max(piece - 1, 0));
        const u32 phase = turn / SIDES & 1;
        const int row = (side * PIECES + slot) * ROW + c0, own_row = place_in_row(row, part);
        float (*matrices)[GROUP * TOKENS] = block.matrices[side][slot];
        wait(&block.finished[side][slot], phase ^ 1);
        {
            float v[CHANNELS], u[CHANNELS], bias[CHANNELS];
            load(bias, block.bias + c0);
            read<DTYPE>(u, raw_forward + part * BLOCK_CHANNELS + c0);
            read<DTYPE>(v, raw_forward + ROW + part * BLOCK_CHANNELS + c0);
#pragma unroll
            for (int s = 0; s < CHANNELS; s++) v[s] += bias[s];
#pragma unroll
            for (int s = 0; s < CHANNELS; s++) {
                const float soft = softplus_fast<PRECISE>(v[s]);
                v[s] = options & HAS_SOFTPLUS ? soft : v[s];
            }
            if (part >= tokens) v[0] = v[1] = v[2] = v[3] = 0.f;
            store(block.d + own_row, v);
#pragma unroll
            for (int s = 0; s < CHANNELS; s++) u[s] *= v[s];
            store(block.w + own_row, u);
            // B, then C: a lane for each state
            const Element* from = raw_forward + 2 * ROW + lane / GROUP * TOKENS * GROUP + lane % GROUP;
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                float one[1];
                read<DTYPE>(one, from + t * GROUP);
                v[t] = one[0];
            }
            store(&matrices[0][0] + lane * TOKENS, v);
        }
        pass_on(&block.prepared[side][slot], lane);
        if (piece == PIECES - 1) return;  // its states are of no use
        const u32 phase_before = phase_of_piece(turn, piece - 1);
        float d[TOKENS][CHANNELS], w[TOKENS][CHANNELS];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            load(d[t], block.d + place_in_row(row, t));
            load(w[t], block.w + place_in_row(row, t));
        }
        const float* rates = of_groups[group].rates + own;
        const float* from = (piece == 0 ? block.saved[turn % SAVED_TURNS] : block.between[side][slot_before]) + own;
        float* to = block.between[side][slot] + own;
        const Boundaries edges =
            boundaries_of(options & IS_PACKED, around, tokens, TOKENS, first - start, final - first, lane);
        const auto states_at = [&](const u8* states, int t, int n) {
            return states_of<CHANNELS>(states, p, sequence_at(p, at, around, t), at.channel + c0, my_count,
                                       group * GROUP + n);
        };
        const auto steps = [&](auto with_edges) {
            constexpr bool EDGES = decltype(with_edges)::value;
#pragma unroll 1  // all of them would not fit the instructions' cache
            for (int link = 0; link < LINKS; link++) {
                float a[PER_LINK][TOKENS][CHANNELS], wB[PER_LINK][TOKENS][CHANNELS];
#pragma unroll
                for (int i = 0; i < PER_LINK; i++) {
                    const int j = link * PER_LINK + i;
                    float rate[CHANNELS], B[TOKENS];
                    load(rate, rates + j * 32 * CHANNELS);
                    load(B, matrices[0] + (j * SHARE + part) * TOKENS);
#pragma unroll
                    for (int t = 0; t < TOKENS; t++)
#pragma unroll
                        for (int s = 0; s < CHANNELS; s++)
                            a[i][t][s] = exp2_fast(d[t][s] * rate[s]), wB[i][t][s] = w[t][s] * B[t];
                }
                if (piece > 0) wait(&block.arrived[side][slot_before][link], phase_before);
#pragma unroll
                for (int i = 0; i < PER_LINK; i++) {
                    const int j = link * PER_LINK + i, place = j * 32 * CHANNELS;
                    float h[CHANNELS];
                    load(h, from + place);
#pragma unroll
                    for (int t = 0; t < TOKENS; t++) {
                        if (EDGES && edges.starts >> t & 1) initial(h, states_at(p.initial_state, t, j * SHARE + part));
#pragma unroll
                        for (int s = 0; s < CHANNELS; s++) h[s] = fmaf(a[i][t][s], h[s], wB[i][t][s]);
                    }
                    store(to + place, h);
                }
                pass_on(&block.arrived[side][slot][link], lane);
            }
        };
        if (edges.starts == 0) {
            steps(No());
        } else {
            steps(Yes());
        }
    };

    // ------------------------------------------------------------------------------------ its gradient, backward
    const auto run_backward = [&](u32 turn, int piece, int around) {
        const int tile = n_tiles - 1 - tile_of(turn), group = group_of(turn), side = turn % SIDES;
        const int first = tile * SAVED_EVERY + piece * TOKENS;
        const int tokens = length - first;
        const int slot = slot_of(turn, piece), slot_before = slot_of(turn, max(piece - 1, 0));
        const u32 phase = turn / SIDES & 1;
        const bool is_first = piece == 0, is_last = piece == PIECES - 1;
        const int row = (side * PIECES + slot) * ROW + c0, row_of_g = warp * ROW + c0;
        const int own_row = place_in_row(row, part), own_row_of_g = place_in_row(row_of_g, part);
        const float (*matrices)[GROUP * TOKENS] = block.matrices[side][slot];
        OfGroup& of_group = of_groups[group];
        {
            float z[CHANNELS], v[CHANNELS];
            read<DTYPE>(v, raw_backward + 2 * ROW + part * BLOCK_CHANNELS + c0);
            read<DTYPE>(z, raw_backward + ROW + part * BLOCK_CHANNELS + c0);
#pragma unroll
            for (int s = 0; s < CHANNELS; s++) {
                const float gated = v[s] * (z[s] * sigmoid_fast(z[s]));
                v[s] = options & HAS_Z ? gated : v[s];
            }
            store(my_g + own_row_of_g, v);
        }
        sync_warp();
        wait(&block.prepared[side][slot], phase);
        const u32 phase_before = phase_of_piece(turn, max(piece - 1, 0));
        if (CHECKED && is_last)  // it had no forward run that waited for them
            for (int j = 0; j < LINKS - 1; j++) wait(&block.arrived[side][slot_before][j], phase_before);
        if (!is_first) wait(&block.arrived[side][slot_before][LINKS - 1], phase_before);
        float d[TOKENS][CHANNELS], w[TOKENS][CHANNELS], g[TOKENS][CHANNELS];
        // Sums of C h, B e and x rate.
        float y[TOKENS][CHANNELS] = {}, q[TOKENS][CHANNELS] = {}, r[TOKENS][CHANNELS] = {};
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            load(d[t], block.d + place_in_row(row, t));
            load(g[t], my_g + place_in_row(row_of_g, t));
            load(w[t], block.w + place_in_row(row, t));
        }
        const float* rates = of_group.rates + own;
        const float* from = (is_first ? block.saved[turn % SAVED_TURNS] : block.between[side][slot_before]) + own;
        const float* from_after = (is_last ? of_group.leaving : block.between[side][slot]) + own;
        float* to_before = (is_first ? of_group.leaving : block.between[side][slot_before]) + own;
        const Barrier* left_after = is_last ? of_group.left : block.returned[side][slot];
        Barrier* left_before = is_first ? of_group.left : block.returned[side][slot_before];
        // At first there is nothing to wait for.
        const u32 phase_after = is_last ? (n_tiles - tile) & 1 : phase_of_piece(turn, piece);
        const Boundaries edges =
            boundaries_of(options & IS_PACKED, around, tokens, TOKENS, first - start, final - first, lane);
        const u8* my_parts =
            advance(block.places[0][lane], (tile * PIECES + piece) * groups + group, 2 * GROUP * TOKENS * 4);
        float* my_dA = block.dA[warp] + own;

        const auto states_at = [&](const u8* states, int t, int n) {
            return states_of<CHANNELS>(states, p, sequence_at(p, at, around, t), at.channel + c0, my_count,
                                       group * GROUP + n);
        };
        const int last_end = last_bit(edges.ends);  // the first one that the run meets: its gradient is read ahead

        const auto steps = [&](auto with_edges) {
            constexpr bool EDGES = decltype(with_edges)::value;
            float next[CHANNELS] = {};
            if (EDGES && edges.ends) states_at(p.dlast_state, last_end, part).read(next);
            float rate_ahead[CHANNELS], h_ahead[CHANNELS];
            load(rate_ahead, rates);
            load(h_ahead, from);
#pragma unroll 1
            for (int pair = 0; pair < STEPS / 2; pair++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int j = pair * 2 + half, n = j * SHARE + part, place = j * 32 * CHANNELS;
                    float rate[CHANNELS], h[CHANNELS], dh[CHANNELS], dA[CHANNELS], B[TOKENS], C[TOKENS];
                    float a[TOKENS][CHANNELS], before[TOKENS][CHANNELS], after[TOKENS][CHANNELS];
                    float of_B[TOKENS], of_C[TOKENS], given[CHANNELS];
                    if constexpr (EDGES) {
#pragma unroll
                        for (int s = 0; s < CHANNELS; s++) given[s] = next[s];
                        if (edges.ends && j + 1 < STEPS) states_at(p.dlast_state, last_end, n + SHARE).read(next);
                    }
                    load(B, matrices[0] + n * TOKENS);
                    load(C, matrices[1] + n * TOKENS);
#pragma unroll
                    for (int s = 0; s < CHANNELS; s++) rate[s] = rate_ahead[s], h[s] = h_ahead[s];
#pragma unroll
                    for (int t = 0; t < TOKENS; t++) {
                        if (EDGES && edges.starts >> t & 1) initial(h, states_at(p.initial_state, t, n));
#pragma unroll
                        for (int s = 0; s < CHANNELS; s++) {
                            a[t][s] = exp2_fast(d[t][s] * rate[s]);
                            before[t][s] = h[s];
                            h[s] = fmaf(a[t][s], h[s], w[t][s] * B[t]);
                            after[t][s] = h[s];
                            y[t][s] = fmaf(C[t], h[s], y[t][s]);
                        }
                    }
                    wait(left_after + j, phase_after);
                    load(dh, from_after + place);
#pragma unroll
                    for (int t = TOKENS - 1; t >= 0; t--) {
                        if (EDGES && edges.ends >> t & 1) {
                            float other[CHANNELS] = {};
                            if (t != last_end) read_states(other, states_at(p.dlast_state, t, n));
#pragma unroll
                            for (int s = 0; s < CHANNELS; s++) dh[s] = t == last_end ? given[s] : other[s];
                        }
#pragma unroll
                        for (int s = 0; s < CHANNELS; s++) {
                            const float e = fmaf(C[t], g[t][s], dh[s]);
                            dh[s] = a[t][s] = e * a[t][s];
                            of_B[t] = s == 0 ? e * w[t][s] : fmaf(e, w[t][s], of_B[t]);
                            q[t][s] = fmaf(e, B[t], q[t][s]);
                        }
                        if (EDGES && edges.starts >> t & 1) dh[0] = dh[1] = dh[2] = dh[3] = 0.f;
                    }
                    store(to_before + place, dh);
                    pass_on(left_before + j, lane);
                    if constexpr (EDGES) {
                        for (u32 left = p.dinitial_state ? edges.starts : 0; left; left &= left - 1) {
                            float entered[CHANNELS];
                            const int begins = first_bit(left);
#pragma unroll
                            for (int t = 0; t < TOKENS; t++)
#pragma unroll
                                for (int s = 0; s < CHANNELS; s++) entered[s] = t == begins ? a[t][s] : entered[s];
                            states_at(p.dinitial_state, begins, n).write(entered);
                        }
                    }

                    load(dA, my_dA + place);
                    if (j + 1 < STEPS) {
                        load(rate_ahead, rates + place + 32 * CHANNELS);
                        load(h_ahead, from + place + 32 * CHANNELS);
                    }
#pragma unroll
                    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
                        for (int s = 0; s < CHANNELS; s++) {
                            of_C[t] = s == 0 ? g[t][s] * after[t][s] : fmaf(g[t][s], after[t][s], of_C[t]);
                            const float x = a[t][s] * before[t][s];
                            r[t][s] = fmaf(x, rate[s], r[t][s]);
                            dA[s] = fmaf(x, d[t][s], dA[s]);
                        }
                    }
                    store(my_dA + place, dA);
                    store(exchange + half * 128 + matrix_writes, of_B);
                    store(exchange + (2 + half) * 128 + matrix_writes, of_C);
                }
                sync_warp();
                {  // two lanes add up the four tokens of a state's B or C, over every other owner each
                    float sum[TOKENS];
                    load(sum, exchange + matrix_reads);
#pragma unroll
                    for (int i = 1; i < OWNERS / 2; i++) {
                        float more[TOKENS];
                        load(more, exchange + (matrix_reads ^ (i * 8)));
#pragma unroll
                        for (int t = 0; t < TOKENS; t++) sum[t] += more[t];
                    }
#pragma unroll
                    for (int t = 0; t < TOKENS; t++) sum[t] += shuffle_xor(sum[t], 1);
                    float* to = reinterpret_cast<float*>(const_cast<u8*>(my_parts)) + pair * 2 * SHARE * TOKENS;
                    if (lane % 2 == 0) write_16_bytes(to, make_float4(sum[0], sum[1], sum[2], sum[3]));
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
        sum_to_owner(own_y, y, exchange, sum_writes, sum_reads);
        sum_to_owner(own_q, q, exchange, sum_writes, sum_reads);
        sum_to_owner(own_r, r, exchange, sum_writes, sum_reads);
        if (groups > 1) {
            float* mine = sums + ((piece * TOKENS + part) * BLOCK_CHANNELS + c0);
            float* const all[] = {own_y, own_q, own_r};
#pragma unroll
            for (int k = 0; k < 3; k++) {
                float sum[CHANNELS] = {0.f, 0.f, 0.f, 0.f};
                if (group > 0) load(sum, mine + k * SUMS / 3);
#pragma unroll
                for (int s = 0; s < CHANNELS; s++) all[k][s] = sum[s] += all[k][s];
                store(mine + k * SUMS / 3, sum);
            }
        }
        if (group + 1 == groups && part < tokens && my_count > 0) {
            const int row_bytes = int(p.du.length) * int(sizeof(Element));
            const i64 offset = reinterpret_cast<i64>(advance(block.places[1][lane], first + part, row_bytes));
            const Element* raw = raw_backward + part * BLOCK_CHANNELS + c0;
            float u[CHANNELS], z[CHANNELS], dy[CHANNELS], of_d[CHANNELS], of_g[CHANNELS], D[CHANNELS];
            float out[3][CHANNELS];  // du, ddelta, dz
            load(D, block.D + c0);
            read<DTYPE>(u, raw);
            read<DTYPE>(z, raw + ROW);
            read<DTYPE>(dy, raw + 2 * ROW);
            load(of_d, block.d + own_row);
            load(of_g, my_g + own_row_of_g);
#pragma unroll
            for (int s = 0; s < CHANNELS; s++) {
                const float gate = sigmoid_fast(z[s]), slope = softplus_slope_fast<PRECISE>(of_d[s]);
                const float before_gate = options & HAS_D ? fmaf(D[s], u[s], own_y[s]) : own_y[s];
                out[2][s] = dy[s] * before_gate * gate * fmaf(z[s], 1.f - gate, 1.f);
                out[0][s] = own_q[s] * of_d[s];
                if (options & HAS_D) out[0][s] = fmaf(D[s], of_g[s], out[0][s]);
                dD[s] = fmaf(of_g[s], u[s], dD[s]);
                out[1][s] = fmaf(own_r[s], LN_2, u[s] * own_q[s]);
                if (options & HAS_SOFTPLUS) out[1][s] *= slope;
                dbias[s] += out[1][s];
            }
            if (is_regular) {
                write<DTYPE>(reinterpret_cast<Element*>(p.du.data + offset), out[0]);
                write<DTYPE>(reinterpret_cast<Element*>(p.ddelta.data + offset), out[1]);
                if (options & HAS_Z) write<DTYPE>(reinterpret_cast<Element*>(p.dz.data + offset), out[2]);
            } else {
                write_some(p.du.data + offset, false, out[0], my_count);
                write_some(p.ddelta.data + offset, false, out[1], my_count);
                if (options & HAS_Z) write_some(p.dz.data + offset, false, out[2], my_count);
            }
        }
        pass_on(&block.finished[side][slot], lane);
        // The warp's last piece of a turn: another group's dA is next, or sums have become long and go on.
        if (piece < WARPS && (groups > 1 || (turn % LONG == LONG - 1 && turn + 1 < n_turns))) {
            const bool is_new = turn < u32(groups > 1 ? groups : LONG);
            const i64 of_warp = (at.row * p.n_chunks + at.chunk) * WARPS + warp;
            float* kept = reinterpret_cast<float*>(p.dA_of_warps) + of_warp * p.states * p.channels + at.padded;
            for (int i = lane; i < PLANE; i += 32) {
                const int n = i / BLOCK_CHANNELS, c = i % BLOCK_CHANNELS, place = place_in_plane(n, c);
                float* to = kept + (group * GROUP + n) * p.channels + c;
                *to = block.dA[warp][place] + (is_new ? 0.f : *to);
                block.dA[warp][place] = 0.f;
            }
#pragma unroll
            for (int s = 0; s < CHANNELS; s++) {
                block.totals[s][threadIdx.x] += dD[s], block.totals[CHANNELS + s][threadIdx.x] += dbias[s];
                dD[s] = dbias[s] = 0.f;
            }
            sync_warp();
        }
    };

    // ------------------------------------------------------------------------------------ the two runs
    stage_forward(0, warp);
    if constexpr (AHEAD) {
        // Warps take the pieces of all turns one after the other, first forward and, a turn later, backward.
#pragma unroll 1
        for (u32 k = warp; k < (n_turns + 1) * PIECES; k += WARPS) {
            const u32 turn = k / PIECES;
            const int piece = k % PIECES, around = around_forward;
            wait_for_copies<0>();
            sync_warp();
            if (turn > 0) stage_backward(turn - 1, PIECES - 1 - piece);
            if (turn < n_turns) run_forward(turn, piece, around);
            const int around_now = around_backward;
            wait_for_copies<0>();
            sync_warp();
            stage_forward((k + WARPS) / PIECES, (k + WARPS) % PIECES);
            if (turn > 0) run_backward(turn - 1, PIECES - 1 - piece, around_now);
        }
    } else {
#pragma unroll 1
        for (u32 turn = 0; turn < n_turns; turn++) {
#pragma unroll 1
            for (int first = 0; first < PIECES; first += WARPS) {
                const int around = around_forward;
                wait_for_copies<0>();
                sync_warp();
                if (first + WARPS == PIECES) stage_backward(turn, PIECES - 1 - warp);
                run_forward(turn, first + warp, around);
                sync_warp();
                if (first + WARPS < PIECES) stage_forward(turn, first + WARPS + warp);
            }
#pragma unroll 1
            for (int last = PIECES - 1; last > 0; last -= WARPS) {
                const int around = around_backward;
                wait_for_copies<0>();
                sync_warp();
                if (last < WARPS) stage_forward(turn + 1, warp);
                run_backward(turn, last - warp, around);
                sync_warp();
                if (last >= WARPS) stage_backward(turn, last - WARPS - warp);
            }
        }
    }

    // ------------------------------------------------------------------------------------ sums over time
    sync_block();
    const i64 of_chunk = at.row * p.n_chunks + at.chunk, size = p.states * p.channels;
    float* dA = reinterpret_cast<float*>(p.dA_parts) + of_chunk * size + at.padded;
    const float* kept = reinterpret_cast<const float*>(p.dA_of_warps) + of_chunk * WARPS * size + at.padded;
    for (int i = threadIdx.x; i < groups * PLANE; i += THREADS) {
        const int n = i / BLOCK_CHANNELS, c = i % BLOCK_CHANNELS, place = place_in_plane(n % GROUP, c);
        float sum = 0.f;
        for (int w = 0; w < WARPS; w++) {
            if (groups == 1) sum += block.dA[w][place];
            if (groups > 1 || n_turns > LONG) sum += kept[w * size + n * p.channels + c];
        }
        dA[n * p.channels + c] = sum;
    }
    float* parts = &block.between[0][0][0];
#pragma unroll
    for (int s = 0; s < CHANNELS; s++)
        dD[s] += block.totals[s][threadIdx.x], dbias[s] += block.totals[CHANNELS + s][threadIdx.x];
    store(parts + (warp * 32 + lane) * 2 * CHANNELS, dD);
    store(parts + (warp * 32 + lane) * 2 * CHANNELS + CHANNELS, dbias);
    sync_block();
    for (int i = threadIdx.x; i < 2 * BLOCK_CHANNELS; i += THREADS) {
        const int which = i / BLOCK_CHANNELS, c = i % BLOCK_CHANNELS;
        float sum = 0.f;
        for (int k = 0; k < WARPS * SHARE; k++) {
            const int from = k / SHARE * 32 + c / CHANNELS * SHARE + k % SHARE;
            sum += parts[(from * 2 + which) * CHANNELS + c % CHANNELS];
        }
        float* to = reinterpret_cast<float*>(which ? p.dbias_parts : p.dD_parts);
        if (to) to[of_chunk * p.channels + at.padded + c] = sum;
    }
}

// dB and dC from the parts of blocks of channels, (block, row, piece, group of states, B or C, state, token); the last
// blocks add up the other gradients.
KERNEL(256, 1) sum_pieces(PARAMETER Parameters p) {
    const i64 groups = p.states / GROUP, pieces = (p.length + SAVED_EVERY - 1) / SAVED_EVERY * PIECES;
    const i64 units = p.batch * pieces * groups * 2 * GROUP, i = i64(blockIdx.x) * 256 + threadIdx.x;
    const i64 blocks_of_units = (units * p.n_groups + 255) / 256;
    if (blockIdx.x >= blocks_of_units) sum_part(p, i - blocks_of_units * 256);
    if (i >= units * p.n_groups) return;
    const i64 of_group = i / units, unit = i % units, n = unit / (2 * GROUP) % groups * GROUP + unit % GROUP;
    const i64 piece = unit / (2 * GROUP * groups) % pieces, row = unit / (2 * GROUP * groups) / pieces;
    const bool is_C = unit / GROUP % 2;
    const float* parts =
        reinterpret_cast<const float*>(p.dB_parts) + (of_group * p.blocks_of_group * units + unit) * TOKENS;
    float sum[TOKENS];
    load(sum, parts);
    constexpr int AT_ONCE = 4;  // parts that are asked for at once
    for (i64 k0 = 1; k0 < p.blocks_of_group; k0 += AT_ONCE) {
        float more[AT_ONCE][TOKENS] = {};
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
            if (k0 + k < p.blocks_of_group) load(more[k], parts + (k0 + k) * units * TOKENS);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
            for (int t = 0; t < TOKENS; t++) sum[t] += more[k][t];
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
