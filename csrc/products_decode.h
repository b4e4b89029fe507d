// Stored blocks as floats, in plain loops: embeddings, and weights that are converted.
#pragma once

#include "packed.h"
#include "simd.h"

namespace anymamba::ANYMAMBA_ISA {

ANYMAMBA_INLINE float read_half(const uint8_t* p) {
    return from_float16(load_some<vhalf>(reinterpret_cast<const uint16_t*>(p), 1))[0];
}
ANYMAMBA_INLINE void write_half(uint8_t* p, float value) {
    const uint16_t bits = to_float16(broadcast(value))[0];
    std::memcpy(p, &bits, 2);
}

// Columns and bytes of a stored block.
struct BlockSize {
    int64_t columns, bytes;
};
inline BlockSize block_size(Format format) {
    switch (format) {
        case Format::float32: return {1, 4};
        case Format::bfloat16:
        case Format::float16: return {1, 2};
        case Format::q8_0: return {32, 34};
        case Format::q4_0: return {32, 18};
        case Format::q4_k: return {256, 144};
        case Format::q5_k: return {256, 176};
        case Format::q6_k: return {256, 210};
    }
    return {1, 0};
}

// The scales and minima of a block of Q4_K or Q5_K, 6 bits each in 12 bytes.
inline void read_scales(const uint8_t* p, uint8_t* scales, uint8_t* minima) {
    for (int i = 0; i < 4; i++) {
        scales[i] = p[i] & 63, minima[i] = p[4 + i] & 63;
        scales[4 + i] = (p[8 + i] & 15) | ((p[i] >> 2) & 48);
        minima[4 + i] = (p[8 + i] >> 4) | ((p[4 + i] >> 2) & 48);
    }
}

inline void write_scales(const int* scales, const int* minima, uint8_t* p) {
    for (int i = 0; i < 4; i++) {
        p[i] = uint8_t(scales[i] | (scales[4 + i] >> 4 << 6));
        p[4 + i] = uint8_t(minima[i] | (minima[4 + i] >> 4 << 6));
        p[8 + i] = uint8_t((scales[4 + i] & 15) | (minima[4 + i] & 15) << 4);
    }
}

inline void decode_q8_0(const uint8_t* p, float* out) {
    const float scale = read_half(p);
    for (int i = 0; i < 32; i++) out[i] = scale * float(int8_t(p[2 + i]));
}

inline void decode_q4_0(const uint8_t* p, float* out) {
    const float scale = read_half(p);
    for (int i = 0; i < 16; i++) {
        out[i] = scale * float((p[2 + i] & 15) - 8);
        out[16 + i] = scale * float((p[2 + i] >> 4) - 8);
    }
}

// Q4_K, or Q5_K with a fifth bit per column in `fifth`.
inline void decode_q4_k(const uint8_t* p, const uint8_t* fifth, const uint8_t* q, float* out) {
    const float scale = read_half(p), minimum = read_half(p + 2);
    uint8_t scales[8], minima[8];
    read_scales(p + 4, scales, minima);
    for (int b = 0; b < 8; b++) {
        const float s = scale * scales[b], m = minimum * minima[b];
        const uint8_t* nibbles = q + 32 * (b / 2);
        for (int i = 0; i < 32; i++) {
            const int low = (nibbles[i] >> (4 * (b % 2))) & 15, high = fifth ? (fifth[i] >> b & 1) << 4 : 0;
            out[32 * b + i] = s * float(low | high) - m;
        }
    }
}

inline void decode_q6_k(const uint8_t* p, float* out) {
    const float scale = read_half(p + 208);
    for (int b = 0; b < 8; b++) {
        const uint8_t *low = p + 64 * (b / 4) + 32 * (b % 2), *high = p + 128 + 32 * (b / 4);
        for (int i = 0; i < 32; i++) {
            const float s = scale * float(int8_t(p[192 + 2 * b + i / 16]));
            const int q = (low[i] >> (b % 4 / 2 * 4) & 15) | (high[i] >> (b % 4 * 2) & 3) << 4;
            out[32 * b + i] = s * float(q - 32);
        }
    }
}

// One stored block of a block format.
inline void decode_block(Format format, const uint8_t* p, float* out) {
    if (format == Format::q8_0) decode_q8_0(p, out);
    if (format == Format::q4_0) decode_q4_0(p, out);
    if (format == Format::q4_k) decode_q4_k(p, nullptr, p + 16, out);
    if (format == Format::q5_k) decode_q4_k(p, p + 16, p + 48, out);
    if (format == Format::q6_k) decode_q6_k(p, out);
}

}  // namespace anymamba::ANYMAMBA_ISA
