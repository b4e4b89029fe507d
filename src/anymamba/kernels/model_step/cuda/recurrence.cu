// One token of the recurrence, gated, with float32 states:
//
//     h = exp(delta A) h + f(delta, A) B u,    y = (C . h + D u) silu(z)
//
// with f = delta (Euler's rule) or (exp(delta A) - 1) / A (zero-order hold). p.lanes lanes (a power of two) share a
// channel, four neighbouring states each.
//
//     recur        delta = softplus(dt_proj(dt) + bias) is computed here from x_proj's output, with the inner norms;
//                  z is silu(z) already; activations are float32
//     recur_rows   delta is given before bias and softplus, z before SiLU; activations have the type DTYPE
//
// Launch: 128 threads. recur: early; blocks for the channels of each row of the bucket. recur_rows: blocks for the
// channels of each ROWS rows.
//
// Needs DTYPE, the type of dt_proj's weight, or of activations.
#include "parameters.cuh"

constexpr int THREADS = 128, WIDTH = 4, ROWS = 2;
constexpr int AHEAD = 4;  // chunks of dt_proj's weight under way
typedef ElementOf<DTYPE>::Type Element;
constexpr int VECTOR = 16 / sizeof(Element);

typedef float States[WIDTH];

// Where a thread works: its channel, its first state, and how many states it has.
struct Place {
    int channel, n, count, part;
    bool inside;
};
DEVICE Place place_of(const Parameters& p, u32 block) {
    const u32 lanes = u32(p.lanes), index = block * THREADS + threadIdx.x;
    const int channel = int(index >> first_bit(lanes)), part = int(index & (lanes - 1)), n = part * WIDTH;
    const int count = channel < p.d_inner ? max(0, min(WIDTH, int(p.d_state) - n)) : 0;
    return {channel, n, count, part, count > 0};
}

DEVICE void read_states(States& out, const float* from, const Parameters& p, const Place& at) {
    if (p.d_state % WIDTH == 0 && at.inside) {
        const float4 v = read_fresh(from);
        out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < WIDTH; i++) out[i] = i < at.count ? read_one_fresh(from + i) : 0.f;
}
DEVICE void write_states(float* to, const States& h, const Parameters& p, const Place& at) {
    if (p.d_state % WIDTH == 0 && at.inside) return write_16_bytes(to, make_float4(h[0], h[1], h[2], h[3]));
#pragma unroll
    for (int i = 0; i < WIDTH; i++)
        if (i < at.count) to[i] = h[i];
}

// What a channel has whatever the row.
struct Channel {
    States A;
    float bias, D;
};
DEVICE Channel channel_of(const Parameters& p, const Place& at) {
    Channel c = {};
    if (!at.inside) return c;
    read_states(c.A, floats(p.A) + i64(at.channel) * p.d_state + at.n, p, at);
    c.bias = p.delta_bias ? floats(p.delta_bias)[at.channel] : 0.f;
    c.D = p.D ? floats(p.D)[at.channel] : 0.f;
    return c;
}

DEVICE i64 offset_of(const Parameters& p, const Step& step, i64 row, const Place& at) {
    return ((p.layer * step.rows + row) * p.d_inner + at.channel) * p.d_state + at.n;
}

// The new state in h, and y without D and gate, the same in all lanes of a channel.
DEVICE float advance_states(States& h, float delta, float u, const States& B, const States& C, const Channel& c,
                            const Parameters& p) {
    float y = 0.f;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        const float x = delta * c.A[i];
        const float factor = p.zoh && c.A[i] != 0.f ? expm1f(x) / c.A[i] : delta;
        h[i] = fmaf(exp2_fast(LOG2_E * x), h[i], factor * u * B[i]);
        y = fmaf(C[i], h[i], y);
    }
    for (int m = int(p.lanes) / 2; m > 0; m /= 2) y += shuffle_xor(y, m);
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
    const int rank = int(p.dt_rank), padded = int(p.n_in), n = int(p.d_state), warp = threadIdx.x / 32;
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
        const int k = (chunk + a * int(p.lanes) + at.part) * VECTOR;
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
    const int lanes = int(p.lanes), n_chunks = int(p.n_in) / VECTOR;
    float sum = 0.f;
    for (int chunk = 0; chunk < n_chunks; chunk += AHEAD * lanes) {
        if (chunk) load_weights(w, p, at, chunk);
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int own = chunk + a * lanes + at.part;
            if (own < n_chunks) sum += multiply_chunk(w[a], dt + own * VECTOR);
        }
    }
    for (int m = lanes / 2; m > 0; m /= 2) sum += shuffle_xor(sum, m);
    return sum;
}

