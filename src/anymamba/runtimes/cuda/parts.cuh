// Sums over time or rows, from the parts that blocks have written: the same bits whichever block was first.
#pragma once

#include "device.cuh"

constexpr int WAYS = 16;  // by which the parts of a sum are split; a block has 32 columns times WAYS threads

// The sum of a column over its parts, `stride` numbers apart, for the threads of way 0; others get anything. Shared
// memory holds R[32 * WAYS].
template <typename R>
DEVICE R sum_of_parts(const R* first, i64 stride, i64 n_parts, bool inside) {
    // There are few blocks, which wait for memory in every round: one is enough for 384 parts, and two for the 528 that
    // four blocks for each of 132 multiprocessors write.
    constexpr int AT_ONCE = 24;
    R* sums = reinterpret_cast<R*>(shared_memory());
    const int way = int(threadIdx.x / 32);
    R sum = R(0);
    for (i64 k0 = way; inside && k0 < n_parts; k0 += WAYS * AT_ONCE) {
        const int left = int(min(n_parts - k0, i64(WAYS * AT_ONCE)));
        const R* part = first + k0 * stride;
        R some[AT_ONCE] = {};
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++, part += WAYS * stride)
            if (WAYS * k < left) some[k] = *part;
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) sum += some[k];
    }
    sums[threadIdx.x] = sum;
    sync_block();
    if (way == 0)
#pragma unroll
        for (int k = 1; k < WAYS; k++) sum += sums[32 * k + threadIdx.x];
    return sum;
}
