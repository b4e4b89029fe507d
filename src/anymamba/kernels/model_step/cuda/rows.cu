// What a step of many rows does beside products, and how every step begins.
//
//     embed      the rows of the table for the ids, and what changes from step to step
//     convolve   u = silu(convolution of x), and the convolution's new state
//
// Launch: 256 threads; a block for each row of the bucket (embed), or early, for WIDTH channels
// of ROWS rows a thread (convolve).
//
// Needs DTYPE, the type of activations; TAPS of the convolution; WIDTH, neighbouring channels of a thread: 4, which lie
// at multiples of four numbers, or 1; and ROWS, rows of a thread.
#include "parameters.cuh"

constexpr int THREADS = 256;
typedef ElementOf<DTYPE>::Type Element;

// An id outside the table gives a row that is not a number, padding gives zeros.
KERNEL(THREADS, 4) embed(PARAMETER Parameters p) {
    const int row = int(blockIdx.x);
    if (row == 0 && threadIdx.x == 0)
        *reinterpret_cast<Step*>(p.step) = {
            p.rows, floats(p.conv), floats(p.ssm), floats(p.new_conv), floats(p.new_ssm), floats(p.logits)};
    if (!p.table) return;
    float* to = floats(p.y.data) + row * p.y.stride;
    i64 id = 0;
    if (row < p.rows)
        id = p.ids_are_long ? reinterpret_cast<const i64*>(p.ids)[row] : i64(reinterpret_cast<const int*>(p.ids)[row]);
    const bool known = id >= 0 && id < p.n_ids;
    for (int i = threadIdx.x; i < p.size; i += THREADS) {
        if (row >= p.rows)
            to[i] = 0.f;
        else
            to[i] = known ? read_as<float>(p.table, id * p.n_in + i, int(p.table_dtype)) : bits_as_float(0x7fc00000u);
    }
}

// ------------------------------------------------------------------------------------------------ convolve

typedef float Channels[WIDTH];  // neighbours

DEVICE void read_channels(Channels& out, const float* from) {
    if constexpr (WIDTH == 4) {
        const float4 v = read_fresh(from);
        out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
    } else {
        out[0] = read_one_fresh(from);
    }
}
DEVICE void write_channels(float* to, const Channels& values) {
    if constexpr (WIDTH == 4)
        write_16_bytes(to, make_float4(values[0], values[1], values[2], values[3]));
    else
        *to = values[0];
}

// Channels of an activation as they are in memory.
template <int bytes>
struct VectorOf {
    typedef Element Type;
};
template <>
struct VectorOf<8> {
    typedef uint2 Type;
};
template <>
struct VectorOf<16> {
    typedef float4 Type;
};
typedef VectorOf<WIDTH == 1 ? 0 : WIDTH * sizeof(Element)>::Type Vector;

// A thread has WIDTH channels of ROWS rows, and asks for their states and weights before it waits.
KERNEL(THREADS, 4) convolve_rows(PARAMETER Parameters p) {
    constexpr int before = TAPS - 1;
    const int channels = int(p.d_inner), pieces = channels / WIDTH, i = int(blockIdx.x) * THREADS + int(threadIdx.x);
    const int first = i / pieces * ROWS, channel = i % pieces * WIDTH;
    Channels weights[TAPS], bias = {}, old[ROWS][TAPS] = {};  // old[r][before] is x
#pragma unroll
    for (int j = 0; j < TAPS; j++) read_channels(weights[j], floats(p.conv_weight) + j * channels + channel);
    if (p.conv_bias) read_channels(bias, floats(p.conv_bias) + channel);
    const Step step = shared_step(p, shared_memory());
    const int n_rows = min(ROWS, int(step.rows) - first);
    const i64 place = place_of_inputs(p, step, first, channel);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int j = 0; j < before; j++)
            if (r < n_rows) read_channels(old[r][j], step.conv + place + (r * before + j) * channels);
    let_next_start();
    wait_for_previous();
    if (n_rows <= 0) return;
    const Element* from = reinterpret_cast<const Element*>(p.x.data) + first * p.x.stride + channel;
    Vector x[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        x[r] = read_ahead(reinterpret_cast<const Vector*>(from + min(r, n_rows - 1) * p.x.stride));
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= n_rows) break;
        read<DTYPE>(old[r][before], reinterpret_cast<const Element*>(&x[r]));
#pragma unroll
        for (int j = 0; j < before; j++)
            write_channels(step.new_conv + place + (r * before + j) * channels, old[r][j + 1]);
        Channels u;
#pragma unroll
        for (int c = 0; c < WIDTH; c++) {
            Inputs inputs = {}, of_inputs = {};
#pragma unroll
            for (int j = 0; j < before; j++) inputs[j] = old[r][j][c], of_inputs[j] = weights[j][c];
            u[c] = convolved(inputs, old[r][before][c], of_inputs, weights[before][c], bias[c], before);
        }
        write<DTYPE>(reinterpret_cast<Element*>(p.u.data) + (first + r) * p.u.stride + channel, u);
    }
}