DEVICE void read_selected(States& out, const u8* constant, const float* selected, const Parameters& p,
                          const Place& at) {
    if (constant) return read_states(out, floats(constant) + i64(at.channel) * p.d_state + at.n, p, at);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) out[i] = i < at.count ? selected[at.n + i] : 0.f;
}

KERNEL(THREADS, 4) recur(PARAMETER Parameters p) {
    const u32 blocks = u32((p.d_inner * p.lanes + THREADS - 1) / THREADS);
    const i64 row = blockIdx.x / blocks;
    const Place at = place_of(p, blockIdx.x % blocks);
    float* shared = reinterpret_cast<float*>(shared_memory() + sizeof(Step));
    uint4 w[AHEAD];
    States h = {}, B, C;
    load_weights(w, p, at, 0);
    const Channel c = channel_of(p, at);
    const Step step = shared_step(p, shared_memory());
    const i64 place = offset_of(p, step, row, at);
    if (at.inside && row < step.rows) read_states(h, step.ssm + place, p, at);
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
    read_selected(C, p.constant_C, selected + (p.constant_B ? 0 : p.d_state), p, at);
    const float delta = softplus_fast<true>(project(w, shared, p, at) + c.bias);
    const float y = advance_states(h, delta, u, B, C, c, p);
    write_states(step.new_ssm + place, h, p, at);
    if (at.inside && at.part == 0) floats(p.y.data)[row * p.y.stride + at.channel] = fmaf(c.D, u, y) * z;
}

// ------------------------------------------------------------------------------------------------ many rows

DEVICE float element(const Rows& rows, i64 row, int channel) {
    float value[1];
    read<DTYPE>(value, reinterpret_cast<const Element*>(rows.data) + row * rows.stride + channel);
    return value[0];
}
DEVICE void read_matrix(States& out, const u8* constant, const Rows& rows, i64 row, const Parameters& p,
                        const Place& at) {
    if (constant) return read_states(out, floats(constant) + i64(at.channel) * p.d_state + at.n, p, at);
    const u64 place = reinterpret_cast<u64>(rows.data) / sizeof(Element);
    if (p.d_state % WIDTH == 0 && rows.stride % WIDTH == 0 && place % WIDTH == 0) {
        read<DTYPE>(out, reinterpret_cast<const Element*>(rows.data) + row * rows.stride + at.n);
        return;
    }
#pragma unroll
    for (int i = 0; i < WIDTH; i++) out[i] = i < at.count ? element(rows, row, at.n + i) : 0.f;
}

struct Token {
    States h, B, C;
    float u, z, delta;
};

KERNEL(THREADS, 8) recur_rows(PARAMETER Parameters p) {
    const u32 blocks = u32((p.d_inner * p.lanes + THREADS - 1) / THREADS);
    const i64 first = i64(blockIdx.x / blocks) * ROWS;
    const Place at = place_of(p, blockIdx.x % blocks);
    const Step step = step_of(p);
    const i64 place = offset_of(p, step, first, at), next = p.d_inner * p.d_state;
    const Channel c = channel_of(p, at);
    Token tokens[ROWS] = {};
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const i64 row = first + r;
        if (!at.inside || row >= step.rows) continue;
        Token& x = tokens[r];
        read_states(x.h, step.ssm + place + r * next, p, at);
        if (p.delta.data) x.delta = element(p.delta, row, at.channel);
        x.u = element(p.u, row, at.channel), x.z = element(p.z, row, at.channel);
        read_matrix(x.B, p.constant_B, p.B, row, p, at);
        read_matrix(x.C, p.constant_C, p.C, row, p, at);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const i64 row = first + r;
        if (row >= step.rows) continue;
        Token& x = tokens[r];
        const float delta = softplus_fast<DTYPE == FLOAT32>(x.delta + c.bias);
        const float y[1] = {fmaf(c.D, x.u, advance_states(x.h, delta, x.u, x.B, x.C, c, p)) * silu(x.z)};
        write_states(step.new_ssm + place + r * next, x.h, p, at);
        if (at.inside && at.part == 0)
            write<DTYPE>(reinterpret_cast<Element*>(p.y.data) + row * p.y.stride + at.channel, y);
    }
}
