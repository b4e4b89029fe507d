// Vectors over rows of float32, and the norm: what the phases of a step are written with.
#pragma once

#include <cmath>

#include "simd.h"
#include "stack.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

constexpr int W = LANES<float>;
constexpr DType F32 = DType::float32;

ANYMAMBA_INLINE vfloat read(const float* data, int64_t index, int count) {
    return data ? read_floats(data, F32, index, count) : vfloat{};
}
ANYMAMBA_INLINE void write(float* data, int64_t index, int count, vfloat value) {
    write_floats(data, F32, index, count, value);
}

// Calls f(index, count) for vectors that cover [begin, end).
template <typename F>
ANYMAMBA_INLINE void for_vectors(int64_t begin, int64_t end, const F& f) {
    int64_t i = begin;
    for (; i + W <= end; i += W) f(i, W);
    if (i < end) f(i, int(end - i));
}

template <typename F>
ANYMAMBA_INLINE float sum_over(int64_t size, const F& f) {
    vfloat sum{};
    for_vectors(0, size, [&](int64_t i, int count) { sum += f(i, count); });
    float lanes[W];
    store<float>(lanes, sum);
    return sum_of_lanes<float, W>(lanes);
}

ANYMAMBA_ONE_COPY vfloat silu_of(vfloat x) { return silu(x); }

// y = norm(x); y may be x.
ANYMAMBA_ONE_COPY void normalize(const Norm& norm, const float* x, int64_t size, float* y) {
    float mean = 0;
    if (norm.subtract_mean)
        mean = sum_over(size, [&](int64_t i, int count) { return read(x, i, count); }) / float(size);
    const float squares = sum_over(size, [&](int64_t i, int count) {
        vfloat v = read(x, i, count) - mean;
        for (int lane = count; lane < W; lane++) v[lane] = 0;
        return v * v;
    });
    const float scale = 1.0f / std::sqrt(squares / float(size) + norm.eps);
    for_vectors(0, size, [&](int64_t i, int count) {
        vfloat v = (read(x, i, count) - mean) * scale;
        if (norm.weight) v *= read(norm.weight, i, count);
        write(y, i, count, v + read(norm.bias, i, count));
    });
}

}  // namespace
}  // namespace anymamba::ANYMAMBA_ISA
