// Block formats: weights of a panel of outputs, one output per lane, unpacked to bytes.
//
// The whole numbers of a block of 32 columns are eight vectors, each with four columns of every output. Formats differ
// in how blocks are unpacked; `Layout` says what multiplying needs to know.
#pragma once

#include "packed.h"
#include "simd.h"

namespace anymamba::ANYMAMBA_ISA {

#define ANYMAMBA_INLINE_LAMBDA __attribute__((always_inline))

constexpr int OUTPUTS = LANES<float>;  // of a panel
constexpr int PANEL_BLOCKS = 16;       // of 32 columns: two blocks of a K-quant

constexpr int64_t PREFETCH_DISTANCE = 1 << 14;  // bytes, at least; a third of the first-level cache

struct Panel {
    vint q[PANEL_BLOCKS][8];
    vfloat scale[PANEL_BLOCKS][2];  // of the first 16 columns and the last 16, if a format has two, else one for all
    vfloat minimum[PANEL_BLOCKS];   // is subtracted, in the K-quants that have one
};

// How whole numbers are multiplied. Unsigned ones are below 128 or the instruction set multiplies any.
#if defined(__AVX512VNNI__)
constexpr bool SIGNED_BYTES = false;  // q8_0 is stored plus 128
#else
constexpr bool SIGNED_BYTES = true;
#endif

template <Format F>
struct Layout;
template <>
struct Layout<Format::q8_0> {
    static constexpr int BYTES = 34, BLOCKS = 1, ZERO = SIGNED_BYTES ? 0 : 128;
    static constexpr bool SIGNED = SIGNED_BYTES, HALVES = false, MINIMA = false;
};
template <>
struct Layout<Format::q4_0> {
    static constexpr int BYTES = 18, BLOCKS = 1, ZERO = 8;
    static constexpr bool SIGNED = false, HALVES = false, MINIMA = false;
};
template <>
struct Layout<Format::q4_k> {
    static constexpr int BYTES = 144, BLOCKS = 8, ZERO = 0;
    static constexpr bool SIGNED = false, HALVES = false, MINIMA = true;
};
template <>
struct Layout<Format::q5_k> {
    static constexpr int BYTES = 176, BLOCKS = 8, ZERO = 0;
    static constexpr bool SIGNED = false, HALVES = false, MINIMA = true;
};
template <>
struct Layout<Format::q6_k> {
    static constexpr int BYTES = 210, BLOCKS = 8, ZERO = 32;
    static constexpr bool SIGNED = false, HALVES = true, MINIMA = false;
};

// ------------------------------------------------------------------------------------------ from rows to lanes

// The rows of a panel. Four pointers and multiples of the stride are operands of a load, so no addresses are computed.
struct PanelRows {
    const uint8_t* quads[OUTPUTS / 4];
    int64_t stride, three;
    PanelRows(const uint8_t* p, int64_t stride) : stride(stride), three(3 * stride) {
        for (int i = 0; i < OUTPUTS / 4; i++) quads[i] = p + 4 * i * stride;
    }
    ANYMAMBA_INLINE const uint8_t* row(int i) const {
        const uint8_t* p = quads[i / 4];
        return i % 4 == 0 ? p : i % 4 == 1 ? p + stride : i % 4 == 2 ? p + 2 * stride : p + three;
    }
    ANYMAMBA_INLINE void advance(int64_t bytes) {
        for (int i = 0; i < OUTPUTS / 4; i++) quads[i] += bytes;
    }
};

#if defined(__AVX2__)
ANYMAMBA_INLINE __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// 16 bytes each of row i and row i + 4.
ANYMAMBA_INLINE __m256i load_two(const PanelRows& rows, int64_t offset, int i) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(rows.row(i) + offset)),
                                   load16(rows.row(i + 4) + offset), 1);
}
#endif

#if defined(__AVX512F__)
// 16 bytes each of rows i, i + 4, i + 8 and i + 12.
ANYMAMBA_INLINE __m512i load_four(const PanelRows& rows, int64_t offset, int i) {
    const __m512i low = _mm512_castsi256_si512(load_two(rows, offset, i));
    return _mm512_maskz_inserti64x4(0xff, low, load_two(rows, offset, i + 8), 1);
}
#endif

