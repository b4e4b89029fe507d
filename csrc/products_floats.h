// Products of weights in float32, bfloat16 and float16.
//
// A sum runs along the columns, one vector at a time, and its lanes are added at the end. Tiles of several outputs and
// several rows read each vector once for all of them; the order of a sum does not depend on the tile.
#pragma once

#include <algorithm>

#include "packed.h"
#include "products_panel.h"
#include "simd.h"

namespace anymamba::ANYMAMBA_ISA {

// Weights and activations in the registers of one step: how they are loaded, and multiplied and added.
struct Float32 {
    using Weight = float;
    using Activation = float;
    using Loaded = vfloat;
    static constexpr int COLUMNS = LANES<float>;
    ANYMAMBA_INLINE static Loaded weights(const Weight* p) { return load<float>(p); }
    ANYMAMBA_INLINE static Loaded weights(const Weight* p, int count) { return load_some<vfloat>(p, count); }
    ANYMAMBA_INLINE static Loaded activations(const Activation* p) { return load<float>(p); }
    ANYMAMBA_INLINE static vfloat multiply_add(vfloat sum, Loaded w, Loaded x) { return w * x + sum; }
    ANYMAMBA_INLINE static vfloat multiply_add_words(vfloat sum, vint w, vint x) { return (vfloat)w * (vfloat)x + sum; }
};

struct Float16 : Float32 {
    using Weight = uint16_t;
    ANYMAMBA_INLINE static Loaded weights(const Weight* p) { return from_float16(load_some<vhalf>(p, COLUMNS)); }
    ANYMAMBA_INLINE static Loaded weights(const Weight* p, int count) {
        return from_float16(load_some<vhalf>(p, count));
    }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
    using Weight = uint16_t;
    using Activation = uint16_t;
    using Loaded = vint;
    static constexpr int COLUMNS = 2 * LANES<float>;
    ANYMAMBA_INLINE static Loaded weights(const Weight* p) { return load_some<vint>(p, COLUMNS); }
    ANYMAMBA_INLINE static Loaded weights(const Weight* p, int count) { return load_some<vint>(p, count); }
    ANYMAMBA_INLINE static Loaded activations(const Activation* p) { return weights(p); }
    ANYMAMBA_INLINE static vfloat multiply_add(vfloat sum, Loaded w, Loaded x) {
        return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
    }
    ANYMAMBA_INLINE static vfloat multiply_add_words(vfloat sum, vint w, vint x) { return multiply_add(sum, w, x); }
};
#else
struct BFloat16 {  // even and odd columns apart: each is a float32 after one operation
    using Weight = uint16_t;
    using Activation = uint16_t;
    struct Loaded {
        vfloat even, odd;
    };
    static constexpr int COLUMNS = 2 * LANES<float>;
    ANYMAMBA_INLINE static Loaded split(vint pairs) { return {(vfloat)(pairs << 16), (vfloat)(pairs & -65536)}; }
    ANYMAMBA_INLINE static Loaded weights(const Weight* p) { return split(load_some<vint>(p, COLUMNS)); }
    ANYMAMBA_INLINE static Loaded weights(const Weight* p, int count) { return split(load_some<vint>(p, count)); }
    ANYMAMBA_INLINE static Loaded activations(const Activation* p) { return weights(p); }
    ANYMAMBA_INLINE static vfloat multiply_add(vfloat sum, Loaded w, Loaded x) {
        return w.odd * x.odd + (w.even * x.even + sum);
    }
    ANYMAMBA_INLINE static vfloat multiply_add_words(vfloat sum, vint w, vint x) {
        return multiply_add(sum, split(w), split(x));
    }
};
#endif

// The sum of the lanes, by halving.
ANYMAMBA_INLINE float sum_lanes(vfloat v) {
    float lanes[LANES<float>];
    store(lanes, v);
    return sum_of_lanes<float, LANES<float>>(lanes);
}

// The same for four vectors; each sum has the same order.
ANYMAMBA_INLINE void sum_four(const vfloat* v, float* to) {
#if defined(__AVX512F__)
    const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    constexpr __mmask16 ALL = 0xffff;
    const __m512 ab = _mm512_maskz_shuffle_f32x4(ALL, a, b, 0x44) + _mm512_maskz_shuffle_f32x4(ALL, a, b, 0xee);
    const __m512 cd = _mm512_maskz_shuffle_f32x4(ALL, c, d, 0x44) + _mm512_maskz_shuffle_f32x4(ALL, c, d, 0xee);
    __m512 s = _mm512_maskz_shuffle_f32x4(ALL, ab, cd, 0x88) + _mm512_maskz_shuffle_f32x4(ALL, ab, cd, 0xdd);
    s += _mm512_maskz_permute_ps(ALL, s, 0x4e);  // a quarter for each vector: lanes 0 and 2, 1 and 3
    s += _mm512_maskz_permute_ps(ALL, s, 0xb1);
    const __m512 first = _mm512_maskz_compress_ps(0x1111, s);
    _mm_storeu_ps(to, _mm512_castps512_ps128(first));
#else
    for (int i = 0; i < 4; i++) to[i] = sum_lanes(v[i]);
#endif
}

// A range of weights and packed activations.
template <typename F>
struct FloatProduct {
    const typename F::Weight* w;
    int64_t w_stride;
    const typename F::Activation* x;
    int64_t x_stride, n_in, n_out;
    float* y;
    int64_t y_stride, distance;  // of prefetches, in bytes, at least

