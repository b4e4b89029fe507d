// Outer products within heads of D channels, and their sums against a vector.
//
//     made[i, j] = x_i y_j
//     rows[i] = sum over j of products[i, j] y_j
//     columns[j] = sum over i of x_i products[i, j]
//
// for every row of the batch, time and head. x, y, rows and columns are (batch, length, heads, D), products and made
// (heads, length, batch, D, D): the order of the convolution that comes between. What is not given is not computed.
//
// Four lanes have the D * D numbers of a head at a time: lane t rows t and t + 4, 16 bytes each. The eight groups of a
// warp have four neighbouring heads of two rows of the batch, so that sectors of 32 bytes are whole on both sides. More
// warps at a time are slower: they read and write further apart.
#include "device.cuh"

constexpr int THREADS = 256, D = 8, LANES = 4, WARPS = THREADS / 32;
constexpr int HEADS = 4, ROWS = 2;  // of a warp

struct Vectors {  // (batch, length, heads, D); the last dimension is dense, and everything is aligned to 16 bytes
    const u16* data;
    i64 row, time, head, dtype;
};
// All fields have 8 bytes; the order is that of cuda.TENSORS and cuda.FIELDS.
struct Parameters {
    Vectors x, y;
    const u16* products;
    u16 *made, *rows, *columns;  // dense
    i64 batch, length, heads;
};

struct Place {
    i64 head, row, time;
    bool exists;

    // Warps go through rows, then heads, then times.
    DEVICE Place(const Parameters& p, i64 index, int group) {
        const u32 down = u32(p.batch + ROWS - 1) / ROWS, across = u32(p.heads + HEADS - 1) / HEADS;
        const u32 rest = u32(index) / down;
        row = u32(index) % down * ROWS + group / HEADS, head = rest % across * HEADS + group % HEADS;
        time = rest / across;
        exists = row < p.batch && head < p.heads && time < p.length;
    }
    DEVICE i64 in(const Vectors& v) const { return row * v.row + time * v.time + head * v.head; }
    DEVICE i64 of_vector(const Parameters& p) const { return ((row * p.length + time) * p.heads + head) * D; }
    DEVICE i64 of_products(const Parameters& p) const { return ((head * p.length + time) * p.batch + row) * (D * D); }
};

// What a lane has of a place: two rows of the products, their factors, and y.
struct Numbers {
    float x[2][1], y[D], products[2][D];

    DEVICE void load(const Parameters& p, const Place& at, int lane) {
        const bool of_rows = at.exists && p.products;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            x[half][0] = 0.f;
            if (at.exists && p.x.data) read<DTYPE>(x[half], p.x.data + at.in(p.x) + lane + 4 * half);
#pragma unroll
            for (int j = 0; j < D; j++) products[half][j] = 0.f;
            if (of_rows) read<DTYPE>(products[half], p.products + at.of_products(p) + (lane + 4 * half) * D);
        }
#pragma unroll
        for (int j = 0; j < D; j++) y[j] = 0.f;
        if (at.exists && p.y.data) read<DTYPE>(y, p.y.data + at.in(p.y));
    }
    DEVICE void write_products(u16* to, int lane) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float row[D];
#pragma unroll
            for (int j = 0; j < D; j++) row[j] = x[half][0] * y[j];
            write<DTYPE>(to + (lane + 4 * half) * D, row);
        }
    }
    // A word of the sums of rows 2t and 2t + 1, from the lanes that have them.
    DEVICE u32 sums_of_rows(int lane) const {
        float sums[2] = {0.f, 0.f};
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int j = 0; j < D; j++) sums[half] = fmaf(products[half][j], y[j], sums[half]);
        const u32 own = as_word<DTYPE>(sums[0], sums[1]);
        const int first = threadIdx.x % 32 / LANES * LANES + 2 * lane % LANES;
        const u32 even = shuffle(own, first), odd = shuffle(own, first + 1);
        return permute_bytes(even, odd, lane < 2 ? 0x5410 : 0x7632);
    }
    // A word of the sums of columns 2t and 2t + 1: lanes that are two apart exchange halves, then neighbours quarters.
    DEVICE u32 sums_of_columns(int lane) const {
        float own[D], half[4], two[2];
#pragma unroll
        for (int j = 0; j < D; j++) own[j] = fmaf(x[0][0], products[0][j], x[1][0] * products[1][j]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float other = shuffle_xor(lane < 2 ? own[4 + j] : own[j], 2);
            half[j] = (lane < 2 ? own[j] : own[4 + j]) + other;
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float other = shuffle_xor(lane % 2 ? half[j] : half[2 + j], 1);
            two[j] = (lane % 2 ? half[2 + j] : half[j]) + other;
        }
        return as_word<DTYPE>(two[0], two[1]);
    }
};

KERNEL(THREADS, 4) combine(PARAMETER Parameters p) {
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % LANES, group = threadIdx.x % 32 / LANES;
    const Place at(p, i64(blockIdx.x) * WARPS + threadIdx.x / 32, group);
    Numbers numbers;
    numbers.load(p, at, lane);
    if (p.made && at.exists) numbers.write_products(p.made + at.of_products(p), lane);
    if (p.rows) {
        const u32 word = numbers.sums_of_rows(lane);
        if (at.exists) reinterpret_cast<u32*>(p.rows + at.of_vector(p))[lane] = word;
    }
    if (p.columns) {
        const u32 word = numbers.sums_of_columns(lane);
        if (at.exists) reinterpret_cast<u32*>(p.columns + at.of_vector(p))[lane] = word;
    }
}
