// What a kernel of the norm of a sum is given.
#pragma once

#include "device.cuh"
#include "parts.cuh"

// A tensor (rows, size): the stride in elements, that of the last dimension is 1.
struct Rows {
    u8* data;
    i64 stride, dtype;
};

// All fields have 8 bytes; the order is that of call.TENSORS and call.FIELDS.
struct Parameters {
    Rows x, residual, total, y, dy, dtotal, dx, dresidual;
    const u8* weight;
    i64 weight_dtype;
    const u8* bias;
    i64 bias_dtype;
    u8* statistics;  // (rows) of 1 / sqrt(variance + eps), then (rows) of means, of the working type
    u8* parts;       // of the gradients of weight and bias, (n_parts, 2, size)
    u8* dweight;
    i64 dweight_dtype;
    u8* dbias;
    i64 dbias_dtype;
    i64 rows, size;
    double eps;
    i64 total_dtype, subtract_mean;
    i64 warps;  // of a row, a power of two
    i64 n_parts;
    i64 rows_of_part;  // in general.cu
};

// The gradients of weight and bias: blocks of 32 columns, first those of the weight.
template <typename R>
DEVICE void sum_parts_of_block(const Parameters& p) {
    const i64 blocks = (p.size + 31) / 32, row = i64(blockIdx.x) / blocks;
    const i64 column = i64(blockIdx.x) % blocks * 32 + threadIdx.x % 32;
    const R* first = reinterpret_cast<const R*>(p.parts) + row * p.size + column;
    const R sum = sum_of_parts<R>(first, 2 * p.size, p.n_parts, column < p.size);
    if (threadIdx.x >= 32 || column >= p.size) return;
    u8* to = row ? p.dbias : p.dweight;
    if (to) write_as<R>(to, column, int(row ? p.dbias_dtype : p.dweight_dtype), sum);
}