// 16 bytes at an offset of each row: vector j holds bytes 4j to 4j + 3 of all.
ANYMAMBA_INLINE void transpose16(const PanelRows& rows, int64_t offset, vint* to) {
#if defined(__AVX512F__)
    const __m512i a = load_four(rows, offset, 0), b = load_four(rows, offset, 1);
    const __m512i c = load_four(rows, offset, 2), d = load_four(rows, offset, 3);
    constexpr __mmask16 ALL = 0xffff;
    const __m512i ab = _mm512_maskz_unpacklo_epi32(ALL, a, b), cd = _mm512_maskz_unpacklo_epi32(ALL, c, d);
    const __m512i ab_high = _mm512_maskz_unpackhi_epi32(ALL, a, b), cd_high = _mm512_maskz_unpackhi_epi32(ALL, c, d);
    to[0] = (vint)_mm512_maskz_unpacklo_epi64(0xff, ab, cd);
    to[1] = (vint)_mm512_maskz_unpackhi_epi64(0xff, ab, cd);
    to[2] = (vint)_mm512_maskz_unpacklo_epi64(0xff, ab_high, cd_high);
    to[3] = (vint)_mm512_maskz_unpackhi_epi64(0xff, ab_high, cd_high);
#elif defined(__AVX2__)
    const __m256i a = load_two(rows, offset, 0), b = load_two(rows, offset, 1);
    const __m256i c = load_two(rows, offset, 2), d = load_two(rows, offset, 3);
    const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
    const __m256i ab_high = _mm256_unpackhi_epi32(a, b), cd_high = _mm256_unpackhi_epi32(c, d);
    to[0] = (vint)_mm256_unpacklo_epi64(ab, cd);
    to[1] = (vint)_mm256_unpackhi_epi64(ab, cd);
    to[2] = (vint)_mm256_unpacklo_epi64(ab_high, cd_high);
    to[3] = (vint)_mm256_unpackhi_epi64(ab_high, cd_high);
#else
    for (int j = 0; j < 4; j++) {
        int32_t words[OUTPUTS];
        for (int lane = 0; lane < OUTPUTS; lane++) std::memcpy(&words[lane], rows.row(lane) + offset + 4 * j, 4);
        std::memcpy(&to[j], words, sizeof words);
    }
#endif
}

ANYMAMBA_INLINE void transpose32(const PanelRows& rows, int64_t offset, vint* to) {
    transpose16(rows, offset, to);
    transpose16(rows, offset + 16, to + 4);
}

// A float16 at an offset of each row.
ANYMAMBA_INLINE int read_word(const PanelRows& rows, int64_t offset, int i) {
    uint16_t bits;
    std::memcpy(&bits, rows.row(i) + offset, 2);
    return bits;
}
#if defined(__AVX2__)
ANYMAMBA_INLINE __m128i gather_words(const PanelRows& rows, int64_t offset, int i) {
    __m128i v = _mm_cvtsi32_si128(read_word(rows, offset, i));
    v = _mm_insert_epi16(v, read_word(rows, offset, i + 1), 1);
    v = _mm_insert_epi16(v, read_word(rows, offset, i + 2), 2);
    v = _mm_insert_epi16(v, read_word(rows, offset, i + 3), 3);
    v = _mm_insert_epi16(v, read_word(rows, offset, i + 4), 4);
    v = _mm_insert_epi16(v, read_word(rows, offset, i + 5), 5);
    v = _mm_insert_epi16(v, read_word(rows, offset, i + 6), 6);
    return _mm_insert_epi16(v, read_word(rows, offset, i + 7), 7);
}
#endif
ANYMAMBA_INLINE vfloat gather_float16(const PanelRows& rows, int64_t offset) {
#if defined(__AVX512F__)
    const __m256i words = _mm256_castsi128_si256(gather_words(rows, offset, 0));
    return from_float16((vhalf)_mm256_inserti128_si256(words, gather_words(rows, offset, 8), 1));
#elif defined(__AVX2__)
    return from_float16((vhalf)gather_words(rows, offset, 0));
#else
    vhalf bits;
    for (int i = 0; i < OUTPUTS; i++) bits[i] = uint16_t(read_word(rows, offset, i));
    return from_float16(bits);
#endif
}

#if defined(__AVX512BW__)
// Words of 128 bytes: the float16 at the start of each of 8 blocks of 18 bytes, or of 4 blocks of 34.
ANYMAMBA_INLINE __m128i pick_words(const uint8_t* p, __m512i places) {
    const __m512i low = _mm512_loadu_si512(p), high = _mm512_loadu_si512(p + 64);
    return _mm512_castsi512_si128(_mm512_permutex2var_epi16(low, places, high));
}

