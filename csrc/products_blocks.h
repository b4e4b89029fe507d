// Products of weights in blocks: whole numbers are multiplied exactly, so that a sum has one order, that of the blocks:
// y += scale of the weights * scale of the activations * sum of the 32 products.
#pragma once

#include <algorithm>
#include <cstddef>
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

// a b + c, rounded once where the instruction set can, wherever the compiler would contract or not.
ANYMAMBA_INLINE vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
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

// The 32-bit word j of a block of activations in every lane. One row alone takes all words from one load.
ANYMAMBA_INLINE vint broadcast_word(vint words, const ActivationBlock& block, int j) {
#if defined(__AVX512F__)
    (void)block;
    return (vint)_mm512_maskz_permutexvar_epi32(0xffff, _mm512_set1_epi32(j), (__m512i)words);
#else
    (void)words;
    return broadcast_int(reinterpret_cast<const char*>(&block) + 4 * j);
#endif
}

// Adds n stored blocks of one row, without keeping them. The order of the sum is that of `add_blocks`.
template <Format F>
ANYMAMBA_INLINE vfloat add_to_one_row(vfloat y, const PanelRows& rows, int n, const ActivationBlock* x,
                                      const uint8_t* next) {
    using L = Layout<F>;
    constexpr int SCALE = 8, MINUS_8 = 10, MINUS_128 = 11, MINUS_32 = 12;  // words of a block
    static_assert(offsetof(ActivationBlock, scale) == 4 * SCALE && offsetof(ActivationBlock, minus_32) == 4 * MINUS_32);
    constexpr int FIRST = L::ZERO == 8 ? MINUS_8 : L::ZERO == 128 ? MINUS_128 : MINUS_32;
    vfloat sums[L::BLOCKS][2], scales[L::BLOCKS][2], minima[L::BLOCKS];
    const auto multiply = [&](int b, const vint* q, const vfloat* scale, vfloat minimum) ANYMAMBA_INLINE_LAMBDA {
        const ActivationBlock& block = x[b];
        const vint words = load_some<vint>(reinterpret_cast<const int32_t*>(&block), LANES<float>);
        vint first = L::ZERO ? broadcast_word(words, block, FIRST) : vint{};
        vint last = L::HALVES ? broadcast_word(words, block, MINUS_32 + 1) : vint{};
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            first = dot4<L::SIGNED>(first, q[j], broadcast_word(words, block, j));
            last = dot4<L::SIGNED>(last, q[4 + j], broadcast_word(words, block, 4 + j));
        }
        const vfloat x_scale = (vfloat)broadcast_word(words, block, SCALE);
        const int i = b % L::BLOCKS;
        sums[i][0] = to_float(L::HALVES ? first : first + last), scales[i][0] = scale[0] * x_scale;
        if (L::HALVES) sums[i][1] = to_float(last), scales[i][1] = scale[1] * x_scale;
        if (L::MINIMA) minima[i] = minimum;
    };
    const auto add = [&](int stored) ANYMAMBA_INLINE_LAMBDA {
#pragma GCC unroll 8
        for (int i = 0; i < L::BLOCKS; i++) {
            y = multiply_add(sums[i][0], scales[i][0], y);
            if (L::HALVES) y = multiply_add(sums[i][1], scales[i][1], y);
            if (L::MINIMA) y = multiply_add(-minima[i], broadcast(x[stored * L::BLOCKS + i].scaled_sum), y);
        }
    };
    unpack<F>(rows, n, next, multiply, add);
    return y;
}

constexpr int64_t MOST_ROWS = 256;            // whose sums are kept at once
constexpr bool WIDE = LANES<float> == 16;     // and twice as many registers
constexpr int MOST_PANELS = WIDE ? 2 : 1;     // multiplied at once
constexpr int ROWS_AT_ONCE = WIDE ? 8 : 4;    // with one panel
constexpr int ROWS_WITH_TWO = 6;

