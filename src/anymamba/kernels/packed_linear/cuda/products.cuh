// The core of products of a few rows with a weight in GGUF's blocks:
//
//     sum[row, output] = sum_c x[row, c] weight[output, c]
//
// The bytes of the weight are read once: one row and 8 rows take about the same time. A block of threads has x in
// shared memory, in bfloat16, and goes through tiles of 16 outputs. Its warps share the columns of a tile, a chunk at a
// time, which they copy into shared memory of their own as it lies, STAGES - 1 ahead. Tensor cores multiply 16 outputs
// by 8 rows in the integers of 16 or 32 columns; scales are applied to these sums in float32. At the end the warps'
// sums are added in their order: a row has the same bits alone and in any batch that these kernels serve.
//
// Needs FORMAT, and ALIGNED: 1 if rows of the weight are multiples of 16 bytes, for formats with blocks of 32.
#pragma once

#include "blocks.cuh"

typedef Blocks<FORMAT> B;

constexpr int OUTPUTS = 16, MOST_THREADS = 512, STAGES = 2, GROUP = 32, OF_BLOCK = B::COLUMNS / GROUP;
constexpr int GROUPS = !ALIGNED && B::COLUMNS == 32 && B::BYTES > 32 ? 4 : 8;  // of a chunk
constexpr int CHUNK = GROUPS / OF_BLOCK * B::BYTES;                            // its bytes in a row
constexpr int PIECES = (CHUNK + (ALIGNED ? 0 : 14) + 15) / 16;  // of 16 bytes; a chunk may begin at any even address
constexpr int STRIDE = (PIECES | 1) * 16;                       // of rows in shared memory; odd: no bank conflicts
constexpr int STAGE = OUTPUTS * STRIDE;
constexpr int BLOCKS = B::HAS_MINIMUM ? 1 : 2;  // of a multiprocessor, by their registers

struct Weight {
    const u8* data;
    i64 row_bytes;
    int n_in, n_out;
    int rows, x_stride;  // of x in shared memory: bytes of a row
};

// What a thread works on: its place in a warp, as tensor cores have it, and the sizes of the matrix.
struct Place {
    int lane, warp, n_warps, row, t;
    int n_tiles, n_chunks, rounds;  // all warps go through a tile in so many rounds
};
DEVICE Place place_of_thread(const Weight& p) {
    const int lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
    const int n_chunks = (p.n_in / GROUP + GROUPS - 1) / GROUPS;
    return {lane,     int(threadIdx.x) / 32,
            n_warps,  lane / 4,
            lane % 4, (p.n_out + OUTPUTS - 1) / OUTPUTS,
            n_chunks, (n_chunks + n_warps - 1) / n_warps};
}

// ------------------------------------------------------------------------------------------------ copies

// The two rows of a tile that a thread works on. Rows after the last are the last one again.
struct Outputs {
    const u8* rows[2];

    DEVICE Outputs(const Weight& p, const Place& at, int tile) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            rows[i] = p.data + min(i64(tile) * OUTPUTS + at.row + 8 * i, i64(p.n_out - 1)) * p.row_bytes;
    }
    // Of a chunk in shared memory, where pieces lie as at multiples of 16 bytes.
    DEVICE int offset(int i, int chunk) const {
        return ALIGNED ? 0 : int(reinterpret_cast<u64>(rows[i]) + chunk * CHUNK) & 15;
    }
};

// One row of a chunk into shared memory, by four threads. At the end of the weight a piece may have fewer bytes.
DEVICE void copy_row(u8* to, const u8* chunk, int offset, int size, const u8* end, int t) {
    const u8* from = chunk - offset + 16 * t;
    to += 16 * t;
    const bool whole = ALIGNED || chunk + 16 * PIECES <= end;
#pragma unroll
    for (int at = 0; at < 16 * PIECES; at += 64) {
        if (at + 16 * t >= offset + size) break;
        if (whole || from + at + 16 <= end) {
            copy_16_bytes(to + at, from + at);
        } else {
            for (int k = at; from + k < end; k += 2)
                *reinterpret_cast<u16*>(to + k) = *reinterpret_cast<const u16*>(from + k);
        }
    }
}

// The chunk to copy next, of a warp.
struct Ahead {
    int tile, round;
    Outputs outputs;

    DEVICE Ahead(const Weight& p, const Place& at) : tile(int(blockIdx.x)), round(0), outputs(p, at, tile) {}
    DEVICE void copy(u8* stage, const Weight& p, const Place& at) {
        const int chunk = round * at.n_warps + at.warp, size = min(CHUNK, int(p.row_bytes) - chunk * CHUNK);
        if (tile < at.n_tiles && chunk < at.n_chunks) {
            const u8* end = p.data + p.n_out * p.row_bytes;
#pragma unroll
            for (int i = 0; i < 2; i++)
                copy_row(stage + (at.row + 8 * i) * STRIDE, outputs.rows[i] + chunk * CHUNK, outputs.offset(i, chunk),
                         size, end, at.t);
        }
        end_of_copies();
        if (++round < at.rounds) return;
        round = 0, tile += int(gridDim.x);
        outputs = Outputs(p, at, tile);
    }
};

