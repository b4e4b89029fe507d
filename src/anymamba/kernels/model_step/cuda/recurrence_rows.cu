// The recurrence of many rows: delta is given before bias and softplus, or computed here from dt and dt_proj's weight;
// z is given before SiLU; activations have the type DTYPE. See recurrence.cuh.
//
// The time is that of the states' memory: a thread asks for the states of its ROWS rows before it waits for anything,
// 16 bytes each, 512 neighbouring ones of a warp at a time. Blocks are short and many, so that some load states while
// others wait for their activations or multiply. What a row and channel have once, such as delta and the gate, is
// computed by one lane of QUAD, whose row that is; the others get it from there. Tensor cores multiply dt by the
// weight.
//
// Launch: 256 threads, early; blocks for the channels of each SETS ROWS rows.
//
// Needs what recurrence.cuh does, and ROWS: 2, 4 or 8; LANES is at least 4. WHOLE also means that activations lie at
// multiples of 16 bytes, and so do their rows; dt_proj needs that and bfloat16.
#include "recurrence.cuh"

constexpr int SETS = 2, ALL_THREADS = SETS * THREADS, BLOCK_ROWS = SETS * ROWS;  // threads of a set share rows
constexpr int QUAD = ROWS < 4 ? ROWS : 4;                                        // rows that are summed at once
constexpr int STRIDE = CHANNELS + 8;  // between rows of channels in shared memory: neighbours are in other banks
constexpr int TILE = 8, OUTPUTS = 16, CHUNK = 4 * VECTOR;  // of dt_proj: rows, channels and columns of two products
constexpr bool PROJECTS = WHOLE && DTYPE == BFLOAT16;
static_assert(LANES >= QUAD, "");

DEVICE float as_float(Element x) {
    float value[1];
    read<DTYPE>(value, &x);
    return value[0];
}

// ------------------------------------------------------------------------------------------------ shared memory

// Elements of a row of dt, of dt_proj's weight, or of delta: neighbours are in other banks.
DEVICE int dt_stride(const Parameters& p) { return max(CHANNELS, int(p.n_in) + (p.n_in % 64 ? 0 : 32)); }

struct Shared {
    float *bias, *D;  // (CHANNELS)
    float* delta;     // (BLOCK_ROWS, STRIDE), dt_proj's output
    Element *u, *z;   // (BLOCK_ROWS, STRIDE)
    Element* dt;      // (BLOCK_ROWS, dt_stride), or delta where it is given
    Element *B, *C;   // (BLOCK_ROWS, D_STATE)
    Element* weight;  // (CHANNELS, dt_stride)
};
DEVICE Shared shared_of(const Parameters& p) {
    float* bias = reinterpret_cast<float*>(shared_memory() + sizeof(Step));
    float *D = bias + CHANNELS, *delta = D + CHANNELS;
    Element* u = reinterpret_cast<Element*>(delta + BLOCK_ROWS * STRIDE);
    Element *z = u + BLOCK_ROWS * STRIDE, *dt = z + BLOCK_ROWS * STRIDE, *B = dt + BLOCK_ROWS * dt_stride(p);
    return {bias, D, delta, u, z, dt, B, B + BLOCK_ROWS * D_STATE, B + 2 * BLOCK_ROWS * D_STATE};
}

// Starts to copy `count` columns of `n_rows` rows, at most MOST_COUNT of MOST_ROWS. As the most is known, there is no
// loop of dependent instructions between what is asked for.
constexpr int WHOLE_WIDTH = WHOLE ? VECTOR : 1;
constexpr int threads_of_row(int pieces) {
    return pieces <= 1 ? 1 : pieces > 16 ? 32 : 2 * threads_of_row((pieces + 1) / 2);
}
template <int MOST_ROWS, int MOST_COUNT>
DEVICE void copy_tile(Element* to, int to_stride, const Element* from, int from_stride, int n_rows, int count) {
    constexpr int across = threads_of_row((MOST_COUNT + WHOLE_WIDTH - 1) / WHOLE_WIDTH);
    constexpr int rows_at_once = ALL_THREADS / across, columns_at_once = across * WHOLE_WIDTH;
#pragma unroll
    for (int r = 0; r < MOST_ROWS; r += rows_at_once)
#pragma unroll
        for (int c = 0; c < MOST_COUNT; c += columns_at_once) {
            const int row = threadIdx.x / across + r, k = threadIdx.x % across * WHOLE_WIDTH + c;
            if (row >= n_rows || k >= count) continue;
            if constexpr (WHOLE)
                copy_16_bytes(to + row * to_stride + k, from + row * from_stride + k);
            else
                to[row * to_stride + k] = read_ahead(from + row * from_stride + k);
        }
}
template <int MOST_COUNT>
DEVICE void copy_rows(Element* to, int stride, const Rows& rows, int first, int n_rows, int column, int count) {
    const Element* from = reinterpret_cast<const Element*>(rows.data) + first * rows.stride + column;
    copy_tile<BLOCK_ROWS, MOST_COUNT>(to, stride, from, int(rows.stride), n_rows, count);
}

