// Products of weights in blocks: whole numbers are multiplied exactly, so that a sum has one order, that of the blocks:
// y += scale of the weights * scale of the activations * sum of the 32 products.
#pragma once

#include <algorithm>
#include <vector>

#include "products_panel.h"

namespace anymamba::ANYMAMBA_ISA {

// In each lane: sum + the four products of bytes of w and x. Unless SIGNED, w is unsigned.
template <bool SIGNED>
ANYMAMBA_INLINE vint dot4(vint sum, vint w, vint x) {
#if defined(__AVX512VNNI__)
    static_assert(!SIGNED);
    return (vint)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVX512F__)
    __m512i unsigned_w = (__m512i)w, signed_x = (__m512i)x;
    if (SIGNED) {
        const __mmask64 negative = _mm512_movepi8_mask(unsigned_w);
        signed_x = _mm512_mask_sub_epi8(signed_x, negative, _mm512_setzero_si512(), signed_x);
        unsigned_w = _mm512_abs_epi8(unsigned_w);
    }
    const __m512i pairs = _mm512_maddubs_epi16(unsigned_w, signed_x);
    return sum + (vint)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    __m256i unsigned_w = (__m256i)w, signed_x = (__m256i)x;
    if (SIGNED) signed_x = _mm256_sign_epi8(signed_x, unsigned_w), unsigned_w = _mm256_abs_epi8(unsigned_w);
    return sum + (vint)_mm256_madd_epi16(_mm256_maddubs_epi16(unsigned_w, signed_x), _mm256_set1_epi16(1));
#elif defined(__SSSE3__)
    __m128i unsigned_w = (__m128i)w, signed_x = (__m128i)x;
    if (SIGNED) signed_x = _mm_sign_epi8(signed_x, unsigned_w), unsigned_w = _mm_abs_epi8(unsigned_w);
    return sum + (vint)_mm_madd_epi16(_mm_maddubs_epi16(unsigned_w, signed_x), _mm_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
    return (vint)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x);
#else
    for (int shift = 0; shift < 32; shift += 8) sum += ((w << (24 - shift)) >> 24) * ((x << (24 - shift)) >> 24);
    return sum;
#endif
}

ANYMAMBA_INLINE vint broadcast_int(const void* p) {
    int32_t value;
    std::memcpy(&value, p, 4);
#if defined(__AVX512F__)
    return (vint)_mm512_set1_epi32(value);
#else
    return value - vint{};
#endif
}

// Adds n_blocks of a panel to the sums of R rows. `x` are the rows' blocks, x_stride blocks apart.
template <Format F, int R>
ANYMAMBA_INLINE void add_blocks(const Panel& panel, int n_blocks, const ActivationBlock* x, int64_t x_stride,
                                vfloat* sums) {
    using L = Layout<F>;
    vfloat y[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) y[r] = sums[r];
    for (int b = 0; b < n_blocks; b++) {
        constexpr int PARTS = L::HALVES ? 2 : 1, VECTORS = 8 / PARTS;
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++) {
            vint sum[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const ActivationBlock& a = x[r * x_stride + b];
                if (L::ZERO == 8) sum[r] = broadcast_int(&a.minus_8);
                if (L::ZERO == 32) sum[r] = broadcast_int(&a.minus_32[part]);
                if (L::ZERO == 128) sum[r] = broadcast_int(&a.minus_128);
                if (L::ZERO == 0) sum[r] = vint{};
            }
#pragma GCC unroll 8
            for (int j = part * VECTORS; j < (part + 1) * VECTORS; j++) {
                const vint w = panel.q[b][j];
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
                    sum[r] = dot4<L::SIGNED>(sum[r], w, broadcast_int(x[r * x_stride + b].q + 4 * j));
            }
            const vfloat scale = panel.scale[b][part];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) y[r] = to_float(sum[r]) * (scale * x[r * x_stride + b].scale) + y[r];
        }
        if (L::MINIMA)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) y[r] = y[r] - panel.minimum[b] * x[r * x_stride + b].scaled_sum;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[r] = y[r];
}