// ------------------------------------------------------------------------------------------------ products

// Four columns of a row of x, in bfloat16, to shared memory, in the order in which threads take them.
DEVICE void put_four(u8* shared, const Weight& p, int row, int column, uint2 four) {
    const int index = column / 4, place = B::TOGETHER == 8 ? index % 8 : index % 4 * 2 + index / 4 % 2;
    *reinterpret_cast<uint2*>(shared + row * p.x_stride + column / GROUP * 64 + place * 8) = four;
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
        for (int i = 0; i < 4; i++) sums[i] = fmaf((i < 2 ? upper : lower).scale[half], products[half][i], sums[i]);
    if constexpr (B::HAS_MINIMUM) {
        const u32 ones[4] = {ONES, ONES, ONES, ONES};
        float totals[4] = {};
        multiply_tiles(totals, ones, x[0]);
        multiply_tiles(totals, ones, x[1]);
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] = fmaf(-(i < 2 ? upper : lower).minimum, totals[i], sums[i]);
    }
}

template <int TILES>
DEVICE void add_chunk(float (&sums)[TILES][4], const u8* stage, const u8* rows, const Weight& p, const Place& at,
                      const Outputs& outputs, int chunk) {
    typedef In<ALIGNED>::Shared InShared;
    const int groups = min(GROUPS, p.n_in / GROUP - chunk * GROUPS), own = at.t * B::TOGETHER;
    const u8* from = stage + at.row * STRIDE;
    const InShared upper(from + outputs.offset(0, chunk), own);
    const InShared lower(from + 8 * STRIDE + outputs.offset(1, chunk), own);
    const u8* x[TILES];  // rows after the last are any row: what they give is not used
#pragma unroll
    for (int i = 0; i < TILES; i++)
        x[i] = rows + min(8 * i + at.row, p.rows - 1) * p.x_stride + chunk * GROUPS * 64 + at.t * 16;
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
        if (k >= groups) break;
        const Group above = B::get(upper, k / OF_BLOCK * B::BYTES, k % OF_BLOCK);
        const Group below = B::get(lower, k / OF_BLOCK * B::BYTES, k % OF_BLOCK);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const float4 v = *reinterpret_cast<const float4*>(x[i] + 64 * k);
            const u32 columns[2][2] = {{float_as_bits(v.x), float_as_bits(v.y)},
                                       {float_as_bits(v.z), float_as_bits(v.w)}};
            add_products(sums[i], above, below, columns);
        }
    }
}

// The sums of all warps, in their order.
template <int TILES, class Around>
DEVICE void finish_sums(const float (&sums)[TILES][4], float* shared, const Weight& p, const Place& at, int tile,
                        Around& around) {
    constexpr int size = 8 * TILES * OUTPUTS;
    sync_block();  // those of the last tile have been read
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            shared[at.warp * size + (8 * i + 2 * at.t + j % 2) * OUTPUTS + at.row + j / 2 * 8] = sums[i][j];
    sync_block();
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        const int row = i / OUTPUTS, output = tile * OUTPUTS + i % OUTPUTS;
        if (row >= p.rows || output >= p.n_out) continue;
        float sum = 0.f;
        for (int w = 0; w < at.n_warps; w++) sum += shared[w * size + i];
        around.end(row, output, sum);
    }
}

// All products of a block. `around` is what comes before and after, in a kernel that is launched early:
//
//     start()                    before the previous kernel has ended
//     read(rows)                 x to shared memory, by put_four
//     begin(row, output)         before the products of a tile, by the thread that ends it
//     end(row, output, sum)
template <int TILES, class Around>
DEVICE void multiply(const Weight& p, u8* rows, Around& around) {
    const Place at = place_of_thread(p);
    float* shared_sums = reinterpret_cast<float*>(rows + p.rows * p.x_stride);
    u8* stages = reinterpret_cast<u8*>(shared_sums + at.n_warps * 8 * TILES * OUTPUTS) + at.warp * STAGES * STAGE;
    Ahead next(p, at);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) next.copy(stages + s * STAGE, p, at);
    around.start();
    let_next_start();
    wait_for_previous();  // it writes x; the weight is there
    around.read(rows);
    sync_block();
    int stage = 0;
    for (int tile = blockIdx.x; tile < at.n_tiles; tile += gridDim.x) {
        const Outputs outputs(p, at, tile);
        float sums[TILES][4] = {};
        for (int i = threadIdx.x; i < 8 * TILES * OUTPUTS; i += blockDim.x)
            around.begin(i / OUTPUTS, tile * OUTPUTS + i % OUTPUTS);
        for (int round = 0; round < at.rounds; round++) {
            next.copy(stages + (stage == 0 ? STAGES - 1 : stage - 1) * STAGE, p, at);
            wait_for_copies<STAGES - 1>();
            sync_warp();
            const int chunk = round * at.n_warps + at.warp;
            if (chunk < at.n_chunks) add_chunk<TILES>(sums, stages + stage * STAGE, rows, p, at, outputs, chunk);
            sync_warp();  // the next round copies to here
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        finish_sums<TILES>(sums, shared_sums, p, at, tile, around);
    }
}
