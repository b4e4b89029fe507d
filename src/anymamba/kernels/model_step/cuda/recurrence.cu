// One token of the recurrence, gated, with float32 states:
//
//     h = exp(delta A) h + f(delta, A) B u,    y = (C . h + D u) silu(z)
//
// with f = delta (Euler's rule) or (exp(delta A) - 1) / A (zero-order hold). LANES lanes (a power of two) share a
// channel, GROUPS times four neighbouring states each.
//
//     recur        delta = softplus(dt_proj(dt) + bias) is computed here from x_proj's output, with the inner norms;
//                  z is silu(z) already; activations are float32
//     recur_rows   delta is given before bias and softplus, z before SiLU; activations have the type DTYPE
//
// Launch: 128 threads. recur: early; blocks for the channels of each row of the bucket. recur_rows: blocks for the
// channels of each ROWS rows.
//
// Needs DTYPE, the type of dt_proj's weight, or of activations; D_STATE; LANES; GROUPS; ZOH, 0 or 1; and WHOLE, 1 if
// D_STATE is a multiple of 4 and B and C of many rows lie at multiples of 4 numbers.
#include "parameters.cuh"

constexpr int THREADS = 128, WIDTH = 4, ROWS = 2, STATES = GROUPS * WIDTH;
constexpr int AHEAD = 4;  // chunks of dt_proj's weight under way
typedef ElementOf<DTYPE>::Type Element;
constexpr int VECTOR = 16 / sizeof(Element);

typedef float States[STATES];

// Where a thread works: its channel, which lane of it, and its first state. The next group is 4 LANES states on, so
// that lanes read neighbouring numbers.
struct Place {
    int channel, part, n;
    bool inside;
};
constexpr int STEP_OF_GROUPS = LANES * WIDTH;

DEVICE Place place_of(const Parameters& p, u32 block) {
    const int index = int(block * THREADS + threadIdx.x), channel = index / LANES, part = index % LANES;
    return {channel, part, part * WIDTH, channel < p.d_inner};
}
DEVICE u32 blocks_of_row(const Parameters& p) { return (u32(p.d_inner) * LANES + THREADS - 1) / THREADS; }

// How far a thread's state is from its first, by the index in States; and whether the model has it.
DEVICE int offset_in_channel(int i) { return i / WIDTH * STEP_OF_GROUPS + i % WIDTH; }
DEVICE bool has_state(const Place& at, int i) {
    return STATES * LANES == D_STATE || at.n + offset_in_channel(i) < D_STATE;
}

// The states of a thread that is inside; `from` points to its first.
DEVICE void read_states(States& out, const float* from, const Place& at) {
#pragma unroll
    for (int i = 0; i < STATES; i += WHOLE ? WIDTH : 1) {
        if constexpr (WHOLE) {
            const bool has = has_state(at, i);
            const float4 v = has ? read_fresh(from + offset_in_channel(i)) : make_float4(0.f, 0.f, 0.f, 0.f);
            out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
        } else {
            out[i] = has_state(at, i) ? read_one_fresh(from + offset_in_channel(i)) : 0.f;
        }
    }
}
DEVICE void write_states(float* to, const States& h, const Place& at) {
#pragma unroll
    for (int i = 0; i < STATES; i += WHOLE ? WIDTH : 1) {
        if (!has_state(at, i)) continue;
        if constexpr (WHOLE)
            write_16_bytes(to + offset_in_channel(i), make_float4(h[i], h[i + 1], h[i + 2], h[i + 3]));
        else
            to[offset_in_channel(i)] = h[i];
    }
}

// What a channel has whatever the row.
struct Channel {
    States A, rate;  // rate is A log2(e)
    float bias, D;
};
DEVICE Channel channel_of(const Parameters& p, const Place& at) {
    Channel c = {};
    if (!at.inside) return c;
    read_states(c.A, floats(p.A) + i64(at.channel) * D_STATE + at.n, at);
#pragma unroll
    for (int i = 0; i < STATES; i++) c.rate[i] = LOG2_E * c.A[i];
    c.bias = p.delta_bias ? floats(p.delta_bias)[at.channel] : 0.f;
    c.D = p.D ? floats(p.D)[at.channel] : 0.f;
    return c;
}

DEVICE i64 offset_of(const Parameters& p, const Step& step, i64 row, const Place& at) {
    return ((p.layer * step.rows + row) * p.d_inner + at.channel) * D_STATE + at.n;
}

