// What a step of many rows does beside products, and how every step begins.
//
//     embed      the rows of the table for the ids, and what changes from step to step
//     convolve   u = silu(convolution of x), and the convolution's new state
//
// Launch: 256 threads; a block for each row of the bucket (embed), or early, for all channels of all rows (convolve).
//
// Needs DTYPE, the type of activations, and TAPS of the convolution.
#include "parameters.cuh"

constexpr int THREADS = 256;
typedef ElementOf<DTYPE>::Type Element;

// An id outside the table gives a row that is not a number, padding gives zeros.
KERNEL(THREADS, 4) embed(PARAMETER Parameters p) {
    const int row = int(blockIdx.x);
    if (row == 0 && threadIdx.x == 0)
        *reinterpret_cast<Step*>(p.step) = {p.rows,           floats(p.conv),    floats(p.ssm),
                                            floats(p.new_conv), floats(p.new_ssm), floats(p.logits)};
    if (!p.table) return;
    float* to = floats(p.y.data) + row * p.y.stride;
    i64 id = 0;
    if (row < p.rows) id = p.ids_are_long ? reinterpret_cast<const i64*>(p.ids)[row]
                                          : i64(reinterpret_cast<const int*>(p.ids)[row]);
    const bool known = id >= 0 && id < p.n_ids;
    for (int i = threadIdx.x; i < p.size; i += THREADS) {
        if (row >= p.rows)
            to[i] = 0.f;
        else
            to[i] = known ? read_as<float>(p.table, id * p.n_in + i, int(p.table_dtype)) : bits_as_float(0x7fc00000u);
    }
}

KERNEL(THREADS, 4) convolve_rows(PARAMETER Parameters p) {
    const int channels = int(p.d_inner), i = int(blockIdx.x) * THREADS + int(threadIdx.x);
    const Step step = shared_step(p, shared_memory());
    const int row = i / channels, channel = i % channels;
    const bool inside = row < step.rows;
    Inputs old;
    if (inside) read_inputs(old, p, step, row, channel);
    let_next_start();
    wait_for_previous();
    if (!inside) return;
    const Element from = read_ahead(reinterpret_cast<const Element*>(p.x.data) + row * p.x.stride + channel);
    float x[1];
    read<DTYPE>(x, &from);
    x[0] = convolve(old, x[0], p, step, row, channel);
    write<DTYPE>(reinterpret_cast<Element*>(p.u.data) + row * p.u.stride + channel, x);
}
