// What a kernel of the step of a whole model is given.
//
// Activations are float32 rows whose stride is a multiple of 8, with zeros after the last number. So are the columns of
// matrices; `n_in` counts the zeros, `size` does not.
#pragma once

#include "device.cuh"

// What changes from step to step. `embed` writes it, the kernels in a graph read it. States of all layers are
// contiguous: conv (n_layers, rows, taps - 1, d_inner) and ssm (n_layers, rows, d_inner, d_state).
struct Step {
    i64 rows;
    const float* conv;
    const float* ssm;
    float* new_conv;  // may be the memory of the old states
    float* new_ssm;
    float* logits;  // (rows, n_out of the head)
};

// A tensor (rows, ...) of activations: the stride is in elements.
struct Rows {
    u8* data;
    i64 stride, dtype;
};

// All fields have 8 bytes; the order is that of call.TENSORS and call.FIELDS.
struct Parameters {
    Rows x, u, z, y, projected, B, C, delta;
    u8* step;
    i64 layer, bucket;  // rows that the buffers have; a step may have fewer
    // embed
    const u8* ids;
    i64 ids_are_long;
    const u8* table;
    i64 table_dtype, n_ids;
    i64 rows;
    u8 *conv, *ssm, *new_conv, *new_ssm, *logits;
    // products
    const u8* weight;
    const u8* bias;  // float32, as all vectors
    i64 n_in, size, n_out, ways, target;
    i64 has_norm, subtract_mean;
    const u8* norm_weight;
    const u8* norm_bias;
    double eps;
    // convolution
    const u8* conv_weight;  // (taps, d_inner)
    const u8* conv_bias;
    i64 taps, d_inner;
    // recurrence
    const u8* A;  // (d_inner, d_state)
    const u8* D;
    const u8* delta_bias;
    const u8* constant_B;  // (d_inner, d_state), or null where the input gives B
    const u8* constant_C;
    i64 d_state, dt_rank, inner_norms;
    const u8* dt_norm;
    const u8* B_norm;
    const u8* C_norm;
    i64 row_bytes, x_stride;  // of weights in blocks; see products.cuh
};

constexpr int MOST_TAPS = 8;

DEVICE Step step_of(const Parameters& p) { return *reinterpret_cast<const Step*>(p.step); }

// The record in a kernel that starts early, past the multiprocessor's cache. One thread of a block reads it: thousands
// of warps would queue for one line. All threads of the block call it.
DEVICE Step shared_step(const Parameters& p, u8* shared) {
    if (threadIdx.x < sizeof(Step) / 16) {
        const float4 part = read_fresh(reinterpret_cast<const float*>(p.step) + 4 * threadIdx.x);
        reinterpret_cast<float4*>(shared)[threadIdx.x] = part;
    }
    sync_block();
    return *reinterpret_cast<const Step*>(shared);
}

DEVICE float* floats(u8* data) { return reinterpret_cast<float*>(data); }
DEVICE const float* floats(const u8* data) { return reinterpret_cast<const float*>(data); }

DEVICE float silu(float x) { return x * sigmoid_fast(x); }

// How many inputs of the convolution before this token are kept; TAPS is defined where it is known.
DEVICE int inputs_before(const Parameters& p) {
#ifdef TAPS
    return TAPS - 1;
#else
    return int(p.taps) - 1;
#endif
}

// These inputs, oldest first.
typedef float Inputs[MOST_TAPS - 1];

DEVICE i64 place_of_inputs(const Parameters& p, const Step& step, i64 row, int channel) {
    return (p.layer * step.rows + row) * inputs_before(p) * p.d_inner + channel;
}

DEVICE void read_inputs(Inputs& old, const Parameters& p, const Step& step, i64 row, int channel) {
    const int before = inputs_before(p), channels = int(p.d_inner);
    const float* from = step.conv + place_of_inputs(p, step, row, channel);
#pragma unroll
    for (int j = 0; j < MOST_TAPS - 1; j++) old[j] = j < before ? read_one_fresh(from + j * channels) : 0.f;
}

// silu of the convolution of `old` and x by a channel's weights, of which `last` is that of x.
DEVICE float convolved(const Inputs& old, float x, const Inputs& weights, float last, float bias, int before) {
    float sum = fmaf(last, x, bias);
#pragma unroll
    for (int j = 0; j < MOST_TAPS - 1; j++)
        if (j < before) sum = fmaf(weights[j], old[j], sum);
    return silu(sum);
}

// The same for a channel of a row; writes the inputs that the next token needs.
DEVICE float convolve(const Inputs& old, float x, const Parameters& p, const Step& step, i64 row, int channel) {
    const int before = inputs_before(p), channels = int(p.d_inner);
    const float* from = floats(p.conv_weight) + channel;
    float* to = step.new_conv + place_of_inputs(p, step, row, channel);
    Inputs weights;
#pragma unroll
    for (int j = 0; j < MOST_TAPS - 1; j++) weights[j] = j < before ? from[j * channels] : 0.f;
#pragma unroll
    for (int j = 0; j < MOST_TAPS - 1; j++)
        if (j < before) to[j * channels] = j + 1 < before ? old[j + 1 < MOST_TAPS - 1 ? j + 1 : j] : x;
    const float bias = p.conv_bias ? floats(p.conv_bias)[channel] : 0.f;
    return convolved(old, x, weights, from[before * channels], bias, before);
}