// The new state in h, and y without D and gate, the same in all lanes of a channel.
DEVICE float advance_states(States& h, float delta, float u, const States& B, const States& C, const Channel& c) {
    const float drive = delta * u;
    float y = 0.f;
#pragma unroll
    for (int i = 0; i < STATES; i++) {
        float driven = drive * B[i];
        if (ZOH && c.A[i] != 0.f) driven = expm1f(delta * c.A[i]) / c.A[i] * u * B[i];
        h[i] = fmaf(exp2_fast(delta * c.rate[i]), h[i], driven);
        y = fmaf(C[i], h[i], y);
    }
#pragma unroll
    for (int m = LANES / 2; m > 0; m /= 2) y += shuffle_xor(y, m);
    return y;
}

// ------------------------------------------------------------------------------------------------ few rows

// The RMS norm of numbers in shared memory, by one warp.
DEVICE void norm_in_place(float* values, int size, const float* weight, float eps) {
    const int lane = threadIdx.x % 32;
    float squares = 0.f;
    for (int i = lane; i < size; i += 32) squares = fmaf(values[i], values[i], squares);
    for (int m = 16; m > 0; m /= 2) squares += shuffle_xor(squares, m);
    const float scale = 1.f / sqrtf(squares / float(size) + eps);
    for (int i = lane; i < size; i += 32) values[i] *= scale * (weight ? weight[i] : 1.f);
}

// A row of x_proj's output in shared memory, normed: dt, with zeros up to n_in, then B and C.
DEVICE void prepare_row(float* shared, const Parameters& p, i64 row) {
    const int rank = int(p.dt_rank), padded = int(p.n_in), n = D_STATE, warp = threadIdx.x / 32;
    const int n_B = p.constant_B ? 0 : n, n_C = p.constant_C ? 0 : n;
    const float* from = floats(p.projected.data) + row * p.projected.stride;
    for (int i = threadIdx.x; i < padded + n_B + n_C; i += THREADS)
        shared[i] = i < rank ? read_one_fresh(from + i) : i < padded ? 0.f : read_one_fresh(from + i - padded + rank);
    sync_block();
    if (!p.inner_norms) return;
    if (warp == 0 && rank) norm_in_place(shared, rank, floats(p.dt_norm), float(p.eps));
    if (warp == 1 && n_B) norm_in_place(shared + padded, n_B, floats(p.B_norm), float(p.eps));
    if (warp == 2 && n_C) norm_in_place(shared + padded + n_B, n_C, floats(p.C_norm), float(p.eps));
    sync_block();
}

DEVICE void load_weights(uint4 (&w)[AHEAD], const Parameters& p, const Place& at, int chunk) {
    const Element* from = reinterpret_cast<const Element*>(p.weight) + at.channel * p.n_in;
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
        const int k = (chunk + a * LANES + at.part) * VECTOR;
        w[a] = k < p.n_in && at.channel < p.d_inner ? read_once(from + k) : uint4{0, 0, 0, 0};
    }
}
DEVICE float multiply_chunk(const uint4& w, const float* x) {
    const u32 words[4] = {w.x, w.y, w.z, w.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (DTYPE == FLOAT32) {
            sum = fmaf(bits_as_float(words[i]), x[i], sum);
        } else {
            sum = fmaf(bits_as_float(words[i] << 16), x[2 * i], sum);
            sum = fmaf(bits_as_float(words[i] & 0xffff0000u), x[2 * i + 1], sum);
        }
    }
    return sum;
}

// dt_proj of one channel, the same in all its lanes.
DEVICE float project(uint4 (&w)[AHEAD], const float* dt, const Parameters& p, const Place& at) {
    const int n_chunks = int(p.n_in) / VECTOR;
    float sum = 0.f;
    for (int chunk = 0; chunk < n_chunks; chunk += AHEAD * LANES) {
        if (chunk) load_weights(w, p, at, chunk);
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int own = chunk + a * LANES + at.part;
            if (own < n_chunks) sum += multiply_chunk(w[a], dt + own * VECTOR);
        }
    }
#pragma unroll
    for (int m = LANES / 2; m > 0; m /= 2) sum += shuffle_xor(sum, m);
    return sum;
}

DEVICE void read_selected(States& out, const u8* constant, const float* selected, const Parameters& p,
                          const Place& at) {
    if (constant && at.inside) return read_states(out, floats(constant) + i64(at.channel) * D_STATE + at.n, at);
#pragma unroll
    for (int i = 0; i < STATES; i++)
        out[i] = at.inside && has_state(at, i) ? selected[at.n + offset_in_channel(i)] : 0.f;
}

