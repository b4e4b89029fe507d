// The norm of a sum for rows of any size in float32 or float64; see fast.cu for what is computed.
//
// A block takes a row and reads it anew for each sum. `weights` sums over rows, one thread a column and part.
//
// Launch: 256 threads.
//
// Needs DOUBLE.
#include "parameters.cuh"

#if DOUBLE
typedef double R;
#else
typedef float R;
#endif

constexpr int THREADS = 256;

DEVICE R value_at(const Rows& rows, i64 row, i64 column) {
    return read_as<R>(rows.data, row * rows.stride + column, int(rows.dtype));
}
DEVICE void put_value(const Rows& rows, i64 row, i64 column, R value) {
    write_as<R>(rows.data, row * rows.stride + column, int(rows.dtype), value);
}
DEVICE R weight_at(const Parameters& p, i64 column) {
    return p.weight ? read_as<R>(p.weight, column, int(p.weight_dtype)) : R(1);
}

DEVICE R rounded(R x, i64 dtype) {
    switch (dtype) {
        case BFLOAT16: return R(bits_as_float(floats_as_bfloats(0.f, float(x)) & 0xffff0000u));
        case FLOAT16: return R(half_as_float(float_as_half(float(x))));
        default: return x;
    }
}
DEVICE R total_at(const Parameters& p, i64 row, i64 column) {
    const R x = value_at(p.x, row, column);
    return p.residual.data ? rounded(x + value_at(p.residual, row, column), p.total_dtype) : x;
}

// The sum over a block, for all its threads.
DEVICE R sum_over_block(R value) {
    R* shared = reinterpret_cast<R*>(shared_memory());
#pragma unroll
    for (int m = 16; m > 0; m /= 2) value += shuffle_xor(value, m);
    sync_block();  // earlier sums have been read
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    sync_block();
    R sum = R(0);
    for (int w = 0; w < THREADS / 32; w++) sum += shared[w];
    return sum;
}

KERNEL(THREADS, 1) forward(PARAMETER Parameters p) {
    const i64 row = i64(blockIdx.x);
    R sum = R(0), squares = R(0);
    for (i64 c = threadIdx.x; p.subtract_mean && c < p.size; c += THREADS) sum += total_at(p, row, c);
    const R mean = p.subtract_mean ? sum_over_block(sum) / R(p.size) : R(0);
    for (i64 c = threadIdx.x; c < p.size; c += THREADS) {
        const R d = total_at(p, row, c) - mean;
        squares += d * d;
    }
    const R scale = R(1) / sqrt(sum_over_block(squares) / R(p.size) + R(p.eps));
    for (i64 c = threadIdx.x; c < p.size; c += THREADS) {
        const R total = total_at(p, row, c), bias = p.bias ? read_as<R>(p.bias, c, int(p.bias_dtype)) : R(0);
        if (p.total.data) put_value(p.total, row, c, total);
        put_value(p.y, row, c, (total - mean) * scale * weight_at(p, c) + bias);
    }
    if (p.statistics && threadIdx.x == 0) {
        reinterpret_cast<R*>(p.statistics)[row] = scale;
        if (p.subtract_mean) reinterpret_cast<R*>(p.statistics)[p.rows + row] = mean;
    }
}

struct Statistics {
    R scale, mean;
};
DEVICE Statistics statistics_at(const Parameters& p, i64 row) {
    const R* from = reinterpret_cast<const R*>(p.statistics);
    return {from[row], p.subtract_mean ? from[p.rows + row] : R(0)};
}

KERNEL(THREADS, 1) backward(PARAMETER Parameters p) {
    const i64 row = i64(blockIdx.x);
    const Statistics s = statistics_at(p, row);
    R of_n = R(0), of_g = R(0);
    for (i64 c = threadIdx.x; c < p.size; c += THREADS) {
        const R g = value_at(p.dy, row, c) * weight_at(p, c);
        of_n += g * (total_at(p, row, c) - s.mean) * s.scale, of_g += g;
    }
    of_n = sum_over_block(of_n) / R(p.size);
    of_g = p.subtract_mean ? sum_over_block(of_g) / R(p.size) : R(0);
    for (i64 c = threadIdx.x; c < p.size; c += THREADS) {
        const R g = value_at(p.dy, row, c) * weight_at(p, c), n = (total_at(p, row, c) - s.mean) * s.scale;
        const R more = p.dtotal.data ? value_at(p.dtotal, row, c) : R(0), sum = more + s.scale * (g - of_g - n * of_n);
        put_value(p.dx, row, c, sum);
        if (p.dresidual.data) put_value(p.dresidual, row, c, sum);
    }
}

KERNEL(THREADS, 1) weights(PARAMETER Parameters p) {
    const i64 index = i64(blockIdx.x) * THREADS + threadIdx.x, column = index % p.size, part = index / p.size;
    if (part >= p.n_parts) return;
    R dweight = R(0), dbias = R(0);
    for (i64 row = part * p.rows_of_part; row < min(p.rows, (part + 1) * p.rows_of_part); row++) {
        const Statistics s = statistics_at(p, row);
        const R dy = value_at(p.dy, row, column);
        dweight += dy * (total_at(p, row, column) - s.mean) * s.scale, dbias += dy;
    }
    reinterpret_cast<R*>(p.parts)[part * 2 * p.size + column] = dweight;
    reinterpret_cast<R*>(p.parts)[part * 2 * p.size + p.size + column] = dbias;
}

KERNEL(32 * WAYS, 1) sum_parts(PARAMETER Parameters p) { sum_parts_of_block<R>(p); }
