// How weights lie in GGUF's blocks, and how a thread gets them as bfloat16.
//
// A group is 32 neighbouring columns of a row. Four threads share it: thread t has columns 8t .. 8t + 7 (Q8_0), or
// 4t .. 4t + 3 of the first 16 and of the last 16. Their integers are exact in bfloat16, and
//
//     weight = scale * integer - minimum
//
// An integer v from 0 to 127 gets into bfloat16 without a conversion: 0x4300 | v is 128 + v.
#pragma once
#include "device.cuh"

constexpr int Q8_0 = 3, Q4_0 = 4, Q4_K = 5, Q5_K = 6, Q6_K = 7;  // the codes of formats.FORMATS

constexpr u32 ONES = 0x3f803f80u;  // 1 twice, in bfloat16

// Integers of one thread: two words of two for each half of its columns.
struct Group {
    u32 integers[2][2];
    float scale[2];  // of each half
    float minimum;
};

// Where a thread reads blocks, which begin at even addresses: `word` adds what is the thread's own.
struct InGlobal {
    const u8* start;
    int own;

    DEVICE u32 byte(int at) const { return start[at]; }
    DEVICE float half(int at) const { return half_as_float(*reinterpret_cast<const u16*>(start + at)); }
    DEVICE u32 word(int at) const {
        const u16* halves = reinterpret_cast<const u16*>(start + own + at);
        return u32(halves[0]) | u32(halves[1]) << 16;
    }
};

// The same in shared memory, where more than the blocks may be read: a word comes from two aligned ones. Those at 4i
// and at 4i + 2 need shifts of their own.
struct InShared {
    const u8* start;
    const u32* words[2];
    u32 shift[2];

    DEVICE InShared(const u8* start, int own) : start(start) {
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            const u64 address = reinterpret_cast<u64>(start + own + 2 * odd);
            words[odd] = reinterpret_cast<const u32*>(address & ~u64(3)), shift[odd] = u32(address & 3) * 8;
        }
    }
    DEVICE u32 byte(int at) const { return start[at]; }
    DEVICE float half(int at) const { return half_as_float(*reinterpret_cast<const u16*>(start + at)); }
    DEVICE u32 word(int at) const {
        const int odd = at / 2 % 2;
        const u32* from = words[odd] + at / 4;
        return shift_words(from[0], from[1], shift[odd]);
    }
};

// The same for blocks that begin at multiples of 16 bytes, 8 at a time, and `own` at multiples of 4: where words lie is
// known to the compiler.
struct InAlignedShared {
    const u8* start;
    const u8* words;

    DEVICE InAlignedShared(const u8* start, int own) : start(start), words(start + own) {}
    DEVICE u32 byte(int at) const { return start[at]; }
    DEVICE float half(int at) const { return half_as_float(*reinterpret_cast<const u16*>(start + at)); }
    DEVICE u32 word(int at) const {
        const u32* from = reinterpret_cast<const u32*>(words + at / 4 * 4);
        return at % 4 ? permute_bytes(from[0], from[1], 0x5432) : from[0];
    }
};
template <bool ALIGNED_BLOCKS>
struct In {
    typedef InShared Shared;
};
template <>
struct In<true> {
    typedef InAlignedShared Shared;
};

// Four bytes from 0 to 127, less 128 + `high`: `minus` is that number in bfloat16, negative and twice.
DEVICE void bytes_as_bfloats(u32 (&out)[2], u32 bytes, u32 minus) {
    out[0] = add_bfloats(permute_bytes(bytes, 0x43434343u, 0x4140), minus);
    out[1] = add_bfloats(permute_bytes(bytes, 0x43434343u, 0x4342), minus);
}

// BYTES of a block of COLUMNS; a thread has TOGETHER neighbouring columns. `get` takes the block's place after the
// start, and the group in it.
template <int CODE>
struct Blocks;

template <>
struct Blocks<Q8_0> {
    static constexpr int COLUMNS = 32, BYTES = 34, TOGETHER = 8;
    static constexpr bool TWO_SCALES = false, HAS_MINIMUM = false;
    // A signed byte is its low seven bits, less 128 where it is negative: 128 + v less 256 or 128.
    template <typename In>
    DEVICE static Group get(const In& in, int block, int) {
        Group found;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 bytes = in.word(block + 2 + 4 * half);
            const u32 low = bytes & 0x7f7f7f7fu, sign = bytes & 0x80808080u;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const u32 select = i ? 0x4342 : 0x4140;
                found.integers[half][i] =
                    add_bfloats(permute_bytes(low, 0x43434343u, select), permute_bytes(sign, 0xc3c3c3c3u, select));
            }
        }
        found.scale[0] = found.scale[1] = in.half(block);
        found.minimum = 0.f;
        return found;
    }
};

