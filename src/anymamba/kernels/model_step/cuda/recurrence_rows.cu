// The recurrence of many rows: delta is given before bias and softplus, or computed here from dt and dt_proj's weight;
// z is given before SiLU; activations have the type DTYPE. See recurrence.cuh.
//
// A block goes through p.rows_of_block rows of its channels. States are on their way to shared memory STAGES - 1 rows
// ahead, each thread's to a place of its own. What the block needs of activations is copied once, at the beginning;
// tensor cores multiply dt by the weight.
//
// Launch: 128 threads, early; blocks for the channels of each p.rows_of_block rows.
//
// Needs what recurrence.cuh does. WHOLE also means that activations lie at multiples of 16 bytes, and so do their rows;
// dt_proj needs that and bfloat16.
#include "recurrence.cuh"

constexpr int STAGES = 4;
constexpr bool DENSE = WHOLE && STATES * LANES == D_STATE;  // a warp's states of a row are contiguous
constexpr int MOST_ROWS = 64, TILE = 8, MOST_TILES = MOST_ROWS / TILE;  // rows of a block, and of a tensor core's product
constexpr int OUTPUTS = 16, AHEAD = 4, CHUNK = 4 * VECTOR;              // of dt_proj: rows and columns of its weight

DEVICE float as_float(Element x) {
    float value[1];
    read<DTYPE>(value, &x);
    return value[0];
}

// ------------------------------------------------------------------------------------------------ shared memory

// Elements of a row of dt, or of delta: neighbours are in other banks.
DEVICE int dt_stride(const Parameters& p) { return max(CHANNELS, int(p.n_in) + (p.n_in % 64 ? 0 : 32)); }

struct Shared {
    float4* states;  // (STAGES, WARPS, 32 GROUPS)
    float* delta;    // (rows, CHANNELS), dt_proj's output
    Element *u, *z;  // (rows, CHANNELS)
    Element* dt;     // (rows, dt_stride), or delta where it is given
    Element *B, *C;  // (rows, D_STATE)
};
DEVICE Shared shared_of(const Parameters& p) {
    const int rows = int(p.rows_of_block);
    float4* states = reinterpret_cast<float4*>(shared_memory() + sizeof(Step));
    float* delta = reinterpret_cast<float*>(states + STAGES * GROUPS * THREADS);
    Element* u = reinterpret_cast<Element*>(delta + rows * CHANNELS);
    Element *z = u + rows * CHANNELS, *dt = z + rows * CHANNELS, *B = dt + rows * dt_stride(p);
    return {states, delta, u, z, dt, B, B + rows * D_STATE};
}

// Columns of some rows.
DEVICE void copy_tile(Element* to, int stride, const Rows& rows, int first, int n_rows, int column, int count) {
    constexpr int width = WHOLE ? VECTOR : 1;
    const int pieces = count / width;
    for (int i = threadIdx.x; i < n_rows * pieces; i += THREADS) {
        const int row = i / pieces, k = i % pieces * width;
        const Element* from =
            reinterpret_cast<const Element*>(rows.data) + (first + row) * int(rows.stride) + column + k;
        if constexpr (WHOLE)
            copy_16_bytes(to + row * stride + k, from);
        else
            to[row * stride + k] = read_ahead(from);
    }
}

// A warp's states of one row are pieces of four. Global memory sees them in their order, 512 bytes at a time: a lane
// copies pieces `lane + 32 g`, and works on others.
DEVICE int copied_piece(int g) { return int(threadIdx.x % 32) + 32 * g; }
DEVICE int own_piece(int g) {
    const int lane = threadIdx.x % 32;
    return lane / LANES * (D_STATE / WIDTH) + lane % LANES + g * LANES;
}
// Where a piece lies in a stage: neighbouring lanes are in other banks, also where they take every other pair.
DEVICE float4* place_of_piece(const Shared& shared, int stage, int piece) {
    const int warp = threadIdx.x / 32;
    return shared.states + (stage * WARPS + warp) * 32 * GROUPS + (piece ^ (piece >> 3 & 1) << 1);
}
DEVICE bool copies(const Parameters& p, int column, int piece) {
    return column + int(threadIdx.x / 32) * (32 / LANES) + piece / (D_STATE / WIDTH) < p.d_inner;
}

