// The causal convolution with filters as long as the sequence, by products of 16-bit tiles on tensor cores.
//
//     y[t] = sum over s <= t of k[t - s] u[s]
//
// For each channel this is a Toeplitz matrix times (length, rows). The matrix is never made: a word of a tile of it is
// a pair of neighbouring terms of the filter, so that a warp that goes on by 16 inputs needs two new words of the
// filter for all its tiles. The gradient of the filter sums products of tiles of dy and u along their diagonals. Sums
// are in float32, in an order that depends on the sizes only.
//
// Between the kernels a tensor is ordered (width, padded_rows, padded_length), with zeros where it is padded. If
// BY_TIME, tensors come and go as (width, length, rows), and `order` makes lines only.
//
// Files: toeplitz_order.cu, toeplitz_multiply.cu, and toeplitz_correlate.cu for the gradient of the filters. The last
// two need BY_TIME, and ROW_TILES: 1 for up to 8 rows, or 2, also if BY_TIME.
#pragma once

#include "device.cuh"

struct Rows {  // a tensor (rows, length, width); the last dimension is dense
    u8* data;
    i64 row, token, dtype;
};
// All fields have 8 bytes; the order is that of products.TENSORS and products.FIELDS.
struct Parameters {
    Rows x;                // what `order` reads
    Rows y;                // what `multiply` writes
    const float* filters;  // (width, taps)
    u16* ordered;          // what `order` writes, or `multiply` reads
    const u16* inputs;     // u and the gradient of y, ordered, for `correlate`
    const u16* outputs;
    u32* lines;    // (width, 2, line): the filters in words, as `multiply` reads them
    float* parts;  // (n_parts, width, n_groups, ENTRIES): sums over some of the rows
    float* found;  // (width, taps): the gradient of the filters
    i64 rows, length, width, taps, padded_rows, padded_length, line;
    i64 order_blocks;  // those of `order` that order; the others make lines
    i64 n_tiles;       // of outputs, of `multiply`
    i64 n_groups, n_parts, rows_of_part;
    i64 adjoint;  // whether the matrix is transposed: for the gradient of the inputs
    i64 aligned;  // whether neighbouring channels can be read, or written, at once
    i64 near;     // whether blocks that read the same are neighbours, rather than those with most work first
    i64 first;    // if not 0, all pieces of work run at once, and so many are the first of their multiprocessors
};

constexpr int ORDER_THREADS = 256, LINE_START = 16;  // words of zeros before the filter's first

// Where a piece of 8 rows of a time is if BY_TIME: a time has the 32 bytes of 16 rows in shared memory, whose halves
// are exchanged at every other four times, since tensor cores take 8 of them at once.
DEVICE int piece_at_time(int time, int half) { return time * 32 + (half ^ time / 4 % 2) * 16; }

// The piece of work that comes at a place. Unless `near` that with most work comes first. If all run at once, the
// multiprocessor that has it gets the one with least work as its second.
DEVICE int work_at(const Parameters& p, int place, int count) {
    const int first = int(p.first);
    return first && place >= first ? count - 1 - (place - first) : place;
}