template <>
struct Blocks<Q4_0> {
    static constexpr int COLUMNS = 32, BYTES = 18, TOGETHER = 4;
    static constexpr bool TWO_SCALES = false, HAS_MINIMUM = false;
    template <typename In>
    DEVICE static Group get(const In& in, int block, int) {
        Group found;
        const u32 nibbles = in.word(block + 2);
        bytes_as_bfloats(found.integers[0], nibbles & 0x0f0f0f0fu, 0xc308c308u);  // 128 + 8
        bytes_as_bfloats(found.integers[1], nibbles >> 4 & 0x0f0f0f0fu, 0xc308c308u);
        found.scale[0] = found.scale[1] = in.half(block);
        found.minimum = 0.f;
        return found;
    }
};

// The scale and the minimum of a group of Q4_K and Q5_K, six bits each.
template <typename In>
DEVICE void set_scale_and_minimum(Group& found, const In& in, int block, int group) {
    const int six = block + 4;
    u32 scale = in.byte(six + group) & 63, minimum = in.byte(six + group + 4) & 63;
    if (group >= 4) {
        scale = (in.byte(six + group + 4) & 15) | (in.byte(six + group - 4) >> 6 << 4);
        minimum = in.byte(six + group + 4) >> 4 | (in.byte(six + group) >> 6 << 4);
    }
    found.scale[0] = found.scale[1] = in.half(block) * float(scale);
    found.minimum = in.half(block + 2) * float(minimum);
}

template <>
struct Blocks<Q4_K> {
    static constexpr int COLUMNS = 256, BYTES = 144, TOGETHER = 4;
    static constexpr bool TWO_SCALES = false, HAS_MINIMUM = true;
    template <typename In>
    DEVICE static Group get(const In& in, int block, int group) {
        Group found;
        set_scale_and_minimum(found, in, block, group);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 nibbles = in.word(block + 16 + group / 2 * 32 + 16 * half) >> 4 * (group % 2);
            bytes_as_bfloats(found.integers[half], nibbles & 0x0f0f0f0fu, 0xc300c300u);
        }
        return found;
    }
};

template <>
struct Blocks<Q5_K> {
    static constexpr int COLUMNS = 256, BYTES = 176, TOGETHER = 4;
    static constexpr bool TWO_SCALES = false, HAS_MINIMUM = true;
    template <typename In>
    DEVICE static Group get(const In& in, int block, int group) {
        Group found;
        set_scale_and_minimum(found, in, block, group);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 nibbles = in.word(block + 48 + group / 2 * 32 + 16 * half) >> 4 * (group % 2) & 0x0f0f0f0fu;
            const u32 fifth = in.word(block + 16 + 16 * half) >> group & 0x01010101u;
            bytes_as_bfloats(found.integers[half], nibbles | fifth << 4, 0xc300c300u);
        }
        return found;
    }
};

template <>
struct Blocks<Q6_K> {
    static constexpr int COLUMNS = 256, BYTES = 210, TOGETHER = 4;
    static constexpr bool TWO_SCALES = true, HAS_MINIMUM = false;
    template <typename In>
    DEVICE static Group get(const In& in, int block, int group) {
        Group found;
        const int side = group / 4, within = group % 4;  // two halves of 128 columns
        const float scale = in.half(block + 208);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 low = in.word(block + 64 * side + within % 2 * 32 + 16 * half) >> within / 2 * 4 & 0x0f0f0f0fu;
            const u32 high = in.word(block + 128 + 32 * side + 16 * half) >> 2 * within & 0x03030303u;
            bytes_as_bfloats(found.integers[half], low | high << 4, 0xc320c320u);  // 128 + 32
            const auto size = static_cast<signed char>(in.byte(block + 192 + 8 * side + 2 * within + half));
            found.scale[half] = scale * float(size);
        }
        found.minimum = 0.f;
        return found;
    }
};