// Starts to copy a warp's states of one row; `row` is where the block's channels begin.
DEVICE void copy_states(const Shared& shared, const Parameters& p, const float* row, int column, int stage, bool ok) {
    if constexpr (DENSE) {
        const float* from = row + int(threadIdx.x / 32) * (32 / LANES) * D_STATE;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const int piece = copied_piece(g);
            copy_16_bytes(place_of_piece(shared, stage, piece), from + piece * WIDTH, ok && copies(p, column, piece));
        }
        end_of_copies();
    }
}
DEVICE void get_states(States& h, const Shared& shared, const float* from, int stage, const Place& at) {
    if constexpr (DENSE) {
        wait_for_copies<STAGES - 1>();
        sync_warp();
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const float4 v = *place_of_piece(shared, stage, own_piece(g));
            h[4 * g] = v.x, h[4 * g + 1] = v.y, h[4 * g + 2] = v.z, h[4 * g + 3] = v.w;
        }
    } else if (at.inside) {
        read_states(h, from, at);
    }
}
// The new states, by way of shared memory.
DEVICE void put_states(const States& h, const Shared& shared, const Parameters& p, float* row, int column, int stage,
                       const Place& at) {
    if constexpr (DENSE) {
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
            *place_of_piece(shared, stage, own_piece(g)) = make_float4(h[4 * g], h[4 * g + 1], h[4 * g + 2], h[4 * g + 3]);
        sync_warp();
        float* to = row + int(threadIdx.x / 32) * (32 / LANES) * D_STATE;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const int piece = copied_piece(g);
            if (copies(p, column, piece)) write_16_bytes(to + piece * WIDTH, *place_of_piece(shared, stage, piece));
        }
        sync_warp();  // the next copies may go there
    } else if (at.inside) {
        write_states(row + (at.channel - column) * D_STATE + at.n, h, at);
    }
}

// ------------------------------------------------------------------------------------------------ delta

// A lane's part of dt_proj's weight for the outputs g and g + 8, with g = lane / 4: AHEAD times 8 columns of each.
typedef uint4 Weights[AHEAD][2];
DEVICE void load_weights(Weights& w, const Parameters& p, int column, int tile, int k) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int within = tile * OUTPUTS + lane / 4 + 8 * i, channel = column + within;
        const Element* from = reinterpret_cast<const Element*>(p.weight) + i64(channel) * p.n_in;
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int own = k + a * CHUNK + lane % 4 * VECTOR;
            const bool has = own < p.n_in && within < CHANNELS && channel < p.d_inner;
            w[a][i] = has ? read_once(from + own) : uint4{0, 0, 0, 0};
        }
    }
}

