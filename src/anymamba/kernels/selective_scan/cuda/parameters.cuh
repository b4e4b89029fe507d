// What a kernel of the selective scan is given, and where its block of channels and its piece of time lie.
//
// Scratch tensors between kernels are padded: the channels of each group to a multiple of 32, which all kernels work
// on, so that padding is written, as zeros, before it is read; states to a multiple of 16 where kernels want that.
#pragma once

#include "device.cuh"

// A tensor (batch, length, channels), or (batch, length, groups, states): strides in elements, the last one is 1.
struct Rows {
    u8* data;
    i64 batch, length, group, dtype;
    i64 aligned;  // every block of channels starts at a multiple of 16 bytes, and none ends inside one
};

// All fields have 8 bytes; the order is that of call.FIELDS.
struct Parameters {
    Rows u, delta, z, B, C, y, dy, du, ddelta, dz;
    const u8 *A, *D, *delta_bias, *constant_B, *constant_C;  // (d_inner, d_state) or (d_inner,), of the working type
    const u8* initial_state;                                 // (n_sequences, d_inner, d_state)
    u8* last_state;
    const u8* dlast_state;
    u8* dinitial_state;
    u8* saved;         // states before every 64 tokens
    u8* chunk_states;  // (batch, n_chunks, states, channels): what leaves a chunk, then what arrives at it
    u8* chunk_decays;  // the same: what an arrival is multiplied with on its way through
    u8* chunk_steps;   // (batch, n_chunks, channels): the sum of d, or null
    u8* leaving;       // (batch, d_inner, d_state): what leaves a row
    u8* checkpoints;
    u8* dA_of_warps;
    u8 *dA_parts, *dD_parts, *dbias_parts, *dB_parts, *dC_parts;
    u8 *dA, *dD, *dbias, *dB, *dC;  // dense
    const i64* offsets;             // (n_sequences + 1)
    int* sequence_of;               // (length), or null where each row of the batch is one sequence
    i64 batch, length, d_inner, d_state, n_groups, n_sequences;
    i64 chunk, n_chunks;   // tokens of a chunk, a multiple of 64
    i64 blocks_of_group;   // blocks of channels of a group
    i64 states, channels;  // padded
    i64 n_parts;
    i64 first_chunk;                             // of the REVERSE pass
    i64 softplus, zoh, passage, lanes, aligned;  // aligned: all rows are
    i64 dA_dtype, dD_dtype, dbias_dtype, dB_dtype, dC_dtype;
};

constexpr int FORWARD = 0, SUMMARY = 1, REVERSE = 2;  // passages; see forward.cu

constexpr int SAVED_EVERY = 64;

// Where a block works. Channels of scratch tensors are counted from `padded`.
struct Place {
    i64 row, chunk;
    i64 begin, end;  // tokens of the chunk
    i64 channel, padded;
    int count;  // channels; none, or less, in a block that is all padding
    i64 group;
    i64 block;  // of channels
};

DEVICE Place place_of_block(const Parameters& p, int block_channels, int first_chunk) {
    Place at;
    const i64 blocks = p.blocks_of_group * p.n_groups, index = i64(blockIdx.x);
    at.block = index % blocks;
    at.row = index / blocks % p.batch;
    at.chunk = index / blocks / p.batch + first_chunk;
    at.begin = at.chunk * p.chunk;
    at.end = min(p.length, at.begin + p.chunk);
    const i64 per_group = p.d_inner / p.n_groups, in_group = at.block % p.blocks_of_group * block_channels;
    at.group = at.block / p.blocks_of_group;
    at.channel = at.group * per_group + in_group;
    at.padded = at.group * (p.channels / p.n_groups) + in_group;
    at.count = int(min(i64(block_channels), per_group - in_group));
    return at;
}

// Where a packed sequence starts. The first one starts at 0 and the last one ends at the length, whatever the offsets
// say; they rise (the host has seen to that) and may lie anywhere.
DEVICE i64 start_of_sequence(const Parameters& p, i64 sequence) {
    if (sequence == 0) return 0;
    return sequence == p.n_sequences ? p.length : max(i64(0), min(p.offsets[sequence], p.length));
}

// Whether a state passes through a chunk: no sequence starts in it or, backwards, ends.
template <bool BACKWARD>
DEVICE bool passes_through(const Parameters& p, i64 chunk) {
    const i64 from = chunk * p.chunk - (BACKWARD ? 0 : 1), to = from + p.chunk;
    if (from < 0 || to >= p.length) return false;
    return !p.sequence_of || p.sequence_of[from] == p.sequence_of[to];
}

// The first element of a tensor's row at the start of the chunk, for the block's channels or for its group.
DEVICE const u8* start_of(const Rows& rows, const Place& at, int element_size, bool of_group) {
    const i64 index = at.row * rows.batch + at.begin * rows.length + (of_group ? at.group * rows.group : at.channel);
    return rows.data + index * element_size;
}

// The sequences that start or end inside a piece of neighbouring tokens.
struct Boundaries {
    u32 starts, ends;  // bit t: token t of the piece is the first, or the last, of its sequence
};

// For packed sequences: lane l gets the sequence of token first - 1 + l, or -1 where there is none.
DEVICE int sequences_around(const Parameters& p, i64 first, int tokens, int lane) {
    const i64 t = first - 1 + lane;
    return p.sequence_of && lane <= tokens + 1 && t >= 0 && t < p.length ? p.sequence_of[t] : -1;
}
// Where each row is one sequence, `start` and `end` are its first and last token, counted from the piece's first one.
DEVICE Boundaries boundaries_of(bool is_packed, int sequences, int valid, int tokens, int start, int end, int lane) {
    Boundaries found;
    if (is_packed) {
        const int next = shuffle(sequences, lane + 1);
        const u32 changes = ballot(lane <= tokens && sequences != next);
        const u32 inside = valid >= tokens ? (1u << tokens) - 1 : valid <= 0 ? 0u : (1u << valid) - 1;
        found.starts = changes & inside, found.ends = changes >> 1 & inside;
    } else {
        found.starts = start == 0;
        found.ends = u32(end) < u32(tokens) ? 1u << end : 0u;
    }
    return found;
}
// The sequence of token t of the piece.
DEVICE i64 sequence_at(const Parameters& p, const Place& at, int sequences, int t) {
    return p.sequence_of ? i64(shuffle(sequences, t + 1)) : at.row;
}