// ------------------------------------------------------------------------------------------------ delta

// Eight neighbours in shared memory; zeros where there are no more.
DEVICE uint4 get_vector(const Element* from, bool has) {
    return has ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
}

// dt_proj's output to shared memory. A warp multiplies TILE rows by OUTPUTS channels: with g = lane / 4, a lane has
// columns of row g and of the channels g and g + 8.
DEVICE void project(const Shared& shared, const Parameters& p, int n_rows) {
    constexpr int n_tiles = (CHANNELS + OUTPUTS - 1) / OUTPUTS;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, stride = dt_stride(p), n_in = int(p.n_in);
    for (int task = threadIdx.x / 32; task / n_tiles * TILE < n_rows; task += ALL_THREADS / 32) {
        const int channel = task % n_tiles * OUTPUTS + g, row = task / n_tiles * TILE;
        const Element* x = shared.dt + min(row + g, n_rows - 1) * stride + t * VECTOR;
        const Element* upper = shared.weight + min(channel, CHANNELS - 1) * stride + t * VECTOR;
        const Element* lower = shared.weight + min(channel + 8, CHANNELS - 1) * stride + t * VECTOR;
        float sums[4] = {};
#pragma unroll 4
        for (int k = 0; k < n_in; k += CHUNK) {
            const bool has = k + t * VECTOR < n_in;
            const uint4 v = get_vector(x + k, has), a = get_vector(upper + k, has), b = get_vector(lower + k, has);
            multiply_tiles(sums, {a.x, b.x, a.y, b.y}, {v.x, v.y});
            multiply_tiles(sums, {a.z, b.z, a.w, b.w}, {v.z, v.w});
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int own_row = row + 2 * t + i % 2, within = channel + i / 2 * 8;
            if (own_row < n_rows && within < CHANNELS) shared.delta[own_row * STRIDE + within] = sums[i];
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

// The sums of `count` rows over the lanes of a channel: lane q of `count` gets that of row q. Each is added up as
// sum_over_lanes does.
template <int count>
DEVICE float sums_over_lanes(const float (&of_row)[count]) {
    if constexpr (count == 1) {
        return of_row[0];
    } else {
        constexpr int half = count / 2;
        const bool second = threadIdx.x & half;
        float sums[half];
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float sent = second ? of_row[i] : of_row[i + half], kept = second ? of_row[i + half] : of_row[i];
            sums[i] = kept + shuffle_xor(sent, half);
        }
        return sums_over_lanes(sums);
    }
}

constexpr int AT_ONCE = 16 * VECTOR;  // columns of dt and of dt_proj's weight

DEVICE void ask_for_weights(const Shared& shared, const Parameters& p, int column) {
    const int n_in = int(p.n_in), n_rows = min(CHANNELS, int(p.d_inner) - column), stride = dt_stride(p);
    const Element* from = reinterpret_cast<const Element*>(p.weight) + i64(column) * n_in;
#pragma unroll 1
    for (int k = 0; k < n_in; k += AT_ONCE)
        copy_tile<CHANNELS, AT_ONCE>(shared.weight + k, stride, from + k, n_in, n_rows, n_in - k);
}
DEVICE void ask_for_activations(const Shared& shared, const Parameters& p, int first, int n_rows, int column) {
    const int inside = min(CHANNELS, int(p.d_inner) - column), n_in = int(p.n_in), stride = dt_stride(p);
    copy_rows<CHANNELS>(shared.u, STRIDE, p.u, first, n_rows, column, inside);
    copy_rows<CHANNELS>(shared.z, STRIDE, p.z, first, n_rows, column, inside);
    if (!p.constant_B) copy_rows<D_STATE>(shared.B, D_STATE, p.B, first, n_rows, 0, D_STATE);
    if (!p.constant_C) copy_rows<D_STATE>(shared.C, D_STATE, p.C, first, n_rows, 0, D_STATE);
    if (p.delta.data) copy_rows<CHANNELS>(shared.dt, stride, p.delta, first, n_rows, column, inside);
    if (PROJECTS && p.weight)
#pragma unroll 1
        for (int k = 0; k < n_in; k += AT_ONCE)
            copy_rows<AT_ONCE>(shared.dt + k, stride, p.projected, first, n_rows, k, n_in - k);
    end_of_copies();
    if (threadIdx.x < inside) {
        shared.bias[threadIdx.x] = bias_of(p, column + threadIdx.x);
        shared.D[threadIdx.x] = D_of(p, column + threadIdx.x);
    }
}

// delta of a row of the block and a channel.
DEVICE float delta_of(const Shared& shared, const Parameters& p, int row, int within) {
    float delta = shared.bias[within];
    if (PROJECTS && p.weight) delta += shared.delta[row * STRIDE + within];
    if (p.delta.data) delta += as_float(shared.dt[row * dt_stride(p) + within]);
    return softplus_fast<DTYPE == FLOAT32>(delta);
}

KERNEL(ALL_THREADS, GROUPS == 1 ? 3 : 2) recur_rows(PARAMETER Parameters p) {
    const u32 blocks = blocks_of_row(p), part = blockIdx.x % blocks;
    const int first = int(blockIdx.x / blocks) * BLOCK_ROWS, column = int(part) * CHANNELS;
    const int set = int(threadIdx.x / THREADS) * ROWS;  // the first row of a thread in its block
    const Place at = place_of(p, part);
    const Shared shared = shared_of(p);
    if (PROJECTS && p.weight) ask_for_weights(shared, p, column);
    const Step step = shared_step(p, shared_memory());
    const int n_rows = min(BLOCK_ROWS, int(step.rows) - first), n_own = n_rows - set;
    const int next = int(p.d_inner) * D_STATE, within = at.channel - column;
    const i64 place = offset_of(p, step, first + set, at);
    const float* from = step.ssm + place;
    float* to = step.new_ssm + place;
    States h[ROWS] = {};
    if (at.inside && n_own > 0)
#pragma unroll
        for (int r = 0; r < ROWS; r++) read_states<true>(h[r], from + min(r, n_own - 1) * next, at);  // no branches
    States A = {}, B = {}, C = {};
    read_A(A, p, at);
    let_next_start();
    wait_for_previous();
    if (n_rows > 0) ask_for_activations(shared, p, first, n_rows, column);
    wait_for_copies<0>();
    sync_block();
    if (n_rows <= 0) return;
    if (PROJECTS && p.weight) {
        project(shared, p, n_rows);
        sync_block();
    }
    if (p.constant_B && at.inside) read_states(B, floats(p.constant_B) + i64(at.channel) * D_STATE + at.n, at);
    if (p.constant_C && at.inside) read_states(C, floats(p.constant_C) + i64(at.channel) * D_STATE + at.n, at);
#pragma unroll
    for (int r = 0; r < ROWS; r += QUAD) {
        const int own = r + at.part % QUAD, row = set + own;  // the lane's row
        const float own_delta = delta_of(shared, p, row, within);
        const float own_u = as_float(shared.u[row * STRIDE + within]);
        float y[QUAD];
#pragma unroll
        for (int q = 0; q < QUAD; q++) {
            const int lane = int(threadIdx.x % 32) / QUAD * QUAD + q;
            const float delta = shuffle(own_delta, lane), u = shuffle(own_u, lane);
            if (!p.constant_B) get_selected(B, shared.B + (set + r + q) * D_STATE, at);
            if (!p.constant_C) get_selected(C, shared.C + (set + r + q) * D_STATE, at);
            y[q] = advance_own_states(h[r + q], delta, u, A, B, C);
            if (at.inside && r + q < n_own) write_states<true>(to + (r + q) * next, h[r + q], at);
#pragma unroll
            for (int m = LANES / 2; m >= QUAD; m /= 2) y[q] += shuffle_xor(y[q], m);
        }
        const float sum = sums_over_lanes(y);
        const float gated[1] = {fmaf(shared.D[within], own_u, sum) * silu(as_float(shared.z[row * STRIDE + within]))};
        if (at.inside && at.part < QUAD && own < n_own)
            write<DTYPE>(reinterpret_cast<Element*>(p.y.data) + (first + row) * p.y.stride + at.channel, gated);
    }
}
