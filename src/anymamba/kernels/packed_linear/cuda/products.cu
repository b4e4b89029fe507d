// Products of a few rows with a weight in GGUF's blocks, and the weight in floats.
//
//     y[row, output] = sum_c x[row, c] weight[output, c] + bias[output]
//
// The bytes of the weight are read once: one row and 8 rows take about the same time. A block of threads has x in
// shared memory, in bfloat16, and goes through tiles of 16 outputs. Its warps share the columns of a tile, a chunk at a
// time, which they copy into shared memory of their own as it lies, STAGES - 1 ahead. Tensor cores multiply 16 outputs
// by 8 rows in the integers of 16 or 32 columns; scales are applied to these sums in float32. At the end the warps' sums
// are added in their order: a row has the same bits alone and in any batch that this kernel serves.
//
// Launch: any number of blocks of up to 16 warps, early.
//
// Needs FORMAT.
#include "blocks.cuh"

typedef Blocks<FORMAT> B;

constexpr int OUTPUTS = 16, MOST_THREADS = 512, STAGES = 2, GROUP = 32, OF_BLOCK = B::COLUMNS / GROUP;
constexpr int GROUPS = B::COLUMNS == 32 && B::BYTES > 32 ? 4 : 8;  // of a chunk
constexpr int CHUNK = GROUPS / OF_BLOCK * B::BYTES;                // its bytes in a row
constexpr int PIECES = (CHUNK + 14 + 15) / 16;                     // of 16 bytes; a chunk begins at any even address
constexpr int STRIDE = (PIECES | 1) * 16;                          // of rows in shared memory; odd: no bank conflicts
constexpr int STAGE = OUTPUTS * STRIDE;
constexpr int BLOCKS = B::HAS_MINIMUM ? 1 : 2;  // of a multiprocessor, by their registers

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
    i64 x_stride;  // bytes of a row of x in shared memory
};

// What a thread works on: its place in a warp, as tensor cores have it, and the sizes of the matrix.
struct Place {
    int lane, warp, n_warps, row, t;
    int n_tiles, n_chunks, rounds;  // all warps go through a tile in so many rounds
};
DEVICE Place place_of_thread(const Parameters& p) {
    const int lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
    const int n_chunks = (int(p.n_in) / GROUP + GROUPS - 1) / GROUPS;
    return {lane, int(threadIdx.x) / 32, n_warps, lane / 4, lane % 4, int((p.n_out + OUTPUTS - 1) / OUTPUTS), n_chunks,
            (n_chunks + n_warps - 1) / n_warps};
}

// ------------------------------------------------------------------------------------------------ copies

// The two rows of a tile that a thread works on. Rows after the last are the last one again.
struct Outputs {
    const u8* rows[2];

    DEVICE Outputs(const Parameters& p, const Place& at, int tile) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            rows[i] = p.weight + min(i64(tile) * OUTPUTS + at.row + 8 * i, p.n_out - 1) * p.row_bytes;
    }
    // Of a chunk in shared memory, where pieces lie as at multiples of 16 bytes.
    DEVICE int offset(int i, int chunk) const { return int(reinterpret_cast<u64>(rows[i]) + chunk * CHUNK) & 15; }
};

