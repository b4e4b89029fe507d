// One token of the selective scan, for real A, selective B and C, Euler's rule and float32 states; d_state is a
// multiple of 4 and at most 128.
//
// p.lanes lanes (a power of two) share a channel, four neighbouring states each, for ROWS rows of the batch, which
// share A. All that a lane needs is asked for before any of it is used: the time is that of memory.
//
// Launch: 128 threads; p.blocks_of_group blocks for the channels of ROWS rows. Two rows, so that a multiprocessor has
// bytes enough under way; more rows gave too few blocks to fill the last wave.
//
// Needs DTYPE.
#include "parameters.cuh"

constexpr int THREADS = 128, ROWS = 2, WIDTH = 4;

typedef ElementOf<DTYPE>::Type Element;
constexpr bool PRECISE = sizeof(Element) > 2;  // see softplus_fast

DEVICE float element(const Rows& rows, i64 row, int channel) {
    float value[1];
    read<DTYPE>(value, reinterpret_cast<const Element*>(rows.data) + row * rows.batch + channel);
    return value[0];
}

// Four states of B or C.
DEVICE void read_matrix(float (&out)[WIDTH], const Rows& rows, i64 row, int group, int n) {
    const Element* from = reinterpret_cast<const Element*>(rows.data) + row * rows.batch + group * rows.group + n;
    if (rows.aligned) {
        read<DTYPE>(out, from);
    } else {
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            float value[1];
            read<DTYPE>(value, from + i);
            out[i] = value[0];
        }
    }
}

struct Token {  // of a row
    float h[WIDTH], B[WIDTH], C[WIDTH], u, delta, z;
};

KERNEL(THREADS, 8) step(PARAMETER Parameters p) {
    wait_for_previous();
    let_next_start();
    const u32 blocks = u32(p.blocks_of_group), lanes = u32(p.lanes), shift = u32(first_bit(lanes));
    const u32 index = blockIdx.x % blocks * THREADS + threadIdx.x;
    const i64 first_row = i64(blockIdx.x / blocks) * ROWS;
    const int channel = int(index >> shift), part = int(index & (lanes - 1)), n = part * WIDTH;
    const int d_inner = int(p.d_inner), d_state = int(p.d_state);
    const bool inside = channel < d_inner && n < d_state;
    const int group = p.n_groups == 1 || !inside ? 0 : channel / (d_inner / int(p.n_groups));

    float rate[WIDTH] = {}, bias = 0.f, D = 0.f;
    Token tokens[ROWS] = {};
    const i64 place = (first_row * d_inner + channel) * d_state + n, row_of_states = i64(d_inner) * d_state;
    if (inside) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const i64 row = first_row + r;
            Token& x = tokens[r];
            if (row >= p.batch) continue;
            if (p.initial_state)
                read<FLOAT32>(x.h, reinterpret_cast<const float*>(p.initial_state) + place + r * row_of_states);
            x.delta = element(p.delta, row, channel), x.u = element(p.u, row, channel);
            read_matrix(x.B, p.B, row, group, n);
            read_matrix(x.C, p.C, row, group, n);
            if (p.z.data) x.z = element(p.z, row, channel);
        }
        read<FLOAT32>(rate, reinterpret_cast<const float*>(p.A) + i64(channel) * d_state + n);
        if (p.delta_bias) bias = reinterpret_cast<const float*>(p.delta_bias)[channel];
        if (p.D) D = reinterpret_cast<const float*>(p.D)[channel];
    }
#pragma unroll
    for (int i = 0; i < WIDTH; i++) rate[i] *= LOG2_E;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const i64 row = first_row + r;
        Token& x = tokens[r];
        if (row >= p.batch) continue;
        float d = x.delta + bias, y = 0.f;
        if (p.softplus) d = softplus_fast<PRECISE>(d);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            x.h[i] = fmaf(exp2_fast(d * rate[i]), x.h[i], d * x.u * x.B[i]);
            y = fmaf(x.C[i], x.h[i], y);
        }
        if (inside)
            write_16_bytes(reinterpret_cast<float*>(p.last_state) + place + r * row_of_states,
                           make_float4(x.h[0], x.h[1], x.h[2], x.h[3]));
        for (u32 m = lanes / 2; m > 0; m /= 2) y += shuffle_xor(y, int(m));
        y = fmaf(D, x.u, y);
        if (p.z.data) y *= x.z * sigmoid_fast(x.z);
        if (inside && part == 0) write<DTYPE, 1>(reinterpret_cast<Element*>(p.y.data) + row * p.y.batch + channel, {y});
    }
}