// The scales of 8 blocks of BYTES of a row.
template <int BYTES>
ANYMAMBA_INLINE __m128i eight_float16(const uint8_t* p) {
    static_assert(BYTES == 18 || BYTES == 34);
    constexpr int W = BYTES / 2;
    if constexpr (BYTES == 18)
        return pick_words(p, _mm512_castsi128_si512(_mm_setr_epi16(0, W, 2 * W, 3 * W, 4 * W, 5 * W, 6 * W, 7 * W)));
    const __m512i places = _mm512_castsi128_si512(_mm_setr_epi16(0, W, 2 * W, 3 * W, 0, 0, 0, 0));
    return _mm_unpacklo_epi64(pick_words(p, places), pick_words(p + 4 * BYTES, places));
}

// The scales of 8 blocks of all rows: `to` are two vectors apart.
template <int BYTES>
ANYMAMBA_INLINE void gather_eight(const PanelRows& rows, vfloat* to) {
    __m256i y[8], t[8], u[8];
    for (int i = 0; i < 8; i++)
        y[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(eight_float16<BYTES>(rows.row(i))),
                                       eight_float16<BYTES>(rows.row(i + 8)), 1);
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi16(y[i], y[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi16(y[i], y[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            u[i + 2 * j] = _mm256_unpacklo_epi32(t[i + j], t[i + j + 2]);
            u[i + 2 * j + 1] = _mm256_unpackhi_epi32(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        to[4 * i] = from_float16((vhalf)_mm256_unpacklo_epi64(u[i], u[i + 4]));
        to[4 * i + 2] = from_float16((vhalf)_mm256_unpackhi_epi64(u[i], u[i + 4]));
    }
}
#endif

// ------------------------------------------------------------------------------------------ unpacking

constexpr int32_t LOW_NIBBLES = 0x0f0f0f0f;

ANYMAMBA_INLINE vint high_nibbles(vint v) { return (v >> 4) & LOW_NIBBLES; }
ANYMAMBA_INLINE vfloat to_float(vint v) { return __builtin_convertvector(v, vfloat); }

// Memory that is read later is prefetched a few lines at a time: more would wait for each other.
struct Ahead {
    const uint8_t* next;  // null if there is none
    ANYMAMBA_INLINE void prefetch(int64_t size) {
        if (!next) return;
        for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(next + i, 0, 3);
        next += size;
    }
};

// The three functions below read the stored block that the rows are at. They call emit(b, q, scale, minimum) for each
// group b of 32 columns: eight vectors of whole numbers, one scale or two, and the minimum if the format has one.
template <Format F, typename Emit>
ANYMAMBA_INLINE void unpack_small(const PanelRows& rows, Ahead& ahead, const vfloat* known, Emit emit) {
    using L = Layout<F>;
    vint q[8];
    ahead.prefetch(L::BYTES * OUTPUTS);
    if constexpr (F == Format::q8_0) {
        transpose32(rows, 2, q);
        if (!SIGNED_BYTES)
            for (int j = 0; j < 8; j++) q[j] = q[j] ^ int32_t(0x80808080);
    } else {
        static_assert(F == Format::q4_0);
        transpose16(rows, 2, q);
        for (int j = 0; j < 4; j++) q[4 + j] = high_nibbles(q[j]), q[j] = q[j] & LOW_NIBBLES;
    }
    emit(0, q, known, vfloat{});
}

// The scales of n such blocks; `to` are two vectors apart.
template <Format F>
ANYMAMBA_INLINE void gather_scales(PanelRows rows, int n, vfloat* to) {
    constexpr int BYTES = Layout<F>::BYTES;
    int i = 0;
#if defined(__AVX512BW__)
    for (; i + 8 <= n; i += 8, rows.advance(8 * BYTES)) gather_eight<BYTES>(rows, to + 2 * i);
#endif
    for (; i < n; i++, rows.advance(BYTES)) to[2 * i] = gather_float16(rows, 0);
}

// The scales and minima of Q4_K and Q5_K: 6 bits each, times a float16 for all eight.
struct ScalesAndMinima {
    vfloat scale[8], minimum[8];
    explicit ScalesAndMinima(const PanelRows& rows) {
        vint words[4];  // the two float16; then 12 bytes
        transpose16(rows, 0, words);
        const vfloat all = from_float16(narrow((vbits)words[0] & 0xffff));
        const vfloat all_minima = from_float16(narrow((vbits)words[0] >> 16));
        for (int i = 0; i < 4; i++) {
            const int shift = 8 * i;
            const vint first = words[1] >> shift, second = words[2] >> shift, third = words[3] >> shift;
            scale[i] = all * to_float(first & 63);
            minimum[i] = all_minima * to_float(second & 63);
            scale[4 + i] = all * to_float((third & 15) | ((first >> 2) & 48));
            minimum[4 + i] = all_minima * to_float(((third >> 4) & 15) | ((second >> 2) & 48));
        }
    }
};

template <Format F, typename Emit>
ANYMAMBA_INLINE void unpack_q4_k(const PanelRows& rows, Ahead& ahead, Emit emit) {
    constexpr bool FIFTH = F == Format::q5_k;  // a bit of each of the eight blocks
    const ScalesAndMinima s(rows);
    vint fifth[8];
    if (FIFTH) transpose32(rows, 16, fifth);
    for (int i = 0; i < 4; i++) {
        vint low[8], high[8];
        ahead.prefetch(Layout<F>::BYTES * OUTPUTS / 4);
        transpose32(rows, (FIFTH ? 48 : 16) + 32 * i, low);
        for (int j = 0; j < 8; j++) {
            high[j] = high_nibbles(low[j]), low[j] = low[j] & LOW_NIBBLES;
            if (FIFTH) {
                const vint bits = fifth[j] >> (2 * i);
                low[j] |= (bits & 0x01010101) << 4, high[j] |= (bits & 0x02020202) << 3;
            }
        }
        emit(2 * i, low, &s.scale[2 * i], s.minimum[2 * i]);
        emit(2 * i + 1, high, &s.scale[2 * i + 1], s.minimum[2 * i + 1]);
    }
}

template <typename Emit>
ANYMAMBA_INLINE void unpack_q6_k(const PanelRows& rows, Ahead& ahead, Emit emit) {
    const vfloat all = gather_float16(rows, 208);
    vint scales[4];  // an int8 for each 16 columns
    vfloat scale[16];
    transpose16(rows, 192, scales);
    for (int i = 0; i < 16; i++) scale[i] = all * to_float((scales[i / 4] << (24 - 8 * (i % 4))) >> 24);
    for (int half = 0; half < 2; half++) {
        vint bits[8], low[8], high[8];
        transpose32(rows, 128 + 32 * half, bits);
        for (int side = 0; side < 2; side++) {  // blocks `side` and `side + 2` of the half
            const int b = 4 * half + side;
            ahead.prefetch(Layout<Format::q6_k>::BYTES * OUTPUTS / 4);
            transpose32(rows, 64 * half + 32 * side, low);
            for (int j = 0; j < 8; j++) {
                const vint two = bits[j] >> (2 * side);
                high[j] = high_nibbles(low[j]) | (two & 0x30303030);
                low[j] = (low[j] & LOW_NIBBLES) | ((two & 0x03030303) << 4);
            }
            emit(b, low, &scale[2 * b], vfloat{});
            emit(b + 2, high, &scale[2 * b + 4], vfloat{});
        }
    }
}

// Unpacks n stored blocks, from the one that the rows are at. `emit` is called as above, with b counted over all of
// them, and `done(i)` after stored block i.
template <Format F, typename Emit, typename Done>
ANYMAMBA_INLINE void unpack(PanelRows rows, int n, const uint8_t* next, Emit emit, Done done) {
    using L = Layout<F>;
    Ahead ahead{next};
    vfloat known[PANEL_BLOCKS][2];
    if constexpr (L::BLOCKS == 1) gather_scales<F>(rows, n, &known[0][0]);
    for (int i = 0; i < n; i++, rows.advance(L::BYTES)) {
        const auto emit_here = [&](int b, const vint* q, const vfloat* scale, vfloat minimum)
                                   ANYMAMBA_INLINE_LAMBDA { emit(i * L::BLOCKS + b, q, scale, minimum); };
        if constexpr (L::BLOCKS == 1)
            unpack_small<F>(rows, ahead, known[i], emit_here);
        else if constexpr (F == Format::q6_k)
            unpack_q6_k(rows, ahead, emit_here);
        else
            unpack_q4_k<F>(rows, ahead, emit_here);
        done(i);
    }
}

}  // namespace anymamba::ANYMAMBA_ISA