// One row of a chunk into shared memory, by four threads. At the end of the weight a piece may have fewer bytes.
DEVICE void copy_row(u8* to, const u8* chunk, int offset, int size, const u8* end, int t) {
    const u8* from = chunk - offset + 16 * t;
    to += 16 * t;
    const bool whole = chunk + 16 * PIECES <= end;
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

    DEVICE Ahead(const Parameters& p, const Place& at) : tile(int(blockIdx.x)), round(0), outputs(p, at, tile) {}
    DEVICE void copy(u8* stage, const Parameters& p, const Place& at) {
        const int chunk = round * at.n_warps + at.warp, size = min(CHUNK, int(p.row_bytes) - chunk * CHUNK);
        if (tile < at.n_tiles && chunk < at.n_chunks) {
            const u8* end = p.weight + p.n_out * p.row_bytes;
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

// x in bfloat16 to shared memory, in the order in which threads take columns.
template <int TYPE>
DEVICE void get_rows(u8* shared, const Parameters& p) {
    const u32 eights = u32(p.n_in) / 8, n = u32(p.rows) * eights;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) {
        const u32 row = i / eights, column = i % eights * 8;
        uint2 fours[2];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const i64 from = row * p.x.stride + column + 4 * k;
            if constexpr (TYPE == FLOAT32) {
                const float4 v = read_ahead(reinterpret_cast<const float4*>(p.x.data + 4 * from));
                fours[k] = make_uint2(floats_as_bfloats(v.x, v.y), floats_as_bfloats(v.z, v.w));
            } else {
                fours[k] = read_ahead(reinterpret_cast<const uint2*>(p.x.data + 2 * from));
            }
        }
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const u32 four = column / 4 + k, place = B::TOGETHER == 8 ? four % 8 : four % 4 * 2 + four / 4 % 2;
            *reinterpret_cast<uint2*>(shared + row * p.x_stride + column / GROUP * 64 + place * 8) = fours[k];
        }
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

template <int TILES>
DEVICE void add_chunk(float (&sums)[TILES][4], const u8* stage, const u8* rows, const Parameters& p, const Place& at,
                      const Outputs& outputs, int chunk) {
    const int groups = min(GROUPS, int(p.n_in) / GROUP - chunk * GROUPS), own = at.t * B::TOGETHER;
    const u8* from = stage + at.row * STRIDE;
    const InShared upper(from + outputs.offset(0, chunk), own);
    const InShared lower(from + 8 * STRIDE + outputs.offset(1, chunk), own);
    const u8* x[TILES];  // rows after the last are any row: what they give is not used
#pragma unroll
    for (int i = 0; i < TILES; i++)
        x[i] = rows + min(8 * i + at.row, int(p.rows) - 1) * p.x_stride + chunk * GROUPS * 64 + at.t * 16;
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
        if (k >= groups) break;
        const Group above = B::get(upper, k / OF_BLOCK * B::BYTES, k % OF_BLOCK);
        const Group below = B::get(lower, k / OF_BLOCK * B::BYTES, k % OF_BLOCK);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const float4 v = *reinterpret_cast<const float4*>(x[i] + 64 * k);
            const u32 columns[2][2] = {{float_as_bits(v.x), float_as_bits(v.y)}, {float_as_bits(v.z), float_as_bits(v.w)}};
            add_products(sums[i], above, below, columns);
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
DEVICE void write_sums(const float (&sums)[TILES][4], float* shared, const Parameters& p, const Place& at, int tile) {
    constexpr int size = 8 * TILES * OUTPUTS;
    sync_block();  // those of the last tile have been read
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            shared[at.warp * size + (8 * i + 2 * at.t + j % 2) * OUTPUTS + at.row + j / 2 * 8] = sums[i][j];
    sync_block();
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        const i64 row = i / OUTPUTS, output = i64(tile) * OUTPUTS + i % OUTPUTS;
        if (row >= p.rows || output >= p.n_out) continue;
        float sum = p.bias ? p.bias[output] : 0.f;
        for (int w = 0; w < at.n_warps; w++) sum += shared[w * size + i];
        put<TYPE>(p.y.data, row * p.y.stride + output, sum);
    }
}

template <int TILES, int TYPE>
DEVICE void multiply(const Parameters& p) {
    const Place at = place_of_thread(p);
    u8* rows = shared_memory();
    float* shared_sums = reinterpret_cast<float*>(rows + p.rows * p.x_stride);
    u8* stages = reinterpret_cast<u8*>(shared_sums + at.n_warps * 8 * TILES * OUTPUTS) + at.warp * STAGES * STAGE;
    Ahead next(p, at);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) next.copy(stages + s * STAGE, p, at);
    wait_for_previous();  // it writes x; the weight is there
    let_next_start();
    get_rows<TYPE>(rows, p);
    sync_block();
    int stage = 0;
    for (int tile = blockIdx.x; tile < at.n_tiles; tile += gridDim.x) {
        const Outputs outputs(p, at, tile);
        float sums[TILES][4] = {};
        for (int round = 0; round < at.rounds; round++) {
            next.copy(stages + (stage == 0 ? STAGES - 1 : stage - 1) * STAGE, p, at);
            wait_for_copies<STAGES - 1>();
            sync_warp();
            const int chunk = round * at.n_warps + at.warp;
            if (chunk < at.n_chunks) add_chunk<TILES>(sums, stages + stage * STAGE, rows, p, at, outputs, chunk);
            sync_warp();  // the next round copies to here
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        write_sums<TILES, TYPE>(sums, shared_sums, p, at, tile);
    }
}

KERNEL(MOST_THREADS, BLOCKS) multiply_8(PARAMETER Parameters p) { multiply<1, FLOAT32>(p); }
KERNEL(MOST_THREADS, 1) multiply_16(PARAMETER Parameters p) { multiply<2, FLOAT32>(p); }
KERNEL(MOST_THREADS, BLOCKS) multiply_8_short(PARAMETER Parameters p) { multiply<1, BFLOAT16>(p); }
KERNEL(MOST_THREADS, 1) multiply_16_short(PARAMETER Parameters p) { multiply<2, BFLOAT16>(p); }

// ------------------------------------------------------------------------------------------------ weights

// The weight as floats, into y: a thread for eight columns. Launch: blocks of 256 threads.
KERNEL(256, 1) unpack(PARAMETER Parameters p) {
    const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x, groups = p.n_in / GROUP;
    const int t = int(index % 4);
    const i64 group = index / 4 % groups, row = index / 4 / groups;
    if (row >= p.n_out) return;
    const InGlobal in = {p.weight + row * p.row_bytes + group / OF_BLOCK * B::BYTES, t * B::TOGETHER};
    const Group found = B::get(in, 0, int(group % OF_BLOCK));
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float values[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 pair = found.integers[half][i / 2];
            values[i] = found.scale[half] * bits_as_float(i % 2 ? pair & 0xffff0000u : pair << 16) - found.minimum;
        }
        const int column = B::TOGETHER == 8 ? 8 * t + 4 * half : 4 * t + 16 * half;
        const i64 at = row * p.y.stride + group * GROUP + column;
        if (p.y.dtype == FLOAT32) {
            write<FLOAT32>(reinterpret_cast<float*>(p.y.data) + at, values);
        } else {
            write<BFLOAT16>(reinterpret_cast<u16*>(p.y.data) + at, values);
        }
    }
}
