// Pieces: what one warp works on at a time, TOKENS neighbouring tokens of BLOCK_CHANNELS channels and all states.
//
// A lane works on CHANNELS neighbouring channels; SHARE neighbouring lanes have the same channels and share the states
// of a group of 16: state j * SHARE + lane % SHARE is the lane's j-th. A step is what a lane does for one of them.
//
// Needs DTYPE, SHARE, CHANNELS, TOKENS, WARPS, and ONE_GROUP: whether there are 16 states or fewer, 0 or 1.
#pragma once

#include "parameters.cuh"

typedef ElementOf<DTYPE>::Type Element;

constexpr int GROUP = 16;  // states worked on by code without a loop: d_state is padded to a multiple
constexpr int STEPS = GROUP / SHARE;
constexpr int OWNERS = 32 / SHARE;  // lanes with channels of their own
constexpr int BLOCK_CHANNELS = OWNERS * CHANNELS;
constexpr int THREADS = 32 * WARPS;
constexpr int PLANE = GROUP * BLOCK_CHANNELS;  // a number for each state of a group and channel
constexpr int VECTOR = 16 / sizeof(Element);
constexpr bool PRECISE = sizeof(Element) > 2;  // see softplus_fast
static_assert(SAVED_EVERY % TOKENS == 0 && TOKENS % SHARE == 0, "");

DEVICE int groups_of(const Parameters& p) { return ONE_GROUP ? 1 : int(p.states) / GROUP; }

// Versions of the same code: with sequences that start or end inside a piece, and without.
struct Yes {
    static constexpr bool value = true;
};
struct No {
    static constexpr bool value = false;
};

template <int count>
DEVICE void load(float (&out)[count], const float* in) {
    read<FLOAT32>(out, in);
}
template <int count>
DEVICE void store(float* out, const float (&in)[count]) {
    write<FLOAT32>(out, in);
}

// A part of a tensor, (all, row), that is not aligned or reaches over an edge: zeros from `tokens` and `columns` on.
CALLED void copy_elements(Element* shared, const u8* start, int row_bytes, int all, int tokens, int columns, int row,
                          int lane) {
    for (int i = lane; i < all * row; i += 32) {
        const int t = i / row, c = i % row;
        const Element* from = reinterpret_cast<const Element*>(start + i64(t) * row_bytes) + c;
        shared[i] = t < tokens && c < columns ? *from : Element(0);
    }
}

// Which of the optional inputs there are, in one register.
enum { HAS_Z = 1, HAS_D = 2, HAS_SOFTPLUS = 4, IS_PACKED = 8 };
DEVICE int options_of(const Parameters& p) {
    int options =
        (p.z.data ? HAS_Z : 0) | (p.D ? HAS_D : 0) | (p.softplus ? HAS_SOFTPLUS : 0) | (p.sequence_of ? IS_PACKED : 0);
    keep(options);
    return options;
}

// Write neighbouring elements of a tensor's row: all where the piece is `full`, else those before `count`.
template <int width>
DEVICE void write_some(u8* to, bool full, const float (&values)[width], int count) {
    Element* out = reinterpret_cast<Element*>(to);
    if (full) {
        write<DTYPE>(out, values);
    } else {
#pragma unroll
        for (int i = 0; i < width; i++)
            if (i < count) write<DTYPE, 1>(out + i, {values[i]});
    }
}

// A vector (d_inner,) at the lane's channels; zeros where it is absent.
template <int width>
DEVICE void read_vector(float (&out)[width], const u8* vector, i64 channel, int count) {
#pragma unroll
    for (int i = 0; i < width; i++)
        out[i] = vector && i < count ? reinterpret_cast<const float*>(vector)[channel + i] : 0.f;
}

