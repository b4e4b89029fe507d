// Products of a few rows with a matrix, bound by the memory that holds the matrix, with a norm before and what follows
// in the model after:
//
//     y[r, o] = sum_k W[o, k] x'[r, k] + bias[o],    x' = norm(x) or x
//
//     product   y is stored, added to what is there, or stored as logits
//     in_proj   the first half of y goes through the convolution and SiLU to u, the second through SiLU to z
//
// A warp reads OUTPUTS rows of W at once, 16 bytes a lane; p.ways warps of a block share the columns of the same rows.
// x' is in shared memory, in the type of W. The first weights are asked for before the previous kernel has ended. An
// RMS norm multiplies the sums by the row's scale, so that x is read once.
//
// Launch: 256 threads, early; any number of blocks.
//
// Needs WEIGHT, the type of W, and ROWS: 1, 2, 4 or 8.
#include "finish.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;

typedef ElementOf<WEIGHT>::Type Element;
constexpr int VECTOR = 16 / sizeof(Element);
constexpr int OUTPUTS = ROWS <= 2 ? 2 : 4;
constexpr int AHEAD = 8 / OUTPUTS;  // loads of a row of W that a lane has under way
constexpr int CHUNK = AHEAD * 32 * VECTOR;
constexpr int SUMS = OUTPUTS * ROWS;
constexpr int BLOCKS = 2;  // of a multiprocessor: three would leave no room for the next kernel, which starts early

typedef uint4 Weights[AHEAD][OUTPUTS];

// Shared memory: the record, x', scales of the rows, partial sums of the warps for statistics (twice), and of products.
struct Shared {
    u8* step;
    Element* x;
    float *scales, *statistics, *sums;
};
DEVICE Shared shared_of(const Parameters& p) {
    u8 *step = shared_memory(), *x = step + sizeof(Step);
    float* after = reinterpret_cast<float*>(x + ROWS * p.n_in * sizeof(Element));
    return {step, reinterpret_cast<Element*>(x), after, after + ROWS, after + ROWS + 2 * WARPS * ROWS};
}

DEVICE void unpack(float (&out)[VECTOR], const uint4& v) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (WEIGHT == FLOAT32) {
            out[i] = bits_as_float(words[i]);
        } else {
            out[2 * i] = bits_as_float(words[i] << 16), out[2 * i + 1] = bits_as_float(words[i] & 0xffff0000u);
        }
    }
}

// ------------------------------------------------------------------------------------------------ input

// The sums over all threads, for all of them.
DEVICE void sum_over_block(float (&values)[ROWS], float* parts) {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 16; m > 0; m /= 2)
#pragma unroll
        for (int r = 0; r < ROWS; r++) values[r] += shuffle_xor(values[r], m);
    if (threadIdx.x % 32 == 0)
#pragma unroll
        for (int r = 0; r < ROWS; r++) parts[warp * ROWS + r] = values[r];
    sync_block();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        values[r] = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) values[r] += parts[w * ROWS + r];
    }
}

// The block's threads go through a row four numbers each, and BATCH times that with all loads under way.
constexpr int BATCH = ROWS == 1 ? 5 : ROWS == 2 ? 2 : 1;
typedef float Fours[BATCH][ROWS][4];

DEVICE void read_fours(Fours& out, const Parameters& p, int first) {
#pragma unroll
    for (int b = 0; b < BATCH; b++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int i = first + b * 4 * THREADS;
            float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
            if (i < p.n_in) v = read_fresh(floats(p.x.data) + r * p.x.stride + i);
            out[b][r][0] = v.x, out[b][r][1] = v.y, out[b][r][2] = v.z, out[b][r][3] = v.w;
        }
}

#define FOR_EACH_BATCH(first) for (int first = 4 * int(threadIdx.x); first < int(p.n_in); first += BATCH * 4 * THREADS)

DEVICE void means_of_rows(float (&means)[ROWS], const Parameters& p, float* parts) {
    FOR_EACH_BATCH(first) {
        Fours x;
        read_fours(x, p, first);
#pragma unroll
        for (int b = 0; b < BATCH; b++)
#pragma unroll
            for (int r = 0; r < ROWS; r++) means[r] += (x[b][r][0] + x[b][r][1]) + (x[b][r][2] + x[b][r][3]);
    }
    sum_over_block(means, parts);
#pragma unroll
    for (int r = 0; r < ROWS; r++) means[r] /= float(p.size);
}

// The rows times the norm's weight to shared memory, and the sums of squares.
DEVICE void weigh_rows(float (&squares)[ROWS], const float (&means)[ROWS], const Parameters& p, Element* shared) {
    FOR_EACH_BATCH(first) {
        Fours x;
        read_fours(x, p, first);
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            const int i = first + b * 4 * THREADS;
            if (i >= p.n_in) continue;
            float weight[4] = {1.f, 1.f, 1.f, 1.f};
            if (p.norm_weight) read<FLOAT32>(weight, floats(p.norm_weight) + i);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float d = i + j < p.size ? x[b][r][j] - means[r] : 0.f;
                    squares[r] = fmaf(d, d, squares[r]);
                    x[b][r][j] = d * weight[j];
                }
                write<WEIGHT>(shared + r * p.n_in + i, x[b][r]);
            }
        }
    }
}

