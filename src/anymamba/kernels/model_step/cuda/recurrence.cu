// The recurrence of a few rows: delta = softplus(dt_proj(dt) + bias) is computed here from x_proj's output, with the
// inner norms; z is silu(z) already; activations are float32. See recurrence.cuh.
//
// Launch: 128 threads, early; blocks for the channels of each row of the bucket.
//
// Needs what recurrence.cuh does; DTYPE is the type of dt_proj's weight.
#include "recurrence.cuh"

constexpr int AHEAD = 5;  // chunks of dt_proj's weight under way: 160 columns in bfloat16, as mamba-2.8b has

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
    States h = {}, A = {}, B, C;
    load_weights(w, p, at, 0);
    read_A(A, p, at);
    const float bias = at.inside ? bias_of(p, at.channel) : 0.f, D = at.inside ? D_of(p, at.channel) : 0.f;
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
    const float delta = softplus_fast<true>(project(w, shared, p, at) + bias);
    const float y = sum_over_lanes(advance_own_states(h, delta, u, A, B, C));
    if (!at.inside) return;
    write_states(step.new_ssm + place, h, at);
    if (at.part == 0) floats(p.y.data)[row * p.y.stride + at.channel] = fmaf(D, u, y) * z;
}
