// One token of the recurrence, gated, with float32 states:
//
//     h = exp(delta A) h + f(delta, A) B u,    y = (C . h + D u) silu(z)
//
// with f = delta (Euler's rule) or (exp(delta A) - 1) / A (zero-order hold). LANES lanes (a power of two) share a
// channel, GROUPS times four neighbouring states each; a block of 128 threads has CHANNELS channels.
//
// Needs DTYPE, a floating-point type of the kernel; D_STATE; LANES; GROUPS; ZOH, 0 or 1; and WHOLE, 1 if D_STATE is a
// multiple of 4.
#pragma once

#include "parameters.cuh"

constexpr int THREADS = 128, WARPS = THREADS / 32, WIDTH = 4, STATES = GROUPS * WIDTH, CHANNELS = THREADS / LANES;
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