// Adds n_blocks of P panels to their sums of R rows. `x` are the rows' blocks, x_stride blocks apart. A word of the
// activations is read once for all panels.
template <Format F, int P, int R>
ANYMAMBA_INLINE void add_blocks(const Panel* panels, int n_blocks, const ActivationBlock* x, int64_t x_stride,
                                vfloat (*sums)[MOST_ROWS]) {
    using L = Layout<F>;
    constexpr int PARTS = L::HALVES ? 2 : 1, VECTORS = 8 / PARTS;
    vfloat y[P][R];
#pragma GCC unroll 2
    for (int p = 0; p < P; p++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) y[p][r] = sums[p][r];
    for (int b = 0; b < n_blocks; b++) {
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++) {
            vint sum[P][R];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const ActivationBlock& a = x[r * x_stride + b];
                vint first{};
                if (L::ZERO == 8) first = broadcast_int(&a.minus_8);
                if (L::ZERO == 32) first = broadcast_int(&a.minus_32[part]);
                if (L::ZERO == 128) first = broadcast_int(&a.minus_128);
#pragma GCC unroll 2
                for (int p = 0; p < P; p++) sum[p][r] = first;
            }
#pragma GCC unroll 8
            for (int j = part * VECTORS; j < (part + 1) * VECTORS; j++) {
                vint w[P];
#pragma GCC unroll 2
                for (int p = 0; p < P; p++) w[p] = panels[p].q[b][j];
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    const vint word = broadcast_int(x[r * x_stride + b].q + 4 * j);
#pragma GCC unroll 2
                    for (int p = 0; p < P; p++) sum[p][r] = dot4<L::SIGNED>(sum[p][r], w[p], word);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 2
                for (int p = 0; p < P; p++) {
                    const vfloat scale = panels[p].scale[b][part] * x[r * x_stride + b].scale;
                    y[p][r] = multiply_add(to_float(sum[p][r]), scale, y[p][r]);
                }
        }
        if (L::MINIMA)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 2
                for (int p = 0; p < P; p++)
                    y[p][r] = multiply_add(-panels[p].minimum[b], broadcast(x[r * x_stride + b].scaled_sum), y[p][r]);
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; p++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) sums[p][r] = y[p][r];
}

template <Format F, int P>
void add_blocks(const Panel* panels, int n_blocks, const ActivationBlock* x, int64_t x_stride, int64_t rows,
                vfloat (*sums)[MOST_ROWS]) {
    constexpr int MOST = P == 1 ? ROWS_AT_ONCE : ROWS_WITH_TWO;
    const auto at = [&](int64_t r) { return reinterpret_cast<vfloat(*)[MOST_ROWS]>(&sums[0][r]); };
    int64_t r = 0;
    for (; r + MOST <= rows; r += MOST) add_blocks<F, P, MOST>(panels, n_blocks, x + r * x_stride, x_stride, at(r));
    if (MOST > 4 && r + 4 <= rows) add_blocks<F, P, 4>(panels, n_blocks, x + r * x_stride, x_stride, at(r)), r += 4;
    if (r + 2 <= rows) add_blocks<F, P, 2>(panels, n_blocks, x + r * x_stride, x_stride, at(r)), r += 2;
    if (r < rows) add_blocks<F, P, 1>(panels, n_blocks, x + r * x_stride, x_stride, at(r));
}

// Products of at most MOST_ROWS rows. The matrix has at least OUTPUTS rows.
template <Format F>
class BlockProduct {
  public:
    BlockProduct(const Packed& w, const ActivationBlock* x, int64_t rows, float* y, int64_t y_stride)
        : w(w), x(x), rows(rows), y(y), y_stride(y_stride), n_stored(w.n_in / 32 / L::BLOCKS),
          x_stride(w.n_in / 32), panels_ahead(1 + PREFETCH_DISTANCE / (OUTPUTS * w.row_bytes)) {}

    void outputs(int64_t o, int64_t end) {
        if constexpr (MOST_PANELS == 2)
            for (; rows > ROWS_AT_ONCE && o + 2 * OUTPUTS <= end; o += 2 * OUTPUTS) some_outputs<2>(o, end);
        for (; o < end; o += OUTPUTS) some_outputs<1>(o, end);
    }

