// How weights lie in GGUF's blocks, and how a thread gets them as bfloat16.
//
// A group is 32 neighbouring columns of a row. Four threads share it: thread t has columns 4t .. 4t + 3 of the first 16
// and of the last 16. Their integers are exact in bfloat16, and
//
//     weight = scale * integer - minimum
//
// An integer v from 0 to 127 gets into bfloat16 without a conversion: 0x4300 | v is 128 + v.
#pragma once
#include "device.cuh"

constexpr int Q8_0 = 3, Q4_0 = 4, Q4_K = 5, Q5_K = 6, Q6_K = 7;  // the codes of formats.FORMATS

constexpr u32 ONES = 0x3f803f80u;  // 1 twice, in bfloat16

// Integers of one thread: two words of two for each half of the group.
struct Group {
    u32 integers[2][2];
    float scale[2];  // of each half
    float minimum;
};

// Blocks begin at even addresses.
DEVICE u32 word(const u8* p) {
    const u16* halves = reinterpret_cast<const u16*>(p);
    return u32(halves[0]) | u32(halves[1]) << 16;
}
DEVICE float half_at(const u8* p) { return half_as_float(*reinterpret_cast<const u16*>(p)); }

// Four bytes from 0 to 127, less 128 + `high`: `minus` is that number in bfloat16, negative and twice.
DEVICE void bytes_as_bfloats(u32 (&out)[2], u32 bytes, u32 minus) {
    out[0] = add_bfloats(permute_bytes(bytes, 0x43434343u, 0x4140), minus);
    out[1] = add_bfloats(permute_bytes(bytes, 0x43434343u, 0x4342), minus);
}

template <int CODE>
struct Blocks;

template <>
struct Blocks<Q8_0> {
    static constexpr int COLUMNS = 32, BYTES = 34;
    static constexpr bool TWO_SCALES = false, HAS_MINIMUM = false;
    // A signed byte is its low seven bits, less 128 where it is negative: 128 + v less 256 or 128.
    DEVICE static Group get(const u8* block, int, int t) {
        Group found;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 bytes = word(block + 2 + 16 * half + 4 * t);
            const u32 low = bytes & 0x7f7f7f7fu, sign = bytes & 0x80808080u;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const u32 select = i ? 0x4342 : 0x4140;
                found.integers[half][i] =
                    add_bfloats(permute_bytes(low, 0x43434343u, select), permute_bytes(sign, 0xc3c3c3c3u, select));
            }
        }
        found.scale[0] = found.scale[1] = half_at(block);
        found.minimum = 0.f;
        return found;
    }
};

template <>
struct Blocks<Q4_0> {
    static constexpr int COLUMNS = 32, BYTES = 18;
    static constexpr bool TWO_SCALES = false, HAS_MINIMUM = false;
    DEVICE static Group get(const u8* block, int, int t) {
        Group found;
        const u32 nibbles = word(block + 2 + 4 * t);
        bytes_as_bfloats(found.integers[0], nibbles & 0x0f0f0f0fu, 0xc308c308u);  // 128 + 8
        bytes_as_bfloats(found.integers[1], nibbles >> 4 & 0x0f0f0f0fu, 0xc308c308u);
        found.scale[0] = found.scale[1] = half_at(block);
        found.minimum = 0.f;
        return found;
    }
};

// The scale and the minimum of a group of Q4_K and Q5_K, six bits each.
DEVICE void set_scale_and_minimum(Group& found, const u8* block, int group) {
    const u8* six = block + 4;
    int scale = six[group] & 63, minimum = six[group + 4] & 63;
    if (group >= 4) {
        scale = (six[group + 4] & 15) | (six[group - 4] >> 6 << 4);
        minimum = six[group + 4] >> 4 | (six[group] >> 6 << 4);
    }
    found.scale[0] = found.scale[1] = half_at(block) * float(scale);
    found.minimum = half_at(block + 2) * float(minimum);
}

template <>
struct Blocks<Q4_K> {
    static constexpr int COLUMNS = 256, BYTES = 144;
    static constexpr bool TWO_SCALES = false, HAS_MINIMUM = true;
    DEVICE static Group get(const u8* block, int group, int t) {
        Group found;
        set_scale_and_minimum(found, block, group);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 nibbles = word(block + 16 + group / 2 * 32 + 16 * half + 4 * t) >> 4 * (group % 2);
            bytes_as_bfloats(found.integers[half], nibbles & 0x0f0f0f0fu, 0xc300c300u);
        }
        return found;
    }
};

template <>
struct Blocks<Q5_K> {
    static constexpr int COLUMNS = 256, BYTES = 176;
    static constexpr bool TWO_SCALES = false, HAS_MINIMUM = true;
    DEVICE static Group get(const u8* block, int group, int t) {
        Group found;
        set_scale_and_minimum(found, block, group);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int column = 16 * half + 4 * t;
            const u32 nibbles = word(block + 48 + group / 2 * 32 + column) >> 4 * (group % 2) & 0x0f0f0f0fu;
            const u32 fifth = word(block + 16 + column) >> group & 0x01010101u;
            bytes_as_bfloats(found.integers[half], nibbles | fifth << 4, 0xc300c300u);
        }
        return found;
    }
};

template <>
struct Blocks<Q6_K> {
    static constexpr int COLUMNS = 256, BYTES = 210;
    static constexpr bool TWO_SCALES = true, HAS_MINIMUM = false;
    DEVICE static Group get(const u8* block, int group, int t) {
        Group found;
        const int side = group / 4, within = group % 4;  // two halves of 128 columns
        const float scale = half_at(block + 208);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int column = 16 * half + 4 * t;
            const u32 low = word(block + 64 * side + within % 2 * 32 + column) >> within / 2 * 4 & 0x0f0f0f0fu;
            const u32 high = word(block + 128 + 32 * side + column) >> 2 * within & 0x03030303u;
            bytes_as_bfloats(found.integers[half], low | high << 4, 0xc320c320u);  // 128 + 32
            found.scale[half] = scale * float(static_cast<signed char>(block[192 + 8 * side + 2 * within + half]));
        }
        found.minimum = 0.f;
        return found;
    }
};
