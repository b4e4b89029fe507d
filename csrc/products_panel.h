// Block formats: weights of a panel of outputs, one output per lane, unpacked to bytes.
//
// The whole numbers of a block of 32 columns are eight vectors, each with four columns of every output. Formats differ
// in how blocks are unpacked; `Layout` says what multiplying needs to know.
#pragma once

#include "packed.h"
#include "simd.h"

namespace anymamba::ANYMAMBA_ISA {

constexpr int OUTPUTS = LANES<float>;  // of a panel
constexpr int PANEL_BLOCKS = 16;       // of 32 columns: two blocks of a K-quant

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

// 16 bytes at p of each output, stride bytes apart: vector j holds bytes 4j to 4j + 3 of all.
ANYMAMBA_INLINE void transpose16(const uint8_t* p, int64_t stride, vint* to) {
#if defined(__AVX512F__)
    const auto four = [&](int i) {
        const auto row = [&](int k) { return _mm_loadu_si128((const __m128i*)(p + (i + 4 * k) * stride)); };
        const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(1), 1);
        const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(row(2)), row(3), 1);
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    };
    const __m512i a = four(0), b = four(1), c = four(2), d = four(3);
    const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
    const __m512i ab_high = _mm512_unpackhi_epi32(a, b), cd_high = _mm512_unpackhi_epi32(c, d);
    to[0] = (vint)_mm512_unpacklo_epi64(ab, cd);
    to[1] = (vint)_mm512_unpackhi_epi64(ab, cd);
    to[2] = (vint)_mm512_unpacklo_epi64(ab_high, cd_high);
    to[3] = (vint)_mm512_unpackhi_epi64(ab_high, cd_high);
#elif defined(__AVX2__)
    const auto two = [&](int i) {
        const auto row = [&](int k) { return _mm_loadu_si128((const __m128i*)(p + (i + 4 * k) * stride)); };
        return _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(1), 1);
    };
    const __m256i a = two(0), b = two(1), c = two(2), d = two(3);
    const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
    const __m256i ab_high = _mm256_unpackhi_epi32(a, b), cd_high = _mm256_unpackhi_epi32(c, d);
    to[0] = (vint)_mm256_unpacklo_epi64(ab, cd);
    to[1] = (vint)_mm256_unpackhi_epi64(ab, cd);
    to[2] = (vint)_mm256_unpacklo_epi64(ab_high, cd_high);
    to[3] = (vint)_mm256_unpackhi_epi64(ab_high, cd_high);
#else
    for (int lane = 0; lane < OUTPUTS; lane++) {
        int32_t words[4];
        std::memcpy(words, p + lane * stride, sizeof words);
        for (int j = 0; j < 4; j++) to[j][lane] = words[j];
    }
#endif
}

ANYMAMBA_INLINE void transpose32(const uint8_t* p, int64_t stride, vint* to) {
    transpose16(p, stride, to);
    transpose16(p + 16, stride, to + 4);
}

// A float16 at p of each output.
ANYMAMBA_INLINE vfloat gather_float16(const uint8_t* p, int64_t stride) {
    const auto at = [&](int i) {
        uint16_t bits;
        std::memcpy(&bits, p + i * stride, 2);
        return bits;
    };
#if defined(__AVX2__)
    const auto eight = [&](int i) {
        __m128i v = _mm_cvtsi32_si128(at(i));
        v = _mm_insert_epi16(v, at(i + 1), 1), v = _mm_insert_epi16(v, at(i + 2), 2);
        v = _mm_insert_epi16(v, at(i + 3), 3), v = _mm_insert_epi16(v, at(i + 4), 4);
        v = _mm_insert_epi16(v, at(i + 5), 5), v = _mm_insert_epi16(v, at(i + 6), 6);
        return _mm_insert_epi16(v, at(i + 7), 7);
    };
#if defined(__AVX512F__)
    return from_float16((vhalf)_mm256_inserti128_si256(_mm256_castsi128_si256(eight(0)), eight(8), 1));
#else
    return from_float16((vhalf)eight(0));
#endif
#else
    vhalf bits;
    for (int i = 0; i < OUTPUTS; i++) bits[i] = at(i);
    return from_float16(bits);
#endif
}

// ------------------------------------------------------------------------------------------ unpacking

constexpr int32_t LOW_NIBBLES = 0x0f0f0f0f;

ANYMAMBA_INLINE vint high_nibbles(vint v) { return (v >> 4) & LOW_NIBBLES; }
ANYMAMBA_INLINE vfloat to_float(vint v) { return __builtin_convertvector(v, vfloat); }

// Prefetches `size` bytes from p on.
ANYMAMBA_INLINE void prefetch(const uint8_t* p, int64_t size) {
    if (p)
        for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(p + i, 0, 3);
}