KERNEL(THREADS, 4) recur(PARAMETER Parameters p) {
    const u32 blocks = blocks_of_row(p);
    const i64 row = blockIdx.x / blocks;
    const Place at = place_of(p, blockIdx.x % blocks);
    float* shared = reinterpret_cast<float*>(shared_memory() + sizeof(Step));
    uint4 w[AHEAD];
    States h = {}, B, C;
    load_weights(w, p, at, 0);
    const Channel c = channel_of(p, at);
    const Step step = shared_step(p, shared_memory());
    const i64 place = offset_of(p, step, row, at);
    if (at.inside && row < step.rows) read_states(h, step.ssm + place, at);
    let_next_start();
    wait_for_previous();
    if (row >= step.rows) return;
    float u = 0.f, z = 0.f;
    if (at.inside) {
        u = read_one_fresh(floats(p.u.data) + row * p.u.stride + at.channel);
        z = read_one_fresh(floats(p.z.data) + row * p.z.stride + at.channel);
    }
    prepare_row(shared, p, row);
    const float* selected = shared + p.n_in;
    read_selected(B, p.constant_B, selected, p, at);
    read_selected(C, p.constant_C, selected + (p.constant_B ? 0 : D_STATE), p, at);
    const float delta = softplus_fast<true>(project(w, shared, p, at) + c.bias);
    const float y = advance_states(h, delta, u, B, C, c);
    if (!at.inside) return;
    write_states(step.new_ssm + place, h, at);
    if (at.part == 0) floats(p.y.data)[row * p.y.stride + at.channel] = fmaf(c.D, u, y) * z;
}

// ------------------------------------------------------------------------------------------------ many rows

DEVICE const Element* elements(const Rows& rows, int row, int column) {
    return reinterpret_cast<const Element*>(rows.data) + row * int(rows.stride) + column;
}
DEVICE float element(const Rows& rows, int row, int column) {
    float value[1];
    read<DTYPE>(value, elements(rows, row, column));
    return value[0];
}
DEVICE void read_matrix(States& out, const u8* constant, const Rows& rows, int row, const Parameters& p,
                        const Place& at) {
    if (constant) return read_states(out, floats(constant) + i64(at.channel) * D_STATE + at.n, at);
#pragma unroll
    for (int i = 0; i < STATES; i += WHOLE ? WIDTH : 1) {
        if constexpr (WHOLE) {
            float four[WIDTH] = {};
            if (has_state(at, i)) read<DTYPE>(four, elements(rows, row, at.n + offset_in_channel(i)));
            out[i] = four[0], out[i + 1] = four[1], out[i + 2] = four[2], out[i + 3] = four[3];
        } else {
            out[i] = has_state(at, i) ? element(rows, row, at.n + offset_in_channel(i)) : 0.f;
        }
    }
}

struct Token {
    States h, B, C;
    float u, z, delta;
};

KERNEL(THREADS, GROUPS == 1 ? 8 : 5) recur_rows(PARAMETER Parameters p) {
    const u32 blocks = blocks_of_row(p);
    const int first = int(blockIdx.x / blocks) * ROWS, next = int(p.d_inner) * D_STATE;
    const Place at = place_of(p, blockIdx.x % blocks);
    const Step step = step_of(p);
    const i64 place = offset_of(p, step, first, at);
    const int n_rows = min(ROWS, int(step.rows) - first);
    const float* from = step.ssm + place;
    float* to = step.new_ssm + place;
    Token tokens[ROWS] = {};
    Channel c = {};
    if (at.inside) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (r >= n_rows) continue;
            Token& x = tokens[r];
            read_states(x.h, from + r * next, at);
            if (p.delta.data) x.delta = element(p.delta, first + r, at.channel);
            x.u = element(p.u, first + r, at.channel), x.z = element(p.z, first + r, at.channel);
            read_matrix(x.B, p.constant_B, p.B, first + r, p, at);
            read_matrix(x.C, p.constant_C, p.C, first + r, p, at);
        }
        c = channel_of(p, at);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= n_rows) continue;
        Token& x = tokens[r];
        const float delta = softplus_fast<DTYPE == FLOAT32>(x.delta + c.bias);
        const float y[1] = {fmaf(c.D, x.u, advance_states(x.h, delta, x.u, x.B, x.C, c)) * silu(x.z)};
        if (!at.inside) continue;
        write_states(to + r * next, x.h, at);
        if (at.part == 0)
            write<DTYPE>(reinterpret_cast<Element*>(p.y.data) + (first + r) * int(p.y.stride) + at.channel, y);
    }
}