// dt_proj's output to shared memory; w has the first weights.
DEVICE void project(const Shared& shared, const Parameters& p, Weights& w, int column, int n_rows) {
    constexpr int n_tiles = (CHANNELS + OUTPUTS - 1) / OUTPUTS;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32, stride = dt_stride(p);
    for (int tile = warp; tile < n_tiles; tile += WARPS) {
        float sums[MOST_TILES][4] = {};
        for (int k = 0; k < p.n_in; k += AHEAD * CHUNK) {
            if (k || tile != warp) load_weights(w, p, column, tile, k);
#pragma unroll
            for (int n = 0; n < MOST_TILES; n++) {
                if (n * TILE >= n_rows) break;
                const Element* x = shared.dt + min(n * TILE + g, n_rows - 1) * stride + k + t * VECTOR;
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    if (k + a * CHUNK >= p.n_in) break;
                    const bool has = k + a * CHUNK + t * VECTOR < p.n_in;
                    const uint4 v = has ? *reinterpret_cast<const uint4*>(x + a * CHUNK) : uint4{0, 0, 0, 0};
                    multiply_tiles(sums[n], {w[a][0].x, w[a][1].x, w[a][0].y, w[a][1].y}, {v.x, v.y});
                    multiply_tiles(sums[n], {w[a][0].z, w[a][1].z, w[a][0].w, w[a][1].w}, {v.z, v.w});
                }
            }
        }
#pragma unroll
        for (int n = 0; n < MOST_TILES; n++) {
            if (n * TILE >= n_rows) break;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = n * TILE + 2 * t + i % 2, within = tile * OUTPUTS + g + i / 2 * 8;
                if (row < n_rows && within < CHANNELS) shared.delta[row * CHANNELS + within] = sums[n][i];
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------ the kernel

DEVICE void get_selected(States& out, const Element* row, const Place& at) {
#pragma unroll
    for (int i = 0; i < STATES; i += WHOLE ? WIDTH : 1) {
        const Element* from = row + at.n + offset_in_channel(i);
        if constexpr (WHOLE) {
            float four[WIDTH] = {};
            if (has_state(at, i)) read<DTYPE>(four, from);
            out[i] = four[0], out[i + 1] = four[1], out[i + 2] = four[2], out[i + 3] = four[3];
        } else {
            out[i] = has_state(at, i) ? as_float(*from) : 0.f;
        }
    }
}

KERNEL(THREADS, 4) recur_rows(PARAMETER Parameters p) {
    constexpr bool projects = WHOLE && DTYPE == BFLOAT16;
    const u32 blocks = blocks_of_row(p), part = blockIdx.x % blocks;
    const int first = int(blockIdx.x / blocks * p.rows_of_block), column = int(part) * CHANNELS;
    const Place at = place_of(p, part);
    const Shared shared = shared_of(p);
    Weights w;
    if (projects && p.weight) load_weights(w, p, column, threadIdx.x / 32, 0);
    const Step step = shared_step(p, shared_memory());
    const int n_rows = min(int(p.rows_of_block), int(step.rows) - first), next = int(p.d_inner) * D_STATE;
    const i64 place = ((p.layer * step.rows + first) * p.d_inner + column) * D_STATE;
    const float* from = step.ssm + place;
    float* to = step.new_ssm + place;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) copy_states(shared, p, from + s * next, column, s, s < n_rows);
    const Channel c = channel_of(p, at);
    States h = {}, B = {}, C = {};
    if (p.constant_B && at.inside) read_states(B, floats(p.constant_B) + i64(at.channel) * D_STATE + at.n, at);
    if (p.constant_C && at.inside) read_states(C, floats(p.constant_C) + i64(at.channel) * D_STATE + at.n, at);
    let_next_start();
    wait_for_previous();
    if (n_rows <= 0) return;
    const int inside = min(CHANNELS, int(p.d_inner) - column), stride = dt_stride(p), within = at.channel - column;
    if (p.weight) copy_tile(shared.dt, stride, p.projected, first, n_rows, 0, int(p.n_in));
    if (p.delta.data) copy_tile(shared.dt, stride, p.delta, first, n_rows, column, inside);
    copy_tile(shared.u, CHANNELS, p.u, first, n_rows, column, inside);
    copy_tile(shared.z, CHANNELS, p.z, first, n_rows, column, inside);
    if (!p.constant_B) copy_tile(shared.B, D_STATE, p.B, first, n_rows, 0, D_STATE);
    if (!p.constant_C) copy_tile(shared.C, D_STATE, p.C, first, n_rows, 0, D_STATE);
    end_of_copies();
    wait_for_copies<0>();
    sync_block();
    if (projects && p.weight) {
        project(shared, p, w, column, n_rows);
        sync_block();
    }
    for (int r = 0; r < n_rows; r++) {
        const int ahead = r + STAGES - 1;
        copy_states(shared, p, from + i64(ahead) * next, column, ahead % STAGES, ahead < n_rows);
        get_states(h, shared, from + i64(r) * next + within * D_STATE + at.n, r % STAGES, at);
        if (!p.constant_B) get_selected(B, shared.B + r * D_STATE, at);
        if (!p.constant_C) get_selected(C, shared.C + r * D_STATE, at);
        float delta = c.bias;
        if (projects && p.weight) delta += shared.delta[r * CHANNELS + within];
        if (p.delta.data) delta += as_float(shared.dt[r * stride + within]);
        const float u = as_float(shared.u[r * CHANNELS + within]);
        const float y = advance_states(h, softplus_fast<DTYPE == FLOAT32>(delta), u, B, C, c);
        put_states(h, shared, p, to + i64(r) * next, column, r % STAGES, at);
        if (!at.inside || at.part) continue;
        const float gated[1] = {fmaf(c.D, u, y) * silu(as_float(shared.z[r * CHANNELS + within]))};
        write<DTYPE>(reinterpret_cast<Element*>(p.y.data) + (first + r) * int(p.y.stride) + at.channel, gated);
    }
}