// Unpacks a stored block at p of each output to panel blocks from `b` on.
template <Format F>
ANYMAMBA_INLINE void unpack(const uint8_t* p, int64_t stride, Panel& panel, int b);

template <>
ANYMAMBA_INLINE void unpack<Format::q8_0>(const uint8_t* p, int64_t stride, Panel& panel, int b) {
    panel.scale[b][0] = gather_float16(p, stride);
    vint q[8];
    transpose32(p + 2, stride, q);
    for (int j = 0; j < 8; j++) panel.q[b][j] = SIGNED_BYTES ? q[j] : q[j] ^ int32_t(0x80808080);
}

template <>
ANYMAMBA_INLINE void unpack<Format::q4_0>(const uint8_t* p, int64_t stride, Panel& panel, int b) {
    panel.scale[b][0] = gather_float16(p, stride);
    vint q[4];
    transpose16(p + 2, stride, q);
    for (int j = 0; j < 4; j++) panel.q[b][j] = q[j] & LOW_NIBBLES, panel.q[b][4 + j] = high_nibbles(q[j]);
}

// The scales and minima of Q4_K and Q5_K: 6 bits each, times a float16 for all eight.
ANYMAMBA_INLINE void unpack_scales(const uint8_t* p, int64_t stride, Panel& panel, int b) {
    vint words[4];  // the two float16; then 12 bytes
    transpose16(p, stride, words);
    const vfloat scale = from_float16(narrow((vbits)words[0] & 0xffff));
    const vfloat minimum = from_float16(narrow((vbits)words[0] >> 16));
    for (int i = 0; i < 4; i++) {
        const int shift = 8 * i;
        const vint first = words[1] >> shift, second = words[2] >> shift, third = words[3] >> shift;
        panel.scale[b + i][0] = scale * to_float(first & 63);
        panel.minimum[b + i] = minimum * to_float(second & 63);
        panel.scale[b + 4 + i][0] = scale * to_float((third & 15) | ((first >> 2) & 48));
        panel.minimum[b + 4 + i] = minimum * to_float(((third >> 4) & 15) | ((second >> 2) & 48));
    }
}

template <>
ANYMAMBA_INLINE void unpack<Format::q4_k>(const uint8_t* p, int64_t stride, Panel& panel, int b) {
    unpack_scales(p, stride, panel, b);
    for (int i = 0; i < 4; i++) {
        vint q[8];
        transpose32(p + 16 + 32 * i, stride, q);
        for (int j = 0; j < 8; j++) {
            panel.q[b + 2 * i][j] = q[j] & LOW_NIBBLES;
            panel.q[b + 2 * i + 1][j] = high_nibbles(q[j]);
        }
    }
}

template <>
ANYMAMBA_INLINE void unpack<Format::q5_k>(const uint8_t* p, int64_t stride, Panel& panel, int b) {
    unpack_scales(p, stride, panel, b);
    vint fifth[8];  // a bit of each of the eight blocks
    transpose32(p + 16, stride, fifth);
    for (int i = 0; i < 4; i++) {
        vint q[8];
        transpose32(p + 48 + 32 * i, stride, q);
        for (int j = 0; j < 8; j++) {
            const vint bits = fifth[j] >> (2 * i);
            panel.q[b + 2 * i][j] = (q[j] & LOW_NIBBLES) | ((bits & 0x01010101) << 4);
            panel.q[b + 2 * i + 1][j] = high_nibbles(q[j]) | ((bits & 0x02020202) << 3);
        }
    }
}

template <>
ANYMAMBA_INLINE void unpack<Format::q6_k>(const uint8_t* p, int64_t stride, Panel& panel, int b) {
    const vfloat scale = gather_float16(p + 208, stride);
    vint scales[4];  // an int8 for each 16 columns
    transpose16(p + 192, stride, scales);
    for (int i = 0; i < 16; i++)
        panel.scale[b + i / 2][i % 2] = scale * to_float((scales[i / 4] << (24 - 8 * (i % 4))) >> 24);
    for (int half = 0; half < 2; half++) {
        vint first[8], second[8], bits[8];
        transpose32(p + 64 * half, stride, first);
        transpose32(p + 64 * half + 32, stride, second);
        transpose32(p + 128 + 32 * half, stride, bits);
        for (int j = 0; j < 8; j++) {
            vint(&q)[PANEL_BLOCKS][8] = panel.q;
            const int at = b + 4 * half;
            q[at][j] = (first[j] & LOW_NIBBLES) | ((bits[j] & 0x03030303) << 4);
            q[at + 1][j] = (second[j] & LOW_NIBBLES) | ((bits[j] & 0x0c0c0c0c) << 2);
            q[at + 2][j] = high_nibbles(first[j]) | (bits[j] & 0x30303030);
            q[at + 3][j] = high_nibbles(second[j]) | ((bits[j] >> 2) & 0x30303030);
        }
    }
}

}  // namespace anymamba::ANYMAMBA_ISA