constexpr int ROWS_AT_ONCE = LANES<float> == 16 ? 8 : 4;

template <Format F>
void add_blocks(const Panel& panel, int n_blocks, const ActivationBlock* x, int64_t x_stride, int64_t rows,
                vfloat* sums) {
    int64_t r = 0;
    for (; r + ROWS_AT_ONCE <= rows; r += ROWS_AT_ONCE)
        add_blocks<F, ROWS_AT_ONCE>(panel, n_blocks, x + r * x_stride, x_stride, sums + r);
    if (ROWS_AT_ONCE > 4 && r + 4 <= rows) add_blocks<F, 4>(panel, n_blocks, x + r * x_stride, x_stride, sums + r), r += 4;
    if (r + 2 <= rows) add_blocks<F, 2>(panel, n_blocks, x + r * x_stride, x_stride, sums + r), r += 2;
    if (r < rows) add_blocks<F, 1>(panel, n_blocks, x + r * x_stride, x_stride, sums + r);
}

constexpr int64_t MOST_ROWS = 256;  // whose sums are kept at once

// y of at most MOST_ROWS rows. Panels at the end overlap: a lane is stored once. The matrix has at least OUTPUTS rows.
template <Format F>
void some_rows(const Packed& w, const ActivationBlock* x, int64_t rows, float* y, int64_t y_stride, int64_t begin,
               int64_t end) {
    using L = Layout<F>;
    const auto* data = static_cast<const uint8_t*>(w.data);
    const int64_t n_stored = w.n_in / 32 / L::BLOCKS, x_stride = n_stored * L::BLOCKS;
    constexpr int STORED = PANEL_BLOCKS / L::BLOCKS;
    Panel panel;
    vfloat sums[MOST_ROWS];
    for (int64_t o = begin; o < end; o += OUTPUTS) {
        const int64_t first = std::min(o, w.n_out - OUTPUTS);
        const uint8_t* from = data + first * w.row_bytes;
        const uint8_t* next = o + 2 * OUTPUTS <= end ? from + OUTPUTS * w.row_bytes : nullptr;
        std::fill_n(sums, rows, vfloat{});
        for (int64_t s = 0; s < n_stored; s += STORED) {
            const int n = int(std::min<int64_t>(STORED, n_stored - s));
            for (int i = 0; i < n; i++) {
                if (next) prefetch(next + (s + i) * L::BYTES * OUTPUTS, L::BYTES * OUTPUTS);
                unpack<F>(from + (s + i) * L::BYTES, w.row_bytes, panel, i * L::BLOCKS);
            }
            add_blocks<F>(panel, n * L::BLOCKS, x + s * L::BLOCKS, x_stride, rows, sums);
        }
        const int64_t count = std::min<int64_t>(OUTPUTS, end - o);
        for (int64_t r = 0; r < rows; r++)
            std::memcpy(y + r * y_stride + o, reinterpret_cast<const float*>(&sums[r]) + (o - first),
                        count * sizeof(float));
    }
}

template <Format F>
void block_product(const Packed& w, const void* activations, int64_t rows, float* y, int64_t y_stride, int64_t begin,
                   int64_t end) {
    Packed whole = w;
    std::vector<uint8_t> copy;
    if (w.n_out < OUTPUTS) {  // too few rows for a panel: more rows, of which nothing is stored
        copy.resize(OUTPUTS * w.row_bytes);
        std::memcpy(copy.data(), w.data, w.n_out * w.row_bytes);
        whole.data = copy.data(), whole.n_out = OUTPUTS;
    }
    const int64_t x_stride = w.n_in / 32;
    const auto* x = static_cast<const ActivationBlock*>(activations);
    for (int64_t r = 0; r < rows; r += MOST_ROWS)
        some_rows<F>(whole, x + r * x_stride, std::min(MOST_ROWS, rows - r), y + r * y_stride, y_stride, begin, end);
}

}  // namespace anymamba::ANYMAMBA_ISA