    // y of rows [r, r + R) and outputs [o, o + O). The weights `ahead` bytes further are prefetched.
    template <int O, int R>
    ANYMAMBA_INLINE void tile(int64_t o, int64_t r, int64_t ahead) const {
        const typename F::Weight* from = w + o * w_stride;
        const typename F::Activation* rows = x + r * x_stride;
        vfloat sums[R][O] = {};
        int64_t i = 0;
        for (; i + F::COLUMNS <= n_in; i += F::COLUMNS) {
            typename F::Loaded weights[O];
#pragma GCC unroll 8
            for (int a = 0; a < O; a++) {
                const auto* p = from + a * w_stride + i;
                weights[a] = F::weights(p);
                if (R > 1 && ahead) __builtin_prefetch(reinterpret_cast<const char*>(p) + ahead, 0, 3);
            }
#pragma GCC unroll 8
            for (int b = 0; b < R; b++) {
                const auto activations = F::activations(rows + b * x_stride + i);
#pragma GCC unroll 8
                for (int a = 0; a < O; a++) sums[b][a] = F::multiply_add(sums[b][a], weights[a], activations);
            }
        }
        if (i < n_in)
#pragma GCC unroll 8
            for (int a = 0; a < O; a++) {
                const auto last = F::weights(from + a * w_stride + i, int(n_in - i));
#pragma GCC unroll 8
                for (int b = 0; b < R; b++)
                    sums[b][a] = F::multiply_add(sums[b][a], last, F::activations(rows + b * x_stride + i));
            }
#pragma GCC unroll 8
        for (int b = 0; b < R; b++) {
            float* to = y + (r + b) * y_stride + o;
#pragma GCC unroll 8
            for (int a = 0; a < O / 4 * 4; a += 4) sum_four(&sums[b][a], to + a);
#pragma GCC unroll 4
            for (int a = O / 4 * 4; a < O; a++) to[a] = sum_lanes(sums[b][a]);
        }
    }

    static constexpr bool WIDE = ANYMAMBA_VECTOR_BYTES == 64;  // and twice as many registers
    static constexpr int OUTPUTS = 4, MOST_ROWS = WIDE ? 6 : 3;

    // O outputs of all rows [r, end). The first tile prefetches, the others find their weights in the cache.
    template <int O>
    void rows(int64_t o, int64_t r, int64_t end, int64_t ahead) const {
        for (int64_t n; (n = end - r) > 0; ahead = 0) {
            const int64_t some = WIDE && (n == 7 || n == 8) ? 4 : std::min<int64_t>(n, MOST_ROWS);
            if (some == 1) tile<O, 1>(o, r, ahead);
            if (some == 2) tile<O, 2>(o, r, ahead);
            if (some == 3) tile<O, 3>(o, r, ahead);
            if constexpr (WIDE) {
                if (some == 4) tile<O, 4>(o, r, ahead);
                if (some == 5) tile<O, 5>(o, r, ahead);
                if (some == 6) tile<O, 6>(o, r, ahead);
            }
            r += some;
        }
    }

    // Outputs [o, end), O at once while so many are left. Returns the first that is left.
    template <int O, int R>
    int64_t some_outputs(int64_t o, int64_t end, int64_t first_row, int64_t last_row) const {
        const int64_t bytes = w_stride * int64_t(sizeof *w), later = (1 + distance / (O * bytes)) * O;
        for (; o + O <= end; o += O) {
            const int64_t ahead = o + later + O <= n_out ? later * bytes : 0;
            if constexpr (R != 0)
                tile<O, R>(o, first_row, ahead);
            else
                rows<O>(o, first_row, last_row, ahead);
        }
        return o;
    }

    void outputs(int64_t o, int64_t end, int64_t first_row, int64_t last_row) const {
        const int64_t n = last_row - first_row;
        if (n == 1) o = some_outputs<8, 1>(o, end, first_row, last_row);
        o = some_outputs<OUTPUTS, 0>(o, end, first_row, last_row);
        some_outputs<1, 0>(o, end, first_row, last_row);
    }
};

// Rows of activations stay in the first-level cache while all outputs are computed, weights in the second-level cache
// while all rows are.
template <typename F>
void float_product(const Packed& w, const void* activations, int64_t rows, float* y, int64_t y_stride, int64_t begin,
                   int64_t end) {
    using Weight = typename F::Weight;
    using Activation = typename F::Activation;
    const int64_t x_stride = activation_row_bytes(w.type(), w.n_in) / int64_t(sizeof(Activation));
    constexpr int64_t L2 = 1 << 18, L1 = 3 << 13, M = FloatProduct<F>::MOST_ROWS, O = FloatProduct<F>::OUTPUTS;
    const FloatProduct<F> p{static_cast<const Weight*>(w.data),
                            w.row_bytes / int64_t(sizeof(Weight)),
                            static_cast<const Activation*>(activations),
                            x_stride,
                            w.n_in,
                            w.n_out,
                            y,
                            y_stride,
                            rows <= 2 * M ? PREFETCH_DISTANCE : 0};
    if (rows <= 2 * M) return p.outputs(begin, end, 0, rows);
    const int64_t some_rows = std::max<int64_t>(1, L1 / (x_stride * int64_t(sizeof(Activation)) * M)) * M;
    const int64_t some_outputs = std::max<int64_t>(1, L2 / (w.row_bytes * O)) * O;
    for (int64_t o = begin; o < end; o += some_outputs)
        for (int64_t r = 0; r < rows; r += some_rows)
            p.outputs(o, std::min(end, o + some_outputs), r, std::min(rows, r + some_rows));
}

}  // namespace anymamba::ANYMAMBA_ISA
