// The recurrence of a step: the states of a vector of channels move on by one token.
#pragma once

#include "stack_vectors.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

// One channel's state: h = exp(delta A) h + drive B; returns C . h.
template <bool ZOH, bool INSIDE>
ANYMAMBA_INLINE float run_channel(int64_t d_state, float delta, float drive, const float* A, const float* B,
                                  const float* C, const float* h, float* new_h, const Powers<float>& powers) {
    return sum_over(d_state, [&](int64_t n, int count) {
        const vfloat rate = read(A, n, count), high = rate * RATE_HIGH, x = broadcast(delta);
        const vfloat low = multiply_subtract(rate, broadcast(RATE_HIGH), high) + rate * RATE_LOW;
        const vfloat decay = INSIDE ? exp_product_inside(x, high, low, powers) : exp_product(x, high, low, powers);
        vfloat input = drive * read(B, n, count);
        if (ZOH) input *= expm1_ratio(x, high, low);
        const vfloat after = decay * read(h, n, count) + input;
        write(new_h, n, count, after);
        return after * read(C, n, count);
    });
}

template <bool ZOH, bool INSIDE>
ANYMAMBA_ONE_COPY void run_channels(const Layer& layer, int64_t begin, int count, const float* delta,
                                    const float* drive, const float* B, const float* C, const float* h, float* new_h,
                                    float* y) {
    const int64_t N = layer.d_state;
    const Powers<float> powers;
    for (int i = 0; i < count; i++) {
        const int64_t at = (begin + i) * N;
        y[i] = run_channel<ZOH, INSIDE>(N, delta[i], drive[i], layer.A + at, layer.B_rows ? B : layer.B + at,
                                        layer.C_rows ? C : layer.C + at, h + at, new_h + at, powers);
    }
}

// Channels [c, c + count) of one token: the new state, and y = C . h. B and C are those of the token, if selective.
ANYMAMBA_ONE_COPY vfloat run_vector(const Layer& layer, int64_t c, int count, vfloat delta, vfloat u, const float* B,
                                    const float* C, const float* h, float* new_h) {
    float deltas[W], drives[W], sums[W] = {};
    store<float>(deltas, delta);
    store<float>(drives, delta * u);
    bool inside = true;  // no exponent is large
    for (int i = 0; i < count; i++) inside &= deltas[i] * layer.largest_A < 87.0f;
    const auto run = layer.zoh ? (inside ? &run_channels<true, true> : &run_channels<true, false>)
                               : (inside ? &run_channels<false, true> : &run_channels<false, false>);
    run(layer, c, count, deltas, drives, B, C, h, new_h, sums);
    return load<float>(sums);
}

}  // namespace
}  // namespace anymamba::ANYMAMBA_ISA
