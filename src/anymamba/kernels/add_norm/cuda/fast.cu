// The norm of a sum in float32, forward and backward, for rows of up to 8,192 numbers of any short type: each number is
// read once and written once.
//
//     total = x + residual
//     y = (total - mean) / sqrt(variance + eps) * weight + bias
//
// with the mean taken off, or (RMS norm) not. p.warps warps share a row; a lane has four neighbouring numbers, and
// again four further on, up to CHUNKS times, in registers. With narrow rows, which have fewer CHUNKS, a multiprocessor
// has more of them at a time.
//
// Backward recomputes the normed row n from its saved mean and scale r = 1 / sqrt(variance + eps):
//
//     dtotal' = dtotal + r (g - mean(g) - n mean(g n)),    g = weight dy
//
// and adds dy n and dy over the rows of a block, then block by block in `sum_parts`.
//
// Launch: 256 threads, so that 256 / 32 / p.warps rows are worked on at a time, or 512 where 16 warps share one.
// Backward and forward_many have as many blocks as the machine holds at once, each with many rows.
//
// Needs CHUNKS: 1 or 2 for rows of one warp, or 4.
#include "parameters.cuh"

constexpr int MOST_WARPS = 16, WIDTH = 4, MOST_THREADS = CHUNKS == 4 ? 32 * MOST_WARPS : 256;
constexpr int BLOCKS = CHUNKS == 4 ? 1 : CHUNKS == 2 ? 3 : 4;  // of many rows that a multiprocessor has at a time

typedef float Row[CHUNKS][WIDTH];  // a lane's part of one

// Where a thread works in a row: the first of its numbers, and how far the next four are.
struct Place {
    int first, step, size;
};
DEVICE Place place_of_thread(const Parameters& p) {
    const int threads = 32 * int(p.warps);
    return {int(threadIdx.x % threads) * WIDTH, threads * WIDTH, int(p.size)};
}

#define FOR_EACH_CHUNK(k, at) \
    _Pragma("unroll") for (int k = 0; k < CHUNKS; k++) if ((at).first + k * (at).step < (at).size)

// A lane's part of a row as it is in memory: what has been asked for and need not have come yet. Of short numbers four
// take half of the words. Widening waits for them, so all tensors are asked for before any is widened.
struct Packed {
    uint4 of[CHUNKS];
};
DEVICE void ask(Packed& out, const u8* data, i64 start, i64 dtype, const Place& at) {
    if (dtype == FLOAT32) {
        const float* from = reinterpret_cast<const float*>(data) + start + at.first;
        FOR_EACH_CHUNK(k, at) out.of[k] = *reinterpret_cast<const uint4*>(from + k * at.step);
    } else {
        const u16* from = reinterpret_cast<const u16*>(data) + start + at.first;
        FOR_EACH_CHUNK(k, at) {
            const uint2 words = *reinterpret_cast<const uint2*>(from + k * at.step);
            out.of[k].x = words.x, out.of[k].y = words.y;
        }
    }
}
DEVICE void ask_for_row(Packed& out, const Rows& rows, i64 row, const Place& at) {
    ask(out, rows.data, row * rows.stride, rows.dtype, at);
}
template <int TYPE>
DEVICE void widen_as(Row& out, const Packed& in) {
#pragma unroll
    for (int k = 0; k < CHUNKS; k++)
        read<TYPE>(out[k], reinterpret_cast<const typename ElementOf<TYPE>::Type*>(&in.of[k]));
}
DEVICE void widen(Row& out, const Packed& in, i64 dtype) {
    switch (dtype) {
        case FLOAT32: return widen_as<FLOAT32>(out, in);
        case BFLOAT16: return widen_as<BFLOAT16>(out, in);
        default: return widen_as<FLOAT16>(out, in);
    }
}
template <int TYPE>
DEVICE void put_as(u8* data, i64 start, const Row& values, const Place& at) {
    auto* to = reinterpret_cast<typename ElementOf<TYPE>::Type*>(data) + start + at.first;
    FOR_EACH_CHUNK(k, at) write<TYPE>(to + k * at.step, values[k]);
}
DEVICE void put(u8* data, i64 start, i64 dtype, const Row& values, const Place& at) {
    switch (dtype) {
        case FLOAT32: return put_as<FLOAT32>(data, start, values, at);
        case BFLOAT16: return put_as<BFLOAT16>(data, start, values, at);
        default: return put_as<FLOAT16>(data, start, values, at);
    }
}
DEVICE void put_row(const Rows& rows, i64 row, const Row& values, const Place& at) {
    put(rows.data, row * rows.stride, rows.dtype, values, at);
}

template <int TYPE>
DEVICE void round_as(Row& values) {
#pragma unroll
    for (int k = 0; k < CHUNKS; k++)
#pragma unroll
        for (int i = 0; i < WIDTH; i += 2) {
            const float pair[2] = {values[k][i], values[k][i + 1]};
            alignas(4) u16 rounded[2];
            float back[2];
            write<TYPE>(rounded, pair), read<TYPE>(back, rounded);
            values[k][i] = back[0], values[k][i + 1] = back[1];
        }
}

