// Products of a few rows with a weight in GGUF's blocks, and the weight in floats.
//
//     y[row, output] = sum_c x[row, c] weight[output, c] + bias[output]
//
// The bytes of the weight are read once: one row and 32 rows take about the same time. A block of threads has 16 outputs;
// its warps share the columns, a chunk at a time, which they copy into shared memory of their own as it lies, STAGES
// ahead. x is rounded to bfloat16. Tensor cores multiply 16 outputs by 8 rows in the integers of 16 or 32 columns; scales
// are applied to these sums in float32. At the end the warps' sums are added in their order: a row has the same bits
// alone and in any batch that this kernel serves.
//
// Launch: (n_out + 15) / 16 blocks of up to 16 warps, early.
//
// Needs FORMAT.
#include "blocks.cuh"

typedef Blocks<FORMAT> B;

constexpr int OUTPUTS = 16, MOST_WARPS = 16, STAGES = 3, GROUP = 32;
constexpr int GROUPS = B::COLUMNS == 32 && B::BYTES > 32 ? 4 : 8;  // of a chunk
constexpr int CHUNK = GROUPS * GROUP / B::COLUMNS * B::BYTES;      // its bytes in a row
constexpr int PIECES = (CHUNK + 14 + 15) / 16;                     // of 16 bytes; a chunk begins at any even address
constexpr int STRIDE = (PIECES | 1) * 16;                          // of rows in shared memory; odd: no bank conflicts
constexpr int STAGE = OUTPUTS * STRIDE;

// All fields have 8 bytes; the order is that of cuda.TENSORS and cuda.FIELDS.
struct Matrix {
    u8* data;
    i64 stride, dtype;
};
struct Parameters {
    Matrix x, y;  // (rows, n_in), (rows, n_out); for `unpack` y is (n_out, n_in)
    const u8* weight;
    const float* bias;
    i64 rows, n_in, n_out, row_bytes;
};

// ------------------------------------------------------------------------------------------------ copies

// One chunk of 16 rows into shared memory. A piece at the end of the weight may have fewer than 16 bytes.
DEVICE void copy_chunk(u8* stage, const Parameters& p, i64 first, int chunk, int lane) {
    const i64 start = i64(chunk) * CHUNK, size = min(i64(CHUNK), p.row_bytes - start);
    const u8* end = p.weight + p.n_out * p.row_bytes;
    for (int i = lane; i < OUTPUTS * PIECES; i += 32) {
        const int row = i / PIECES, piece = i % PIECES;
        const u8* from = p.weight + min(first + row, p.n_out - 1) * p.row_bytes + start;
        const int offset = int(reinterpret_cast<u64>(from) & 15);
        if (16 * piece >= offset + size) continue;
        from += 16 * piece - offset;
        u8* to = stage + row * STRIDE + 16 * piece;
        if (from + 16 <= end) {
            copy_16_bytes(to, from);
        } else {
            for (int k = 0; from + k < end; k += 2)
                *reinterpret_cast<u16*>(to + k) = *reinterpret_cast<const u16*>(from + k);
        }
    }
}

// Where a row of a chunk begins in shared memory.
DEVICE const u8* row_of_stage(const u8* stage, const Parameters& p, i64 first, int row, int chunk) {
    const u8* from = p.weight + min(first + row, p.n_out - 1) * p.row_bytes + i64(chunk) * CHUNK;
    return stage + row * STRIDE + (reinterpret_cast<u64>(from) & 15);
}

// ------------------------------------------------------------------------------------------------ products

// Four neighbouring columns of a row of x, in bfloat16.
template <int TYPE>
DEVICE void get_columns(u32 (&out)[2], const Parameters& p, i64 row, i64 column) {
    out[0] = out[1] = 0;
    if (row >= p.rows) return;
    if constexpr (TYPE == BFLOAT16) {
        const uint2 v = read_ahead(reinterpret_cast<const uint2*>(p.x.data + 2 * (row * p.x.stride + column)));
        out[0] = v.x, out[1] = v.y;
    } else {
        const float4 v = read_ahead(reinterpret_cast<const float4*>(p.x.data + 4 * (row * p.x.stride + column)));
        out[0] = floats_as_bfloats(v.x, v.y), out[1] = floats_as_bfloats(v.z, v.w);
    }
}

// sums += the products of a group: those of outputs `lane / 4` and that + 8 with rows 2t and 2t + 1 of a tile.
DEVICE void add_products(float (&sums)[4], const Group& upper, const Group& lower, const u32 (&x)[2][2]) {
    float products[2][4] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const u32 weights[4] = {upper.integers[half][0], lower.integers[half][0], upper.integers[half][1],
                                lower.integers[half][1]};
        multiply_tiles(products[B::TWO_SCALES ? half : 0], weights, x[half]);
    }
#pragma unroll
    for (int half = 0; half < (B::TWO_SCALES ? 2 : 1); half++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            sums[i] = fmaf((i < 2 ? upper : lower).scale[half], products[half][i], sums[i]);
    if constexpr (B::HAS_MINIMUM) {
        const u32 ones[4] = {ONES, ONES, ONES, ONES};
        float totals[4] = {};
        multiply_tiles(totals, ones, x[0]);
        multiply_tiles(totals, ones, x[1]);
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] = fmaf(-(i < 2 ? upper : lower).minimum, totals[i], sums[i]);
    }
}