DEVICE void add_bias(const float (&scales)[ROWS], const Parameters& p, Element* shared) {
    for (int i = 4 * int(threadIdx.x); i < p.n_in; i += 4 * THREADS)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float values[4];
            read<WEIGHT>(values, shared + r * p.n_in + i);
#pragma unroll
            for (int j = 0; j < 4; j++) values[j] = fmaf(values[j], scales[r], floats(p.norm_bias)[i + j]);
            write<WEIGHT>(shared + r * p.n_in + i, values);
        }
}

// x' divided by the scales of its rows to shared memory, and the scales.
DEVICE void prepare_input(const Parameters& p, const Shared& shared) {
    float means[ROWS] = {}, scales[ROWS] = {};
    if (p.subtract_mean) means_of_rows(means, p, shared.statistics);
    weigh_rows(scales, means, p, shared.x);
    if (p.has_norm) {
        sum_over_block(scales, shared.statistics + WARPS * ROWS);
#pragma unroll
        for (int r = 0; r < ROWS; r++) scales[r] = 1.f / sqrtf(scales[r] / float(p.size) + float(p.eps));
    }
    if (p.norm_bias) add_bias(scales, p, shared.x);
    if (threadIdx.x == 0)
#pragma unroll
        for (int r = 0; r < ROWS; r++) shared.scales[r] = p.has_norm && !p.norm_bias ? scales[r] : 1.f;
    sync_block();
}

// ------------------------------------------------------------------------------------------------ product

DEVICE void load(Weights& w, const Parameters& p, int output, int column) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++) {
        const i64 row = min(output + o, int(p.n_out) - 1);
        const Element* from = reinterpret_cast<const Element*>(p.weight) + row * p.n_in;
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int k = column + (a * 32 + lane) * VECTOR;
            w[a][o] = k < p.n_in ? read_once(from + k) : uint4{0, 0, 0, 0};
        }
    }
}

DEVICE void multiply(float (&sums)[SUMS], const Weights& w, const Parameters& p, const Element* x, int column) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
        const int k = column + (a * 32 + lane) * VECTOR;
        if (k >= p.n_in) continue;
        float weights[OUTPUTS][VECTOR];
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) unpack(weights[o], w[a][o]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float values[VECTOR];
            unpack(values, *reinterpret_cast<const uint4*>(x + r * p.n_in + k));
#pragma unroll
            for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
                for (int i = 0; i < VECTOR; i++)
                    sums[r * OUTPUTS + o] = fmaf(weights[o][i], values[i], sums[r * OUTPUTS + o]);
        }
    }
}

// The sum over the lanes of values[lane % SUMS]: pairs of lanes share the work, half of the values each.
template <int count>
DEVICE float sum_over_lanes(const float (&values)[count]) {
    if constexpr (count == 1) {
        float sum = values[0];
#pragma unroll
        for (int m = 16; m >= SUMS; m /= 2) sum += shuffle_xor(sum, m);
        return sum;
    } else {
        constexpr int half = count / 2;
        const bool upper = threadIdx.x & half;
        float sums[half];
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float sent = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
            sums[i] = kept + shuffle_xor(sent, half);
        }
        return sum_over_lanes(sums);
    }
}

// The sum over the warps that share rows of W, for all of them.
DEVICE float sum_over_ways(float sum, const Parameters& p, float* parts) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, ways = int(p.ways);
    if (ways == 1) return sum;
    if (lane < SUMS) parts[warp * SUMS + lane] = sum;
    sync_block();
    float total = 0.f;
    for (int w = 0; w < ways; w++) total += parts[(warp / ways * ways + w) * SUMS + lane % SUMS];
    sync_block();
    return total;
}

template <bool CONVOLVES>
DEVICE void run(const Parameters& p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, ways = int(p.ways), tasks = WARPS / ways;
    const int n_tasks = (int(p.n_out) + OUTPUTS - 1) / OUTPUTS, way = warp % ways;
    const int row = lane % SUMS / OUTPUTS, stride = int(gridDim.x) * tasks;
    const Shared shared = shared_of(p);
    int first = int(blockIdx.x) * tasks;  // of the block's tasks
    Weights w;
    Inputs old = {};
    Step step = {};
    for (bool ready = false; first < n_tasks || !ready; first += stride) {
        const int output = (first + warp / ways) * OUTPUTS, mine = output + lane % OUTPUTS;
        load(w, p, output, way * CHUNK);
        if (!ready && (CONVOLVES || p.target == LOGITS)) step = shared_step(p, shared.step);
        const bool writes = way == 0 && lane < SUMS && mine < p.n_out;
        if (CONVOLVES && writes && row < step.rows && mine < p.d_inner) read_inputs(old, p, step, row, mine);
        if (!ready) {
            let_next_start();
            wait_for_previous();
            prepare_input(p, shared);
            ready = true;
        }
        float sums[SUMS] = {};
        for (int column = way * CHUNK; column < p.n_in;) {
            multiply(sums, w, p, shared.x, column);
            column += ways * CHUNK;
            if (column < p.n_in) load(w, p, output, column);
        }
        float value = sum_over_ways(sum_over_lanes(sums), p, shared.sums);
        if (!writes) continue;
        value = value * shared.scales[row] + (p.bias ? floats(p.bias)[mine] : 0.f);
        if constexpr (CONVOLVES)
            finish_in_proj(p, step, old, value, row, mine);
        else
            finish_product(p, step, value, row, mine);
    }
}

KERNEL(THREADS, BLOCKS) product(PARAMETER Parameters p) { run<false>(p); }

KERNEL(THREADS, BLOCKS) in_proj(PARAMETER Parameters p) { run<true>(p); }