// x + residual, in the dtype that the sum has.
DEVICE void add_up(Row& total, const Packed& x, const Packed& residual, const Parameters& p) {
    widen(total, x, p.x.dtype);
    if (!p.residual.data) return;
    Row more;
    widen(more, residual, p.residual.dtype);
#pragma unroll
    for (int k = 0; k < CHUNKS; k++)
#pragma unroll
        for (int i = 0; i < WIDTH; i++) total[k][i] += more[k][i];
    if (p.total_dtype == BFLOAT16) round_as<BFLOAT16>(total);
    if (p.total_dtype == FLOAT16) round_as<FLOAT16>(total);
}

// The sum over the threads of a row, for all of them. All threads of the block call it; `slots` alternates between
// calls, so that one synchronisation is enough.
template <int count>
DEVICE void sum_over_row(float (&values)[count], const Parameters& p, int slots) {
#pragma unroll
    for (int m = 16; m > 0; m /= 2)
#pragma unroll
        for (int i = 0; i < count; i++) values[i] += shuffle_xor(values[i], m);
    const int warps = int(p.warps), warp = threadIdx.x / 32, first = warp / warps * warps;
    if (warps == 1) return;
    float* shared = reinterpret_cast<float*>(shared_memory()) + slots * 2 * MOST_WARPS;
    if (threadIdx.x % 32 == 0)
#pragma unroll
        for (int i = 0; i < count; i++) shared[warp * count + i] = values[i];
    sync_block();
#pragma unroll
    for (int i = 0; i < count; i++) {
        values[i] = 0.f;
        for (int w = 0; w < warps; w++) values[i] += shared[(first + w) * count + i];
    }
}

struct Statistics {
    float scale, mean;
};

DEVICE Statistics statistics_of(const Row& total, const Parameters& p, const Place& at) {
    float mean[1] = {0.f}, squares[1] = {0.f};
    if (p.subtract_mean) {
        FOR_EACH_CHUNK(k, at)
        mean[0] += (total[k][0] + total[k][1]) + (total[k][2] + total[k][3]);
        sum_over_row(mean, p, 0);
        mean[0] /= float(at.size);
    }
    FOR_EACH_CHUNK(k, at) {
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const float d = total[k][i] - mean[0];
            squares[0] = fmaf(d, d, squares[0]);
        }
    }
    sum_over_row(squares, p, 1);
    return {1.f / sqrtf(squares[0] / float(at.size) + float(p.eps)), mean[0]};
}

// What follows once x + residual of a row is known. All threads of the block call it.
DEVICE void norm_row(Row& total, const Packed& weights, const Packed& biases, i64 row, const Parameters& p,
                     const Place& at) {
    const Statistics s = statistics_of(total, p, at);
    if (row >= p.rows) return;
    Row weight, bias = {};
    widen(weight, weights, p.weight_dtype);
    if (p.bias) widen(bias, biases, p.bias_dtype);
#pragma unroll
    for (int k = 0; k < CHUNKS; k++)
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            float y = (total[k][i] - s.mean) * s.scale;
            if (p.weight) y *= weight[k][i];
            total[k][i] = y + bias[k][i];
        }
    put_row(p.y, row, total, at);
    if (p.statistics && at.first == 0) {
        float* to = reinterpret_cast<float*>(p.statistics);
        to[row] = s.scale;
        if (p.subtract_mean) to[p.rows + row] = s.mean;
    }
}

struct Inputs {
    Packed x, residual, weights, biases;
};
DEVICE void ask_for_inputs(Inputs& in, const Parameters& p, i64 own, const Place& at) {
    const i64 row = min(own, p.rows - 1);
    ask_for_row(in.x, p.x, row, at);
    if (p.residual.data) ask_for_row(in.residual, p.residual, row, at);
}
DEVICE void ask_for_weights(Inputs& in, const Parameters& p, const Place& at) {
    if (p.weight) ask(in.weights, p.weight, 0, p.weight_dtype, at);
    if (p.bias) ask(in.biases, p.bias, 0, p.bias_dtype, at);
}

// A block has as many rows as its threads hold, so that many blocks are at work.
KERNEL(MOST_THREADS, CHUNKS == 4 ? 2 : CHUNKS == 2 ? 4 : 6) forward(PARAMETER Parameters p) {
    const Place at = place_of_thread(p);
    const int warps = int(p.warps), rows_of_block = int(blockDim.x) / 32 / warps;
    const i64 row = i64(blockIdx.x) * rows_of_block + int(threadIdx.x) / 32 / warps;
    Inputs in = {};
    ask_for_inputs(in, p, row, at);
    Row total;
    add_up(total, in.x, in.residual, p);
    if (p.total.data && row < p.rows) put_row(p.total, row, total, at);
    ask_for_weights(in, p, at);
    norm_row(total, in.weights, in.biases, row, p, at);
}