// Add up over the lanes that share channels: lane i of them gets the sums of values [i, i + 1) * count / SHARE in
// front.
template <int count, int lanes = SHARE>
DEVICE void sum_shared(float (&values)[count], int place) {
    if constexpr (lanes > 1) {
        constexpr int half = count / 2;
        const bool upper = place & (lanes / 2);
        float kept[half];
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float given = upper ? values[i] : values[i + half];
            kept[i] = (upper ? values[i + half] : values[i]) + shuffle_xor(given, lanes / 2);
        }
        sum_shared<half, lanes / 2>(kept, place);
#pragma unroll
        for (int i = 0; i < half; i++) values[i] = kept[i];
    }
}

// Planes in shared memory have the order in which lanes read them, so that banks do not conflict: (step, lane, channel
// of the lane).
DEVICE int place_in_plane(int n, int c) {
    const int lane = c / CHANNELS * SHARE + n % SHARE;
    return (n / SHARE * 32 + lane) * CHANNELS + c % CHANNELS;
}

// The rate of a state of a channel of the block: log2(e) A, and 0 for what is padded.
DEVICE float rate_of(const Parameters& p, const Place& at, int n, int c) {
    const bool ok = c < at.count && n < p.d_state;
    return ok ? LOG2_E * reinterpret_cast<const float*>(p.A)[(at.channel + c) * p.d_state + n] : 0.f;
}

// What arrives at a chunk for a state and channel, from what leaves the others where nothing arrives, and their decays.
// Nothing passes through a chunk in which a sequence starts or, backwards, ends.
template <bool BACKWARD>
DEVICE float arrival(const Parameters& p, const Place& at, i64 n, int c) {
    constexpr int AT_ONCE = 8;  // chunks whose numbers are asked for at once
    const i64 size = p.states * p.channels, place = at.row * p.n_chunks * size + n * p.channels + at.padded + c;
    const float* leaving = reinterpret_cast<const float*>(p.chunk_states) + place;
    const float* decays = reinterpret_cast<const float*>(p.chunk_decays) + place;
    const i64 before = BACKWARD ? p.n_chunks - 1 - at.chunk : at.chunk;
    float h = 0.f;
    for (i64 k0 = 0; k0 < before; k0 += AT_ONCE) {
        float left[AT_ONCE], decay[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const i64 chunk = BACKWARD ? p.n_chunks - 1 - min(k0 + k, before - 1) : min(k0 + k, before - 1);
            left[k] = leaving[chunk * size], decay[k] = decays[chunk * size];
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (k0 + k >= before) continue;
            const i64 chunk = BACKWARD ? p.n_chunks - 1 - k0 - k : k0 + k;
            h = passes_through<BACKWARD>(p, chunk) ? fmaf(decay[k], h, left[k]) : left[k];
        }
    }
    return h;
}

// The states of a sequence at (sequence, channel + i, n), i < width, where there are such channels and states.
template <int width>
struct States {
    float* first;
    i64 d_state;
    int count;  // of channels

    DEVICE void read(float (&h)[width]) const {
#pragma unroll
        for (int i = 0; i < width; i++) h[i] = i < count ? first[i * d_state] : 0.f;
    }
    DEVICE void write(const float (&h)[width]) const {
#pragma unroll
        for (int i = 0; i < width; i++)
            if (i < count) first[i * d_state] = h[i];
    }
};
template <int width>
DEVICE States<width> states_of(const u8* states, const Parameters& p, i64 sequence, i64 channel, int count, int n) {
    float* first = reinterpret_cast<float*>(const_cast<u8*>(states)) + (sequence * p.d_inner + channel) * p.d_state + n;
    return {first, p.d_state, states && n < p.d_state ? count : 0};
}

// The same where it is rare.
CALLED float4 state_of(const float* from, i64 d_state, int count) {
    return make_float4(count > 0 ? from[0] : 0.f, count > 1 ? from[d_state] : 0.f, count > 2 ? from[2 * d_state] : 0.f,
                       count > 3 ? from[3 * d_state] : 0.f);
}
template <int width>
DEVICE void read_states(float (&h)[width], const States<width>& states) {
    static_assert(width == 2 || width == 4, "");
    const float4 v = state_of(states.first, states.d_state, min(states.count, width));
    h[0] = v.x, h[1] = v.y;
    if constexpr (width > 2) h[2] = v.z, h[3] = v.w;
}
