// Products of weights in blocks: whole numbers are multiplied exactly, so that a sum has one order, that of the blocks:
// y += scale of the weights * scale of the activations * sum of the 32 products.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>

#include "products_by_panel.h"

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

// Adds n stored blocks of one row, without keeping them. The order of the sum is that of `add_group`.
template <Format F>
ANYMAMBA_INLINE vfloat add_blocks_to_one_row(vfloat y, const PanelRows& rows, int n, const ActivationBlock* x,
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

// A group of 32 columns: adds to y[p][r]. x(r) is a row's block; q(p, j), scale(p, part) and minimum(p) are of panel p.
// A word of the activations is read once for all panels.
template <Format F, int P, int R, typename X, typename Q, typename Scale, typename Minimum>
ANYMAMBA_INLINE void add_group(vfloat (&y)[P][R], X x, Q q, Scale scale, Minimum minimum) {
    using L = Layout<F>;
    constexpr int PARTS = L::HALVES ? 2 : 1, VECTORS = 8 / PARTS;
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; part++) {
        vint sum[P][R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const ActivationBlock& a = x(r);
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
            for (int p = 0; p < P; p++) w[p] = q(p, j);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const vint word = broadcast_int(x(r).q + 4 * j);
#pragma GCC unroll 2
                for (int p = 0; p < P; p++) sum[p][r] = dot4<L::SIGNED>(sum[p][r], w[p], word);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int p = 0; p < P; p++)
                y[p][r] = multiply_add(to_float(sum[p][r]), scale(p, part) * x(r).scale, y[p][r]);
    }
    if (L::MINIMA)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int p = 0; p < P; p++) y[p][r] = multiply_add(-minimum(p), broadcast(x(r).scaled_sum), y[p][r]);
}

// Blocks as `PanelProduct` needs them. `x` are the activations of the first row, x_stride blocks for each.
template <Format F>
struct BlockPanels {
    using Panel = anymamba::ANYMAMBA_ISA::Panel;
    using L = Layout<F>;
    static constexpr int MOST_PANELS = WIDE ? 2 : 1, FEW_ROWS = WIDE ? 8 : 4;
    static constexpr int DIRECT_ROWS = WIDE && L::BLOCKS == 1 ? 8 : 1;
    static constexpr int STORED = PANEL_BLOCKS / L::BLOCKS, CHUNK_BYTES = STORED * L::BYTES;
    static constexpr int most_rows(int n_panels) { return n_panels == 2 ? 6 : FEW_ROWS; }

    const ActivationBlock* x;
    int64_t x_stride, n_stored;

    const char* row(int64_t r) const { return reinterpret_cast<const char*>(x + r * x_stride); }
    int64_t n_chunks() const { return (n_stored + STORED - 1) / STORED; }
    int stored(int64_t chunk) const { return int(std::min<int64_t>(STORED, n_stored - chunk * STORED)); }

    void unpack(const PanelRows& rows, int64_t chunk, const uint8_t* next, Panel& panel) const {
        const auto keep = [&](int b, const vint* q, const vfloat* scale, vfloat minimum) ANYMAMBA_INLINE_LAMBDA {
            for (int j = 0; j < 8; j++) panel.q[b][j] = q[j];
            panel.scale[b][0] = scale[0];
            if (L::HALVES) panel.scale[b][1] = scale[1];
            if (L::MINIMA) panel.minimum[b] = minimum;
        };
        anymamba::ANYMAMBA_ISA::unpack<F>(rows, stored(chunk), next, keep, [](int) {});
    }

    template <int P, int R>
    ANYMAMBA_INLINE void add(const Panel* panels, const PanelChunk& c) const {
        const ActivationBlock* const blocks = x + c.row * x_stride + c.chunk * PANEL_BLOCKS;
        add_to_sums<P, R>(c, [&](vfloat(&y)[P][R]) ANYMAMBA_INLINE_LAMBDA {
            for (int b = 0; b < stored(c.chunk) * L::BLOCKS; b++)
                add_group<F>(
                    y, [&](int r) ANYMAMBA_INLINE_LAMBDA -> const ActivationBlock& { return blocks[r * x_stride + b]; },
                    [&](int p, int j) ANYMAMBA_INLINE_LAMBDA { return panels[p].q[b][j]; },
                    [&](int p, int part) ANYMAMBA_INLINE_LAMBDA { return panels[p].scale[b][part]; },
                    [&](int p) ANYMAMBA_INLINE_LAMBDA { return panels[p].minimum[b]; });
        });
    }

    template <int R>
    ANYMAMBA_INLINE void add_directly(const PanelRows& rows, int64_t chunk, const uint8_t* next,
                                      const char* const (&x)[R], vfloat (&y)[1][R]) const {
        const auto block = [&](int r, int b) ANYMAMBA_INLINE_LAMBDA -> const ActivationBlock& {
            return reinterpret_cast<const ActivationBlock*>(x[r])[chunk * PANEL_BLOCKS + b];
        };
        if constexpr (R == 1) {
            y[0][0] = add_blocks_to_one_row<F>(y[0][0], rows, stored(chunk), &block(0, 0), next);
        } else {
            const auto add = [&](int b, const vint* q, const vfloat* scale, vfloat minimum) ANYMAMBA_INLINE_LAMBDA {
                add_group<F>(
                    y, [&](int r) ANYMAMBA_INLINE_LAMBDA -> const ActivationBlock& { return block(r, b); },
                    [&](int, int j) ANYMAMBA_INLINE_LAMBDA { return q[j]; },
                    [&](int, int part) ANYMAMBA_INLINE_LAMBDA { return scale[part]; },
                    [&](int) ANYMAMBA_INLINE_LAMBDA { return minimum; });
            };
            anymamba::ANYMAMBA_ISA::unpack<F>(rows, stored(chunk), next, add, [](int) {});
        }
    }
};

template <Format F>
void block_product(const Packed& w, const void* activations, int64_t rows, float* y, int64_t y_stride, int64_t begin,
                   int64_t end) {
    const int64_t x_stride = w.n_in / 32, n_stored = x_stride / Layout<F>::BLOCKS;
    const auto* x = static_cast<const ActivationBlock*>(activations);
    const auto kind_at = [&](int64_t r) { return BlockPanels<F>{x + r * x_stride, x_stride, n_stored}; };
    with_whole_panel(w, n_stored * Layout<F>::BYTES,
                     [&](const Packed& whole) { multiply_by_panels(whole, kind_at, rows, y, y_stride, begin, end); });
}

}  // namespace anymamba::ANYMAMBA_ISA
