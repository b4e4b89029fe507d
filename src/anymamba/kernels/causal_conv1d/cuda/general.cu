// The causal convolution of any width in float32 or float64: one thread a number, taps one after the other.
//
//     y[t] = act(bias + sum_i weight[i] x[t - width + 1 + i])
//
// Backward: `slopes` takes dy through the activation, `inputs` and `states` spread that over the taps, `weights` sums
// it with the inputs over a piece of time, and `sum_parts` adds the pieces in their order.
//
// Launch: 128 threads, neighbouring threads neighbouring channels, so that taps are read from the first-level cache.
//
// Needs DOUBLE.
#include "parameters.cuh"

#if DOUBLE
typedef double R;
#else
typedef float R;
#endif

constexpr int THREADS = 128;

DEVICE i64 index_of_thread() { return i64(blockIdx.x) * THREADS + threadIdx.x; }
DEVICE R sigmoid(R x) { return R(1) / (R(1) + exp(-x)); }

struct Place {
    i64 row, t, channel;
    bool inside;
};
DEVICE Place place_of(const Parameters& p, i64 index) {
    return {index / p.d_inner / p.length, index / p.d_inner % p.length, index % p.d_inner,
            index < p.batch * p.length * p.d_inner};
}
DEVICE i64 index_of(const Rows& rows, const Place& at) { return at.row * rows.batch + at.t * rows.length + at.channel; }

DEVICE R slope_at(const Parameters& p, const Sequence& s, i64 t, i64 channel) {
    return reinterpret_cast<const R*>(p.slopes)[(row_of(p, s) * p.length + t) * p.d_inner + channel];
}

KERNEL(THREADS, 1) forward(PARAMETER Parameters p) {
    if (i64(blockIdx.x) >= p.n_blocks) return put_last_state(p, index_of_thread() - p.n_blocks * THREADS);
    const Place at = place_of(p, index_of_thread());
    if (!at.inside) return;
    const R sum = sum_of_taps<R>(p, sequence_at(p, at.row, at.t), at.t, at.channel);
    write_as<R>(p.y.data, index_of(p.y, at), int(p.y.dtype), p.silu ? sum * sigmoid(sum) : sum);
}

KERNEL(THREADS, 1) slopes(PARAMETER Parameters p) {
    const i64 index = index_of_thread();
    const Place at = place_of(p, index);
    if (!at.inside) return;
    R slope = read_as<R>(p.dy.data, index_of(p.dy, at), int(p.dy.dtype));
    if (p.silu) {
        const R sum = sum_of_taps<R>(p, sequence_at(p, at.row, at.t), at.t, at.channel), gate = sigmoid(sum);
        slope *= gate * (R(1) + sum * (R(1) - gate));
    }
    reinterpret_cast<R*>(p.slopes)[index] = slope;
}

KERNEL(THREADS, 1) inputs(PARAMETER Parameters p) {
    const Place at = place_of(p, index_of_thread());
    if (!at.inside) return;
    const Sequence s = sequence_at(p, at.row, at.t);
    R sum = from_last_state<R>(p, s, at.t, at.channel);
    for (i64 i = 0; i < p.width && at.t + i < s.end; i++)
        sum += weight_at<R>(p, at.channel, p.width - 1 - i) * slope_at(p, s, at.t + i, at.channel);
    write_as<R>(p.dx.data, index_of(p.dx, at), int(p.dx.dtype), sum);
}

KERNEL(THREADS, 1) states(PARAMETER Parameters p) {
    const i64 index = index_of_thread();
    if (index >= p.n_sequences * (p.width - 1) * p.d_inner) return;
    const i64 channel = index % p.d_inner, k = index / p.d_inner % (p.width - 1);
    const Sequence s = sequence_by(p, index / p.d_inner / (p.width - 1));
    R sum = from_last_state<R>(p, s, s.start - p.width + 1 + k, channel);
    for (i64 i = 0; i <= k && s.start + i < s.end; i++)
        sum += weight_at<R>(p, channel, k - i) * slope_at(p, s, s.start + i, channel);
    write_as<R>(p.dinitial_state, index, int(p.x.dtype), sum);
}

// One thread a part, row and channel of the parts.
KERNEL(THREADS, 1) weights(PARAMETER Parameters p) {
    const i64 index = index_of_thread(), channel = index % p.d_inner, tap = index / p.d_inner % (p.width + 1);
    const i64 part = index / p.d_inner / (p.width + 1);
    if (part >= p.n_parts) return;
    const i64 row = part / p.n_groups, begin = part % p.n_groups * p.piece, end = min(p.length, begin + p.piece);
    Sequence s = sequence_at(p, row, begin);
    R sum = R(0);
    for (i64 t = begin; t < end; t++) {
        if (t >= s.end) s = sequence_at(p, row, t);
        const R slope = slope_at(p, s, t, channel);
        sum += tap == p.width ? slope : slope * input_at<R>(p, s, t - p.width + 1 + tap, channel);
    }
    reinterpret_cast<R*>(p.parts)[index] = sum;
}

KERNEL(32 * WAYS, 1) sum_parts(PARAMETER Parameters p) { sum_parts_of_block<R>(p); }

KERNEL(THREADS, 1) step(PARAMETER Parameters p) {
    const i64 index = index_of_thread();
    if (index >= p.batch * p.d_inner) return;
    const i64 row = index / p.d_inner, channel = index % p.d_inner;
    const R sum = sum_of_taps<R>(p, {row, 0, 1}, 0, channel);
    write_as<R>(p.y.data, row * p.y.batch + channel, int(p.y.dtype), p.silu ? sum * sigmoid(sum) : sum);
    for (i64 k = 0; k < p.width - 1; k++) put_last_state(p, state_index(p, row, k, channel));
}
