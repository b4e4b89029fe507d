// One token of the selective scan, for real A, selective B and C, Euler's rule and float32 states; d_state is a
// multiple of 4 and at most 128.
//
// p.lanes lanes (a power of two, at least ROWS) share a channel, four neighbouring states each, for ROWS rows of the
// batch, which share A. What a row and channel have once, such as the step and the gate, is read and computed by one
// lane of four, whose row that is; the others get it from there. The time is that of memory: all that a lane needs is
// asked for before any of it is used, so numbers stay as they are in memory until then.
//
// Launch: 128 threads; p.blocks_of_group blocks for the channels of ROWS rows.
//
// Needs DTYPE.
#include "parameters.cuh"

constexpr int THREADS = 128, ROWS = 4, WIDTH = 4;

typedef ElementOf<DTYPE>::Type Element;
constexpr bool SHORT = sizeof(Element) == 2, PRECISE = !SHORT;  // see softplus_fast

// Four states of B or C as they are in memory.
struct alignas(4 * sizeof(Element)) Packed {
    Element of[WIDTH];
};
template <bool ALIGNED>
DEVICE Packed ask(const Element* from) {
    if constexpr (ALIGNED) return *reinterpret_cast<const Packed*>(from);
    Packed found;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) found.of[i] = from[i];
    return found;
}

DEVICE const Element* row_at(const Rows& rows, i64 row) {
    return reinterpret_cast<const Element*>(rows.data) + row * rows.batch;
}
DEVICE float as_float(Element x) {
    float value[1];
    read<DTYPE>(value, &x);
    return value[0];
}

// The sums of four rows over the lanes of a channel: lane q of four gets that of row q.
DEVICE float sum_over_lanes(float (&of_row)[ROWS], u32 lanes) {
    static_assert(ROWS == 4, "");
    for (u32 m = lanes / 2; m >= ROWS; m /= 2)
#pragma unroll
        for (int r = 0; r < ROWS; r++) of_row[r] += shuffle_xor(of_row[r], int(m));
    const bool second = threadIdx.x & 2, odd = threadIdx.x & 1;
    const float even_row = (second ? of_row[2] : of_row[0]) + shuffle_xor(second ? of_row[0] : of_row[2], 2);
    const float odd_row = (second ? of_row[3] : of_row[1]) + shuffle_xor(second ? of_row[1] : of_row[3], 2);
    return (odd ? odd_row : even_row) + shuffle_xor(odd ? even_row : odd_row, 1);
}

template <bool ALIGNED>
DEVICE void step_of_rows(const Parameters& p) {
    const u32 blocks = u32(p.blocks_of_group), lanes = u32(p.lanes), shift = u32(first_bit(lanes));
    const u32 index = blockIdx.x % blocks * THREADS + threadIdx.x;
    const i64 first_row = i64(blockIdx.x / blocks) * ROWS;
    const int channel = int(index >> shift), part = int(index & (lanes - 1)), n = part * WIDTH;
    const int d_inner = int(p.d_inner), d_state = int(p.d_state), rows = int(min(i64(ROWS), p.batch - first_row));
    const bool exists = channel < d_inner, inside = exists && n < d_state;
    const int group = p.n_groups == 1 || !exists ? 0 : channel / (d_inner / int(p.n_groups));

    float rate[WIDTH] = {}, h[ROWS][WIDTH] = {}, bias = 0.f, D = 0.f;
    Packed B[ROWS] = {}, C[ROWS] = {};
    Element u = 0, delta = 0, z = 0;
    const i64 place = (first_row * d_inner + channel) * d_state + n, row_of_states = i64(d_inner) * d_state;
    if (inside) {
        const Element *from_B = row_at(p.B, first_row) + group * p.B.group + n,
                      *from_C = row_at(p.C, first_row) + group * p.C.group + n;
        const float* states = reinterpret_cast<const float*>(p.initial_state) + place;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (r >= rows) continue;
            if (p.initial_state) read<FLOAT32>(h[r], states + r * row_of_states);
            B[r] = ask<ALIGNED>(from_B + r * p.B.batch), C[r] = ask<ALIGNED>(from_C + r * p.C.batch);
        }
        read<FLOAT32>(rate, reinterpret_cast<const float*>(p.A) + i64(channel) * d_state + n);
    }
    const int own = part % ROWS;  // the lane's row
    const bool has_row = exists && own < rows;
    if (has_row) {
        const i64 row = first_row + own;
        delta = row_at(p.delta, row)[channel], u = row_at(p.u, row)[channel];
        if (p.z.data) z = row_at(p.z, row)[channel];
        if (p.delta_bias) bias = reinterpret_cast<const float*>(p.delta_bias)[channel];
        if (p.D) D = reinterpret_cast<const float*>(p.D)[channel];
    }

    float d = as_float(delta) + bias, y[ROWS];
    if (p.softplus) d = softplus_fast<PRECISE>(d);
    const float drive = d * as_float(u), in_log2 = d * LOG2_E;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int lane = int(threadIdx.x & 28) + r;
        const float step = shuffle(in_log2, lane), weight = shuffle(drive, lane);
        float of_B[WIDTH], of_C[WIDTH];
        read<DTYPE>(of_B, B[r].of), read<DTYPE>(of_C, C[r].of);
        y[r] = 0.f;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            h[r][i] = fmaf(exp2_fast(step * rate[i]), h[r][i], weight * of_B[i]);
            y[r] = fmaf(of_C[i], h[r][i], y[r]);
        }
        if (inside && r < rows)
            write_16_bytes(reinterpret_cast<float*>(p.last_state) + place + r * row_of_states,
                           make_float4(h[r][0], h[r][1], h[r][2], h[r][3]));
    }
    float sum = fmaf(D, as_float(u), sum_over_lanes(y, lanes));
    if (p.z.data) sum *= as_float(z) * sigmoid_fast(as_float(z));
    if (has_row && part < ROWS) {
        const float value[1] = {sum};
        write<DTYPE>(reinterpret_cast<Element*>(p.y.data) + (first_row + own) * p.y.batch + channel, value);
    }
}

KERNEL(THREADS, SHORT ? 8 : 6) step(PARAMETER Parameters p) {
    wait_for_previous();
    let_next_start();
    if (p.B.aligned && p.C.aligned) {
        step_of_rows<true>(p);
    } else {
        step_of_rows<false>(p);
    }
}
