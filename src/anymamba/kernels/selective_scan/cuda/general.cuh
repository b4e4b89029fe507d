// What the general kernels share: how a lane reads its channel and a warp its slab of states.
#pragma once

#include "numbers.cuh"
#include "parameters.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int TILE = DOUBLE ? 8 : 16;  // tokens; a block must fit into 99 KB of shared memory
constexpr int SLAB = DOUBLE && COMPLEX ? 2 : 4;
constexpr R PAIR = COMPLEX ? 2 : 1;  // conjugate partners are implied: y = 2 Re(C . h)

// A number that is known to the compiler.
template <int number>
struct Is {
    static constexpr int value = number;
};

DEVICE i64 index_of(const Rows& rows, const Place& at, i64 token, int lane) {
    return at.row * rows.batch + token * rows.length + at.channel + lane;
}
DEVICE R element(const Rows& rows, const Place& at, i64 token, int lane) {
    return read_as<R>(rows.data, index_of(rows, at, token, lane), int(rows.dtype));
}
DEVICE void put_element(const Rows& rows, const Place& at, i64 token, int lane, R value) {
    write_as<R>(rows.data, index_of(rows, at, token, lane), int(rows.dtype), value);
}

// delta with its bias, before the softplus and after it.
DEVICE R raw_delta_at(const Parameters& p, const Place& at, i64 token, int lane) {
    const R bias = p.delta_bias ? reinterpret_cast<const R*>(p.delta_bias)[at.channel + lane] : R(0);
    return element(p.delta, at, token, lane) + bias;
}
DEVICE R delta_at(const Parameters& p, const Place& at, i64 token, int lane) {
    const R raw = raw_delta_at(p, at, token, lane);
    return p.softplus ? softplus(raw) : raw;
}

// The sequences that start and end inside a tile.
DEVICE Boundaries boundaries_of_tile(const Parameters& p, int around, i64 first, int tokens, int lane) {
    const i64 end = p.length - 1 - first;
    return boundaries_of(p.sequence_of, around, tokens, TILE, first == 0 ? 0 : -1, end < TILE ? int(end) : -1, lane);
}

// The gradient of the scan's own output, before the gate.
DEVICE R dscan_at(const Parameters& p, const Place& at, i64 token, int lane) {
    const R dy = element(p.dy, at, token, lane);
    if (!p.z.data) return dy;
    const R z = element(p.z, at, token, lane);
    return dy * z * sigmoid(z);
}

// What multiplies B u: delta, or (exp(delta A) - 1) / A for the zero-order hold.
template <bool ZOH>
DEVICE T weight(R d, T A, T a) {
    return ZOH ? d * expm1_ratio(d * A, a) : number(d);
}

// A, and B and C where they are constant, of a slab, with zeros for what is padded; or sums of their gradients.
struct States {
    T A[SLAB], B[SLAB], C[SLAB];
};
DEVICE States states_of(const Parameters& p, const Place& at, i64 slab, int lane) {
    States own;
#pragma unroll
    for (int i = 0; i < SLAB; i++) {
        const bool ok = slab + i < p.d_state && lane < at.count;
        const i64 index = (at.channel + lane) * p.d_state + slab + i;
        own.A[i] = ok ? reinterpret_cast<const T*>(p.A)[index] : number(R(0));
        own.B[i] = ok && p.constant_B ? reinterpret_cast<const T*>(p.constant_B)[index] : number(R(0));
        own.C[i] = ok && p.constant_C ? reinterpret_cast<const T*>(p.constant_C)[index] : number(R(0));
    }
    return own;
}

// B and C of a warp's slab at the tokens of a tile, in shared memory, where all channels of the group share them.
struct OfSlab {
    T B[TILE][SLAB], C[TILE][SLAB];
};
DEVICE void put_matrix(T (&to)[TILE][SLAB], const Rows& rows, const Parameters& p, const Place& at, i64 first,
                       int tokens, i64 slab, int lane) {
    if (!rows.data) return;
    const i64 start = at.row * rows.batch + first * rows.length + at.group * rows.group + slab;
    for (int i = lane; i < TILE * SLAB; i += 32) {
        const int t = i / SLAB, n = i % SLAB;
        const bool ok = t < tokens && slab + n < p.d_state;
        to[t][n] = ok ? read_number(rows.data, start + t * rows.length + n, int(rows.dtype)) : number(R(0));
    }
}
// All lanes call it; what they have read of another tile or slab is overwritten.
DEVICE void put_matrices(OfSlab& shared, bool with_B, bool with_C, const Parameters& p, const Place& at, i64 first,
                         int tokens, i64 slab, int lane) {
    sync_warp();
    if (with_B) put_matrix(shared.B, p.B, p, at, first, tokens, slab, lane);
    if (with_C) put_matrix(shared.C, p.C, p, at, first, tokens, slab, lane);
    sync_warp();
}
// B or C at a token: the constant one, or that of the token.
DEVICE void matrix_at(T (&out)[SLAB], const T (&constant)[SLAB], const T (&of_token)[SLAB], bool is_constant) {
#pragma unroll
    for (int i = 0; i < SLAB; i++) out[i] = is_constant ? constant[i] : of_token[i];
}

// A slab of (state, channel) in scratch memory; `first` is the lane's channel of state 0.
DEVICE void put(T* first, const T (&h)[SLAB], const Parameters& p, i64 slab) {
#pragma unroll
    for (int i = 0; i < SLAB; i++)
        if (slab + i < p.d_state) first[(slab + i) * p.channels] = h[i];
}
DEVICE void get(T (&h)[SLAB], const T* first, const Parameters& p, i64 slab) {
#pragma unroll
    for (int i = 0; i < SLAB; i++) h[i] = slab + i < p.d_state ? first[(slab + i) * p.channels] : number(R(0));
}

// A slab of (sequence, channel, state); zeros where there is no tensor.
DEVICE void get_of_sequence(T (&h)[SLAB], const u8* states, const Parameters& p, const Place& at, i64 sequence,
                            i64 slab, int lane) {
    const i64 index = (sequence * p.d_inner + at.channel + lane) * p.d_state + slab;
#pragma unroll
    for (int i = 0; i < SLAB; i++) {
        const bool ok = states && slab + i < p.d_state && lane < at.count;
        h[i] = ok ? reinterpret_cast<const T*>(states)[index + i] : number(R(0));
    }
}
DEVICE void put_of_sequence(u8* states, const T (&h)[SLAB], const Parameters& p, const Place& at, i64 sequence,
                            i64 slab, int lane) {
    const i64 index = (sequence * p.d_inner + at.channel + lane) * p.d_state + slab;
#pragma unroll
    for (int i = 0; i < SLAB; i++)
        if (slab + i < p.d_state && lane < at.count) reinterpret_cast<T*>(states)[index + i] = h[i];
}