// A block has many rows. It asks for the next ones before it waits for the sums over these: a layer norm waits twice.
KERNEL(MOST_THREADS, BLOCKS) forward_many(PARAMETER Parameters p) {
    const Place at = place_of_thread(p);
    const int warps = int(p.warps), rows_of_block = int(blockDim.x) / 32 / warps, group = int(threadIdx.x) / 32 / warps;
    i64 first = i64(blockIdx.x) * rows_of_block;
    Inputs in = {};
    ask_for_inputs(in, p, first + group, at);
    ask_for_weights(in, p, at);
    for (i64 next; first < p.rows; first = next) {
        next = first + i64(gridDim.x) * rows_of_block;
        Row total;
        add_up(total, in.x, in.residual, p);
        if (next < p.rows) ask_for_inputs(in, p, next + group, at);
        if (p.total.data && first + group < p.rows) put_row(p.total, first + group, total, at);
        norm_row(total, in.weights, in.biases, first + group, p, at);
    }
}

// Sums over the rows of a block, into its part: the groups of warps add to shared memory one after the other.
DEVICE void write_part(const Row& dweight, const Row& dbias, const Parameters& p, const Place& at) {
    const int groups = int(blockDim.x) / 32 / int(p.warps), group = threadIdx.x / 32 / int(p.warps);
    float* shared = reinterpret_cast<float*>(shared_memory()) + 4 * MOST_WARPS;
    for (int g = 0; g < groups; g++) {
        if (g == group) {
            FOR_EACH_CHUNK(k, at) {
#pragma unroll
                for (int i = 0; i < WIDTH; i++) {
                    const int column = at.first + k * at.step + i;
                    shared[column] = (g ? shared[column] : 0.f) + dweight[k][i];
                    shared[at.size + column] = (g ? shared[at.size + column] : 0.f) + dbias[k][i];
                }
            }
        }
        sync_block();
    }
    float* part = reinterpret_cast<float*>(p.parts) + i64(blockIdx.x) * 2 * p.size;
    for (int i = threadIdx.x; i < 2 * at.size; i += blockDim.x) part[i] = shared[i];
}

KERNEL(MOST_THREADS, BLOCKS) backward(PARAMETER Parameters p) {
    const Place at = place_of_thread(p);
    const int warps = int(p.warps), rows_of_block = int(blockDim.x) / 32 / warps, group = int(threadIdx.x) / 32 / warps;
    const float* statistics = reinterpret_cast<const float*>(p.statistics);
    Row dweight = {}, dbias = {};
    int slots = 0;
    for (i64 first = i64(blockIdx.x) * rows_of_block; first < p.rows; first += i64(gridDim.x) * rows_of_block) {
        const i64 own = first + group, row = min(own, p.rows - 1);
        Packed x = {}, residual = {}, dy = {}, dtotal = {}, weights = {};
        ask_for_row(x, p.x, row, at);
        if (p.residual.data) ask_for_row(residual, p.residual, row, at);
        ask_for_row(dy, p.dy, row, at);
        if (p.dtotal.data) ask_for_row(dtotal, p.dtotal, row, at);
        const float scale = statistics[row], mean = p.subtract_mean ? statistics[p.rows + row] : 0.f;
        Row n, g, weight, more;
        add_up(n, x, residual, p);
        if (p.weight) ask(weights, p.weight, 0, p.weight_dtype, at);
        widen(g, dy, p.dy.dtype), widen(weight, weights, p.weight_dtype);
        float sums[2] = {0.f, 0.f};
        FOR_EACH_CHUNK(k, at) {
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                n[k][i] = (n[k][i] - mean) * scale;
                if (own < p.rows) {
                    dweight[k][i] = fmaf(g[k][i], n[k][i], dweight[k][i]);
                    dbias[k][i] += g[k][i];
                }
                if (p.weight) g[k][i] *= weight[k][i];
                sums[0] = fmaf(g[k][i], n[k][i], sums[0]), sums[1] += g[k][i];
            }
        }
        sum_over_row(sums, p, slots);
        slots = 1 - slots;
        widen(more, dtotal, p.dtotal.dtype);
        const float of_n = sums[0] / float(at.size), of_g = p.subtract_mean ? sums[1] / float(at.size) : 0.f;
#pragma unroll
        for (int k = 0; k < CHUNKS; k++)
#pragma unroll
            for (int i = 0; i < WIDTH; i++) more[k][i] = fmaf(scale, g[k][i] - of_g - n[k][i] * of_n, more[k][i]);
        if (own >= p.rows) continue;
        put_row(p.dx, row, more, at);
        if (p.dresidual.data) put_row(p.dresidual, row, more, at);
    }
    if (p.parts) write_part(dweight, dbias, p, at);
}

KERNEL(32 * WAYS, 1) sum_parts(PARAMETER Parameters p) { sum_parts_of_block<float>(p); }