template <int TILES, int TYPE>
DEVICE void add_chunk(float (&sums)[TILES][4], const u8* stage, const Parameters& p, i64 first, int chunk, int lane) {
    const int t = lane % 4, row = lane / 4, groups = int(min(i64(GROUPS), p.n_in / GROUP - i64(chunk) * GROUPS));
    const u8* upper_row = row_of_stage(stage, p, first, row, chunk);
    const u8* lower_row = row_of_stage(stage, p, first, row + 8, chunk);
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
        if (k >= groups) break;
        const i64 column = (i64(chunk) * GROUPS + k) * GROUP + 4 * t;
        constexpr int OF_BLOCK = B::COLUMNS / GROUP;
        const int at = k / OF_BLOCK * B::BYTES;
        const Group upper = B::get(upper_row + at, k % OF_BLOCK, t), lower = B::get(lower_row + at, k % OF_BLOCK, t);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            u32 x[2][2];
            get_columns<TYPE>(x[0], p, 8 * tile + row, column);
            get_columns<TYPE>(x[1], p, 8 * tile + row, column + 16);
            add_products(sums[tile], upper, lower, x);
        }
    }
}

template <int TYPE>
DEVICE void put(u8* data, i64 index, float value) {
    if constexpr (TYPE == FLOAT32) {
        reinterpret_cast<float*>(data)[index] = value;
    } else {
        reinterpret_cast<u16*>(data)[index] = u16(floats_as_bfloats(value, 0.f));
    }
}

// The sums of all warps, in their order, to y.
template <int TILES, int TYPE>
DEVICE void write_sums(const float (&sums)[TILES][4], const Parameters& p, i64 first, int lane) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    const int warp = threadIdx.x / 32, n_warps = blockDim.x / 32, size = 8 * TILES * OUTPUTS;
    sync_block();  // all chunks have been used
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = 8 * tile + 2 * (lane % 4) + i % 2, output = lane / 4 + i / 2 * 8;
            shared[warp * size + row * OUTPUTS + output] = sums[tile][i];
        }
    sync_block();
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        const i64 row = i / OUTPUTS, output = first + i % OUTPUTS;
        if (row >= p.rows || output >= p.n_out) continue;
        float sum = p.bias ? p.bias[output] : 0.f;
        for (int w = 0; w < n_warps; w++) sum += shared[w * size + i];
        put<TYPE>(p.y.data, row * p.y.stride + output, sum);
    }
}

template <int TILES, int TYPE>
DEVICE void multiply(const Parameters& p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    const i64 first = i64(blockIdx.x) * OUTPUTS;
    const int n_chunks = int((p.n_in / GROUP + GROUPS - 1) / GROUPS);
    u8* stages = shared_memory() + warp * STAGES * STAGE;
    float sums[TILES][4] = {};
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (warp + s * n_warps < n_chunks) copy_chunk(stages + s * STAGE, p, first, warp + s * n_warps, lane);
        end_of_copies();
    }
    wait_for_previous();  // it writes x; the weight is there
    let_next_start();
    int stage = 0;
    for (int chunk = warp; chunk < n_chunks; chunk += n_warps) {
        const int next = chunk + (STAGES - 1) * n_warps, place = stage == 0 ? STAGES - 1 : stage - 1;
        if (next < n_chunks) copy_chunk(stages + place * STAGE, p, first, next, lane);
        end_of_copies();
        wait_for_copies<STAGES - 1>();
        sync_warp();
        add_chunk<TILES, TYPE>(sums, stages + stage * STAGE, p, first, chunk, lane);
        sync_warp();  // the next round writes here
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    write_sums<TILES, TYPE>(sums, p, first, lane);
}

KERNEL(32 * MOST_WARPS, 1) multiply_8(PARAMETER Parameters p) { multiply<1, FLOAT32>(p); }
KERNEL(32 * MOST_WARPS, 1) multiply_16(PARAMETER Parameters p) { multiply<2, FLOAT32>(p); }
KERNEL(32 * MOST_WARPS, 1) multiply_32(PARAMETER Parameters p) { multiply<4, FLOAT32>(p); }
KERNEL(32 * MOST_WARPS, 1) multiply_8_short(PARAMETER Parameters p) { multiply<1, BFLOAT16>(p); }
KERNEL(32 * MOST_WARPS, 1) multiply_16_short(PARAMETER Parameters p) { multiply<2, BFLOAT16>(p); }
KERNEL(32 * MOST_WARPS, 1) multiply_32_short(PARAMETER Parameters p) { multiply<4, BFLOAT16>(p); }

// ------------------------------------------------------------------------------------------------ weights

// The weight as floats, into y: a thread for eight columns. Launch: blocks of 256 threads.
KERNEL(256, 1) unpack(PARAMETER Parameters p) {
    const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x, groups = p.n_in / GROUP;
    const int t = int(index % 4);
    const i64 group = index / 4 % groups, row = index / 4 / groups;
    if (row >= p.n_out) return;
    constexpr int OF_BLOCK = B::COLUMNS / GROUP;
    const u8* block = p.weight + row * p.row_bytes + group / OF_BLOCK * B::BYTES;
    const Group found = B::get(block, int(group % OF_BLOCK), t);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float values[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 pair = found.integers[half][i / 2];
            values[i] = found.scale[half] * bits_as_float(i % 2 ? pair & 0xffff0000u : pair << 16) - found.minimum;
        }
        const i64 at = row * p.y.stride + group * GROUP + 16 * half + 4 * t;
        if (p.y.dtype == FLOAT32) {
            write<FLOAT32>(reinterpret_cast<float*>(p.y.data) + at, values);
        } else {
            write<BFLOAT16>(reinterpret_cast<u16*>(p.y.data) + at, values);
        }
    }
}
