// The sums of the columns of a matrix, in float32.
//
//     sums[c] = sum over r of x[r, c]
//
// A block has the rows of a part and p.across vectors of 16 bytes of each; a thread always the same vector. As many
// rows as the block has threads for are read at a time, so that narrow matrices leave few threads idle. A thread asks
// for AT_ONCE vectors before it adds any. Then its sums are added to those of the block's other rows, in a tree, and
// `sum_parts` adds the parts.
//
// Needs DTYPE.
#include "device.cuh"
#include "parts.cuh"

constexpr int THREADS = 256, AT_ONCE = 8;
constexpr int WIDTH = DTYPE == FLOAT32 ? 4 : 8;  // numbers of a vector
constexpr int AT_ONCE_APART = 2;                 // vectors, where their numbers are read one by one

typedef ElementOf<DTYPE>::Type Element;

struct Matrix {  // (rows, width); the last dimension is dense
    const Element* data;
    i64 row, dtype;
};
// All fields have 8 bytes; the order is that of cuda.TENSORS and cuda.FIELDS.
struct Parameters {
    Matrix x;
    float* parts;  // (n_parts, width), of whole vectors
    float* sums;   // (width)
    i64 rows, width, across, rows_of_part, n_parts;
    i64 aligned;  // whether all rows are vectors at multiples of 16 bytes
};

struct Place {
    i64 part, column;
    int row, step;  // of the part, and rows at a time
    bool exists;

    DEVICE explicit Place(const Parameters& p) {
        const int across = int(p.across);
        const i64 vectors = (p.width + WIDTH - 1) / WIDTH, groups = (vectors + across - 1) / across;
        const i64 vector = i64(blockIdx.x) % groups * across + int(threadIdx.x) % across;
        part = i64(blockIdx.x) / groups, column = vector * WIDTH;
        row = int(threadIdx.x) / across, step = THREADS / across;
        exists = row < step && vector < vectors;
    }
};

DEVICE void add(float (&sums)[WIDTH], const float (&more)[WIDTH]) {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) sums[i] += more[i];
}

// The sums of a thread's rows, `count` of them from `from` on, `stride` numbers apart.
DEVICE void add_vectors(float (&sums)[WIDTH], const Element* from, i64 stride, i64 count) {
    for (i64 first = 0; first < count; first += AT_ONCE) {
        const int left = int(min(count - first, i64(AT_ONCE)));
        uint4 words[AT_ONCE] = {};
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++, from += stride)
            if (k < left) words[k] = *reinterpret_cast<const uint4*>(from);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            float numbers[WIDTH];
            read<DTYPE>(numbers, reinterpret_cast<const Element*>(&words[k]));
            add(sums, numbers);
        }
    }
}

// The same of rows that lie anywhere, of which `inside` numbers exist.
DEVICE void add_numbers(float (&sums)[WIDTH], const Element* from, i64 stride, i64 count, i64 inside) {
    for (i64 first = 0; first < count; first += AT_ONCE_APART) {
        float numbers[AT_ONCE_APART][WIDTH];
#pragma unroll
        for (int k = 0; k < AT_ONCE_APART; k++, from += stride)
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                float one[1] = {0.f};
                if (first + k < count && i < inside) read<DTYPE>(one, from + i);
                numbers[k][i] = one[0];
            }
#pragma unroll
        for (int k = 0; k < AT_ONCE_APART; k++) add(sums, numbers[k]);
    }
}

// The sum over the block's rows, for the threads of row 0. All threads of the block call it; shared memory holds
// float[THREADS * WIDTH].
DEVICE void sum_over_rows(float (&sums)[WIDTH], const Place& at, int across) {
    float* own = reinterpret_cast<float*>(shared_memory()) + threadIdx.x * WIDTH;
    for (int n = at.step; n > 1;) {
        const int half = (n + 1) / 2;
        if (at.row >= half && at.row < n) write<FLOAT32>(own, sums);
        sync_block();
        if (at.row + half < n) {
            float more[WIDTH];
            read<FLOAT32>(more, own + half * across * WIDTH);
            add(sums, more);
        }
        n = half;
    }
}

KERNEL(THREADS, 4) sum_columns(PARAMETER Parameters p) {
    let_next_start();
    wait_for_previous();
    const Place at(p);
    const i64 first = at.part * p.rows_of_part + at.row, end = min(p.rows, (at.part + 1) * p.rows_of_part);
    float sums[WIDTH] = {};
    if (at.exists && first < end) {
        const Element* from = p.x.data + first * p.x.row + at.column;
        const i64 count = (end - first + at.step - 1) / at.step, stride = at.step * p.x.row;
        if (p.aligned)
            add_vectors(sums, from, stride, count);
        else
            add_numbers(sums, from, stride, count, p.width - at.column);
    }
    sum_over_rows(sums, at, int(p.across));
    const i64 width = (p.width + WIDTH - 1) / WIDTH * WIDTH;
    if (at.row == 0 && at.exists) write_whole<FLOAT32>(p.parts + at.part * width + at.column, sums);
}

KERNEL(32 * WAYS, 1) sum_parts(PARAMETER Parameters p) {
    wait_for_previous();
    const i64 column = i64(blockIdx.x) * 32 + threadIdx.x % 32, width = (p.width + WIDTH - 1) / WIDTH * WIDTH;
    const float sum = sum_of_parts<float>(p.parts + column, width, p.n_parts, column < p.width);
    if (threadIdx.x < 32 && column < p.width) p.sums[column] = sum;
}
