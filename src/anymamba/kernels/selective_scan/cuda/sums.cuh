// Sums of the parts that blocks have written; every sum has an order of its own, by the shapes.
#pragma once

#include "numbers.cuh"
#include "parameters.cuh"

// The sum of `count` numbers, `stride` apart, in their order; several are asked for at once.
template <typename N>
DEVICE N sum_of(const N* first, i64 stride, i64 count) {
    constexpr int AT_ONCE = 8;
    N sum = N();
    for (i64 k0 = 0; k0 < count; k0 += AT_ONCE) {
        N some[AT_ONCE] = {};
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
            if (k0 + k < count) some[k] = first[(k0 + k) * stride];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) sum = sum + some[k];
    }
    return sum;
}

// The gradients of A, constant B and C, D and delta_bias from the parts of rows and chunks, (part, state, channel); for
// each i below (d_state + 2) * channels.
DEVICE void sum_part(const Parameters& p, i64 i) {
    const i64 c = i % p.channels, n = i / p.channels;  // n = d_state is D, d_state + 1 the bias
    const i64 per_group = p.d_inner / p.n_groups, padded = p.channels / p.n_groups;
    if (n > p.d_state + 1 || c % padded >= per_group) return;
    const i64 channel = c / padded * per_group + c % padded;
    if (n < p.d_state) {
        const i64 size = p.states * p.channels, from = n * p.channels + c, to = channel * p.d_state + n;
        const u8* const parts[] = {p.dA_parts, p.constant_B ? p.dB_parts : nullptr,
                                   p.constant_C ? p.dC_parts : nullptr};
        u8* const results[] = {p.dA, p.dB, p.dC};
        const i64 dtypes[] = {p.dA_dtype, p.dB_dtype, p.dC_dtype};
#pragma unroll
        for (int m = 0; m < 3; m++) {
            if (!parts[m]) continue;
            const T sum = sum_of(reinterpret_cast<const T*>(parts[m]) + from, size, p.n_parts);
            write_number(results[m], to, int(dtypes[m]), sum);
        }
    } else {
        const bool bias = n > p.d_state;
        const R* parts = reinterpret_cast<const R*>(bias ? p.dbias_parts : p.dD_parts);
        if (!(bias ? p.dbias : p.dD)) return;
        const R sum = sum_of(parts + c, p.channels, p.n_parts);
        write_as<R>(bias ? p.dbias : p.dD, channel, int(bias ? p.dbias_dtype : p.dD_dtype), sum);
    }
}
