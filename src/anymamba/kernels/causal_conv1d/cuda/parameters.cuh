// What a kernel of the causal convolution is given, and which sequence a token belongs to.
#pragma once

#include "device.cuh"
#include "parts.cuh"

// A tensor (batch, length, channels), or the weight (channels, taps, 1): strides in elements, the last one is 1.
struct Rows {
    u8* data;
    i64 batch, length, dtype;
};

// All fields have 8 bytes; the order is that of call.TENSORS and call.FIELDS.
struct Parameters {
    Rows x, y, dy, dx, weight;
    const u8* bias;
    i64 bias_dtype;
    const u8* initial_state;  // (n_sequences, width - 1, d_inner), all states in the dtype of x
    u8* last_state;
    const u8* dlast_state;
    u8* dinitial_state;
    u8* slopes;  // gradients before the activation (batch, length, d_inner), of the working type
    u8* parts;   // of the weights' gradients, (n_parts, taps + 1, d_inner); the last row is the bias's
    u8* dweight;
    i64 dweight_dtype;
    u8* dbias;
    i64 dbias_dtype;
    const u8* offsets;  // (n_sequences + 1), or null where each row of the batch is one sequence
    i64 offsets_are_long;
    i64 batch, length, d_inner, width, n_sequences, silu;
    i64 piece;     // tokens of a warp, or of a part
    i64 n_groups;  // of pieces, a block's each, of a row
    i64 n_blocks;  // that have pieces; those after them write states
    i64 n_parts, taps;
    i64 aligned;  // four neighbouring channels of every tensor are so in memory
};

struct Sequence {
    i64 index, start, end;
};

// Where a sequence begins. The first begins at 0 and the last ends at the length, whatever the offsets say.
DEVICE i64 offset_at(const Parameters& p, i64 sequence) {
    if (sequence <= 0) return 0;
    if (sequence >= p.n_sequences) return p.length;
    const i64 found = p.offsets_are_long ? reinterpret_cast<const i64*>(p.offsets)[sequence]
                                         : i64(reinterpret_cast<const int*>(p.offsets)[sequence]);
    return max(i64(0), min(found, p.length));
}

// A sequence by its number; all its tokens lie in the row `row_of`.
DEVICE Sequence sequence_by(const Parameters& p, i64 index) {
    if (!p.offsets) return {index, 0, p.length};
    const i64 start = offset_at(p, index);
    return {index, start, max(start, offset_at(p, index + 1))};
}
DEVICE i64 row_of(const Parameters& p, const Sequence& s) { return p.offsets ? 0 : s.index; }

// The sequence of a token, found by each thread for itself.
DEVICE Sequence sequence_at(const Parameters& p, i64 row, i64 t) {
    if (!p.offsets) return {row, 0, p.length};
    i64 low = 0, high = p.n_sequences - 1;
    while (low < high) {
        const i64 middle = (low + high + 1) / 2;
        if (offset_at(p, middle) <= t) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return sequence_by(p, low);
}

// The index of a state of a sequence: `k` counts from the oldest of width - 1.
DEVICE i64 state_index(const Parameters& p, i64 sequence, i64 k, i64 channel) {
    return (sequence * (p.width - 1) + k) * p.d_inner + channel;
}

// One number of what the convolution sees at a place: a token of the sequence or, before it, its initial state.
template <typename R>
DEVICE R input_at(const Parameters& p, const Sequence& s, i64 t, i64 channel) {
    const int dtype = int(p.x.dtype);
    if (t >= s.start) return read_as<R>(p.x.data, row_of(p, s) * p.x.batch + t * p.x.length + channel, dtype);
    const i64 k = t - s.start + p.width - 1;
    return p.initial_state && k >= 0 ? read_as<R>(p.initial_state, state_index(p, s.index, k, channel), dtype) : R(0);
}
template <typename R>
DEVICE R weight_at(const Parameters& p, i64 channel, i64 tap) {
    return read_as<R>(p.weight.data, channel * p.weight.batch + tap * p.weight.length, int(p.weight.dtype));
}
template <typename R>
DEVICE R bias_at(const Parameters& p, i64 channel) {
    return p.bias ? read_as<R>(p.bias, channel, int(p.bias_dtype)) : R(0);
}

// The sum over taps at a token, before the activation.
template <typename R>
DEVICE R sum_of_taps(const Parameters& p, const Sequence& s, i64 t, i64 channel) {
    R sum = bias_at<R>(p, channel);
    for (i64 i = 0; i < p.width; i++)
        sum += weight_at<R>(p, channel, i) * input_at<R>(p, s, t - p.width + 1 + i, channel);
    return sum;
}

// The last width - 1 inputs of each sequence; `index` counts the elements of last_state.
DEVICE void put_last_state(const Parameters& p, i64 index) {
    if (index >= p.n_sequences * (p.width - 1) * p.d_inner) return;
    const i64 channel = index % p.d_inner, k = index / p.d_inner % (p.width - 1);
    const Sequence s = sequence_by(p, index / p.d_inner / (p.width - 1));
    const int dtype = int(p.x.dtype);
    const i64 t = s.end - p.width + 1 + k;
    if (dtype == FLOAT64) {
        write_as<double>(p.last_state, index, dtype, input_at<double>(p, s, t, channel));
    } else {
        write_as<float>(p.last_state, index, dtype, input_at<float>(p, s, t, channel));
    }
}

// What a gradient of the last state adds at a place of a sequence, which may lie before its first token.
template <typename R>
DEVICE R from_last_state(const Parameters& p, const Sequence& s, i64 t, i64 channel) {
    const i64 k = t - s.end + p.width - 1;
    const bool inside = p.dlast_state && k >= 0 && k < p.width - 1;
    return inside ? read_as<R>(p.dlast_state, state_index(p, s.index, k, channel), int(p.x.dtype)) : R(0);
}

// The gradients of weight and bias: blocks of 32 channels, one for each row of the parts.
template <typename R>
DEVICE void sum_parts_of_block(const Parameters& p) {
    const u32 blocks = u32((p.d_inner + 31) / 32);
    const i64 row = blockIdx.x / blocks, channel = i64(blockIdx.x % blocks) * 32 + threadIdx.x % 32;
    const R* first = reinterpret_cast<const R*>(p.parts) + row * p.d_inner + channel;
    const R sum = sum_of_parts<R>(first, (p.taps + 1) * p.d_inner, p.n_parts, channel < p.d_inner);
    if (threadIdx.x >= 32 || channel >= p.d_inner) return;
    const i64 tap = row - (p.taps - p.width);
    if (row == p.taps) {
        if (p.dbias) write_as<R>(p.dbias, channel, int(p.dbias_dtype), sum);
    } else if (tap >= 0) {
        write_as<R>(p.dweight, channel * p.width + tap, int(p.dweight_dtype), sum);
    }
}
