// What product.cu does, with a weight in GGUF's blocks, for up to 8 rows; norms are RMS norms without bias.
//
// Launch: 4 to 16 warps, early; any number of blocks.
//
// Needs FORMAT and ALIGNED: see products.cuh.
#include "finish.cuh"
#include "products.cuh"

constexpr int MOST_ROWS = 8, MOST_WARPS = MOST_THREADS / 32, BATCH = 5;

// Shared memory before the rows: the record, scales of the rows, and the warps' sums of squares.
struct Shared {
    u8* step;
    float *scales, *squares;
    u8* rows;
};
DEVICE Shared shared_of() {
    u8* step = shared_memory();
    float* scales = reinterpret_cast<float*>(step + sizeof(Step));
    float* squares = scales + MOST_ROWS;
    return {step, scales, squares, reinterpret_cast<u8*>(squares + MOST_ROWS * MOST_WARPS)};
}

// What comes before and after the products.
template <bool CONVOLVES>
struct Around {
    const Parameters& p;
    const Weight& weight;
    const Shared& shared;
    Step step;
    Inputs old;

    DEVICE void start() { step = shared_step(p, shared.step); }

    // Part of a row to shared memory, times the norm's weight: four numbers every `step`, BATCH loads under way.
    // Returns the sum of a lane's squares.
    DEVICE float read_part(u8* rows, int row, int first, int step) {
        const float* from = floats(p.x.data) + row * p.x.stride;
        float squares = 0.f;
        for (int start = first; start < weight.n_in; start += BATCH * step) {
            float4 v[BATCH], w[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                const int column = start + b * step;
                const bool norms = p.norm_weight && column < weight.n_in;
                v[b] = column < weight.n_in ? read_fresh(from + column) : make_float4(0.f, 0.f, 0.f, 0.f);
                w[b] = norms ? read_ahead(reinterpret_cast<const float4*>(floats(p.norm_weight) + column))
                             : make_float4(1.f, 1.f, 1.f, 1.f);
            }
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                const int column = start + b * step;
                const float4 x = v[b], y = w[b];
                squares = fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, fmaf(x.w, x.w, squares))));
                const uint2 four =
                    make_uint2(floats_as_bfloats(x.x * y.x, x.y * y.y), floats_as_bfloats(x.z * y.z, x.w * y.w));
                if (column < weight.n_in) put_four(rows, weight, row, column, four);
            }
        }
        return squares;
    }
    // A row has one warp, or several where there are enough.
    DEVICE void read(u8* rows) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
        const int of_row = max(1, n_warps / weight.rows), part = warp % of_row;
        for (int row = warp / of_row; row < weight.rows; row += n_warps / of_row) {
            float squares = read_part(rows, row, 4 * (32 * part + lane), 4 * 32 * of_row);
#pragma unroll
            for (int m = 16; m > 0; m /= 2) squares += shuffle_xor(squares, m);
            if (lane == 0) shared.squares[row * MOST_WARPS + part] = squares;
        }
        sync_block();
        const int row = int(threadIdx.x);
        if (row >= weight.rows) return;
        float squares = 0.f;
        for (int w = 0; w < of_row; w++) squares += shared.squares[row * MOST_WARPS + w];
        shared.scales[row] = p.has_norm ? 1.f / sqrtf(squares / float(p.size) + float(p.eps)) : 1.f;
    }
    DEVICE void begin(int row, int output) {
        if (CONVOLVES && row < min(int(step.rows), weight.rows) && output < p.d_inner)
            read_inputs(old, p, step, row, output);
    }
    DEVICE void end(int row, int output, float sum) {
        const float value = sum * shared.scales[row] + (p.bias ? floats(p.bias)[output] : 0.f);
        if constexpr (CONVOLVES)
            finish_in_proj(p, step, old, value, row, output);
        else
            finish_product(p, step, value, row, output);
    }
};

template <bool CONVOLVES>
DEVICE void run(const Parameters& p) {
    const Weight weight = {p.weight, p.row_bytes, int(p.n_in), int(p.n_out), int(p.bucket), int(p.x_stride)};
    const Shared shared = shared_of();
    Around<CONVOLVES> around = {p, weight, shared};
    multiply<1>(weight, shared.rows, around);
}

KERNEL(MOST_THREADS, 1) product(PARAMETER Parameters p) { run<false>(p); }

KERNEL(MOST_THREADS, 1) in_proj(PARAMETER Parameters p) { run<true>(p); }
