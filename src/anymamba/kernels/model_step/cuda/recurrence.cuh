// One token of the recurrence, gated, with float32 states:
//
//     h = exp(delta A) h + f(delta, A) B u,    y = (C . h + D u) silu(z)
//
// with f = delta (Euler's rule) or (exp(delta A) - 1) / A (zero-order hold). LANES lanes (a power of two) share a
// channel, GROUPS times four neighbouring states each; 128 threads have CHANNELS channels.
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
    const int index = int(block * THREADS + threadIdx.x % THREADS), channel = index / LANES, part = index % LANES;
    return {channel, part, part * WIDTH, channel < p.d_inner};
}
DEVICE u32 blocks_of_row(const Parameters& p) { return (u32(p.d_inner) * LANES + THREADS - 1) / THREADS; }

// How far a thread's state is from its first, by the index in States; and whether the model has it.
DEVICE int offset_in_channel(int i) { return i / WIDTH * STEP_OF_GROUPS + i % WIDTH; }
DEVICE bool has_state(const Place& at, int i) {
    return STATES * LANES == D_STATE || at.n + offset_in_channel(i) < D_STATE;
}

// The states of a thread that is inside; `from` points to its first. STREAMED: see read_streamed.
template <bool STREAMED = false>
DEVICE void read_states(States& out, const float* from, const Place& at) {
#pragma unroll
    for (int i = 0; i < STATES; i += WHOLE ? WIDTH : 1) {
        if constexpr (WHOLE) {
            const bool has = has_state(at, i);
            float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
            if (has)
                v = STREAMED ? read_streamed(from + offset_in_channel(i)) : read_fresh(from + offset_in_channel(i));
            out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
        } else {
            out[i] = has_state(at, i) ? read_one_fresh(from + offset_in_channel(i)) : 0.f;
        }
    }
}
template <bool STREAMED = false>
DEVICE void write_states(float* to, const States& h, const Place& at) {
#pragma unroll
    for (int i = 0; i < STATES; i += WHOLE ? WIDTH : 1) {
        if (!has_state(at, i)) continue;
        if constexpr (WHOLE) {
            const float4 v = make_float4(h[i], h[i + 1], h[i + 2], h[i + 3]);
            STREAMED ? write_streamed(to + offset_in_channel(i), v) : write_16_bytes(to + offset_in_channel(i), v);
        } else
            to[offset_in_channel(i)] = h[i];
    }
}

// A of a thread's states, and a channel's bias and D. All stay as they are in memory: what is computed from them waits
// for them.
DEVICE void read_A(States& A, const Parameters& p, const Place& at) {
    if (at.inside) read_states(A, floats(p.A) + i64(at.channel) * D_STATE + at.n, at);
}
DEVICE float bias_of(const Parameters& p, int channel) { return p.delta_bias ? floats(p.delta_bias)[channel] : 0.f; }
DEVICE float D_of(const Parameters& p, int channel) { return p.D ? floats(p.D)[channel] : 0.f; }

DEVICE i64 offset_of(const Parameters& p, const Step& step, i64 row, const Place& at) {
    return ((p.layer * step.rows + row) * p.d_inner + at.channel) * D_STATE + at.n;
}

// The new state in h, and what it adds to y without D and gate.
DEVICE float advance_own_states(States& h, float delta, float u, const States& A, const States& B, const States& C) {
    const float drive = delta * u;
    float y = 0.f;
#pragma unroll
    for (int i = 0; i < STATES; i++) {
        float driven = drive * B[i];
        if (ZOH && A[i] != 0.f) driven = expm1f(delta * A[i]) / A[i] * u * B[i];
        h[i] = fmaf(exp2_fast(delta * (LOG2_E * A[i])), h[i], driven);
        y = fmaf(C[i], h[i], y);
    }
    return y;
}

// The sum over the lanes of a channel, the same in all of them.
DEVICE float sum_over_lanes(float y) {
#pragma unroll
    for (int m = LANES / 2; m > 0; m /= 2) y += shuffle_xor(y, m);
    return y;
}
