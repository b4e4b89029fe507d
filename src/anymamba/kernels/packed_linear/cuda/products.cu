// Products of a few rows with a weight in GGUF's blocks, and the weight in floats:
//
//     y[row, output] = sum_c x[row, c] weight[output, c] + bias[output]
//
// Launch: any number of blocks of up to 16 warps, early.
//
// Needs FORMAT and ALIGNED: see products.cuh.
#include "products.cuh"

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

// What comes before and after: x and y have the type TYPE.
template <int TYPE>
struct Around {
    const Parameters& p;
    const Weight& weight;

    DEVICE void start() {}
    DEVICE void read(u8* shared) {
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
            for (int k = 0; k < 2; k++) put_four(shared, weight, int(row), int(column) + 4 * k, fours[k]);
        }
    }
    DEVICE void begin(int, int) {}
    DEVICE void end(int row, int output, float sum) {
        const i64 index = row * p.y.stride + output;
        sum += p.bias ? p.bias[output] : 0.f;
        if constexpr (TYPE == FLOAT32)
            reinterpret_cast<float*>(p.y.data)[index] = sum;
        else
            reinterpret_cast<u16*>(p.y.data)[index] = u16(floats_as_bfloats(sum, 0.f));
    }
};

template <int TILES, int TYPE>
DEVICE void run(const Parameters& p) {
    const Weight weight = {p.weight, p.row_bytes, int(p.n_in), int(p.n_out), int(p.rows), int(p.x_stride)};
    Around<TYPE> around = {p, weight};
    multiply<TILES>(weight, shared_memory(), around);
}

KERNEL(MOST_THREADS, BLOCKS) multiply_8(PARAMETER Parameters p) { run<1, FLOAT32>(p); }
KERNEL(MOST_THREADS, 1) multiply_16(PARAMETER Parameters p) { run<2, FLOAT32>(p); }
KERNEL(MOST_THREADS, BLOCKS) multiply_8_short(PARAMETER Parameters p) { run<1, BFLOAT16>(p); }
KERNEL(MOST_THREADS, 1) multiply_16_short(PARAMETER Parameters p) { run<2, BFLOAT16>(p); }

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
            write_whole<FLOAT32>(reinterpret_cast<float*>(p.y.data) + at, values);
        } else {
            write_whole<BFLOAT16>(reinterpret_cast<u16*>(p.y.data) + at, values);
        }
    }
}