  private:
    using L = Layout<F>;
    static constexpr int STORED = PANEL_BLOCKS / L::BLOCKS;
    const Packed& w;
    const ActivationBlock* const x;
    const int64_t rows;
    float* const y;
    const int64_t y_stride, n_stored, x_stride, panels_ahead;
    Panel panels[MOST_PANELS];
    vfloat sums[MOST_PANELS][MOST_ROWS];

    // Panels at the end overlap: a lane is stored once.
    int64_t first_output(int64_t o) const { return std::min(o, w.n_out - OUTPUTS); }

    const uint8_t* data(int64_t o, int64_t stored) const {
        return static_cast<const uint8_t*>(w.data) + o * w.row_bytes + stored * L::BYTES;
    }

    // Where memory is prefetched while a block is read. It may be beyond the caller's outputs: some thread takes those
    // after them next.
    const uint8_t* ahead(int64_t o, int64_t stored) const {
        const int64_t later = first_output(o) + OUTPUTS * panels_ahead;
        return later + OUTPUTS <= w.n_out ? data(later, 0) + stored * L::BYTES * OUTPUTS : nullptr;
    }

    template <int P>
    void some_outputs(int64_t o, int64_t end) {
        for (int p = 0; p < P; p++) std::fill_n(sums[p], rows, vfloat{});
        for (int64_t s = 0; s < n_stored; s += STORED) {
            const int n = int(std::min<int64_t>(STORED, n_stored - s));
            const ActivationBlock* const blocks = x + s * L::BLOCKS;
            if (P == 1 && rows == 1) {
                const PanelRows from(data(first_output(o), s), w.row_bytes);
                sums[0][0] = add_to_one_row<F>(sums[0][0], from, n, blocks, ahead(o, s));
                continue;
            }
            for (int p = 0; p < P; p++) unpack_panel(o + p * OUTPUTS, s, n, panels[p]);
            add_blocks<F, P>(panels, n * L::BLOCKS, blocks, x_stride, rows, sums);
        }
        for (int p = 0; p < P; p++) store_sums(o + p * OUTPUTS, end, sums[p]);
    }

    void unpack_panel(int64_t o, int64_t stored, int n, Panel& panel) const {
        const auto keep = [&](int b, const vint* q, const vfloat* scale, vfloat minimum) ANYMAMBA_INLINE_LAMBDA {
            for (int j = 0; j < 8; j++) panel.q[b][j] = q[j];
            panel.scale[b][0] = scale[0];
            if (L::HALVES) panel.scale[b][1] = scale[1];
            if (L::MINIMA) panel.minimum[b] = minimum;
        };
        unpack<F>(PanelRows(data(first_output(o), stored), w.row_bytes), n, ahead(o, stored), keep, [](int) {});
    }

    void store_sums(int64_t o, int64_t end, const vfloat* of_rows) const {
        const int64_t skipped = o - first_output(o), count = std::min<int64_t>(OUTPUTS, end - o);
        for (int64_t r = 0; r < rows; r++)
            std::memcpy(y + r * y_stride + o, reinterpret_cast<const float*>(&of_rows[r]) + skipped,
                        count * sizeof(float));
    }
};

template <Format F>
void block_product(const Packed& w, const void* activations, int64_t rows, float* y, int64_t y_stride, int64_t begin,
                   int64_t end) {
    Packed whole = w;
    std::vector<uint8_t> copy;
    if (w.n_out < OUTPUTS) {  // too few rows for a panel: more rows, of which nothing is stored
        copy.resize(OUTPUTS * w.row_bytes);
        const int64_t last_row = w.n_in / 32 / Layout<F>::BLOCKS * Layout<F>::BYTES;
        std::memcpy(copy.data(), w.data, (w.n_out - 1) * w.row_bytes + last_row);
        whole.data = copy.data(), whole.n_out = OUTPUTS;
    }
    const int64_t x_stride = w.n_in / 32;
    const auto* x = static_cast<const ActivationBlock*>(activations);
    for (int64_t r = 0; r < rows; r += MOST_ROWS)
        BlockProduct<F>(whole, x + r * x_stride, std::min(MOST_ROWS, rows - r), y + r * y_stride, y_stride)
            .outputs(begin, end);
}

}  // namespace anymamba::ANYMAMBA_ISA
