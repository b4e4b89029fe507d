// The causal convolution of any width in float32 or float64.
//
//     y[t] = act(bias + sum_i weight[i] x[t - width + 1 + i])
//
// A thread has RUN neighbouring tokens of a channel. It goes through the taps RUN at a time and keeps the RUN values
// that the next ones need again: a number that is read is used RUN times. Where a run has tokens of several sequences
// each token is computed by itself.
//
// Backward: `slopes` takes dy through the activation, `inputs` and `states` spread that over the taps, `weights` sums
// it with the inputs over a piece of time for RUN taps of a channel, and `sum_parts` adds the pieces in their order.
//
// Launch: 128 threads, neighbouring threads neighbouring channels. The weight's channels lie next to each other.
//
// Needs DOUBLE.
#include "parameters.cuh"

#if DOUBLE
typedef double R;
#else
typedef float R;
#endif

constexpr int THREADS = 128, RUN = 8;
constexpr i64 ALL = i64(1) << 62;

typedef R Numbers[RUN];

DEVICE i64 index_of_thread() { return i64(blockIdx.x) * THREADS + threadIdx.x; }
DEVICE R sigmoid(R x) { return R(1) / (R(1) + exp(-x)); }

// A division with its rest. In 32 bits, where they suffice, it takes a fraction of the time.
struct Parts {
    i64 whole, rest;

    DEVICE Parts(i64 index, i64 by) {
        const bool is_short = (u64(index) | u64(by)) >> 32 == 0;
        whole = is_short ? i64(u32(index) / u32(by)) : index / by;
        rest = index - whole * by;
    }
};

struct Place {  // of a run
    i64 row, first, channel;
    int count;  // of its tokens that exist
    bool inside;
};
DEVICE Place place_of(const Parameters& p, i64 index) {
    const i64 runs = (p.length + RUN - 1) / RUN;
    const Parts channels(index, p.d_inner), rows(channels.whole, runs);
    const i64 first = rows.rest * RUN;
    return {rows.whole, first, channels.rest, int(min(i64(RUN), p.length - first)), rows.whole < p.batch};
}
DEVICE i64 index_of(const Rows& rows, const Place& at, int i) {
    return at.row * rows.batch + (at.first + i) * rows.length + at.channel;
}
DEVICE i64 index_of_slope(const Parameters& p, i64 row, i64 t, i64 channel) {
    return (row * p.length + t) * p.d_inner + channel;
}
DEVICE R slope_at(const Parameters& p, const Sequence& s, i64 t, i64 channel) {
    return reinterpret_cast<const R*>(p.slopes)[index_of_slope(p, row_of(p, s), t, channel)];
}

// RUN numbers that are `stride` apart. All are asked for before one is used.
template <int TYPE>
DEVICE void read_numbers_of(Numbers& out, const u8* data, i64 index, i64 stride) {
#pragma unroll
    for (int k = 0; k < RUN; k++) out[k] = read_as<R>(data, index + k * stride, TYPE);
}
DEVICE void read_numbers(Numbers& out, const u8* data, i64 index, i64 stride, i64 dtype) {
    switch (dtype) {
        case FLOAT32: return read_numbers_of<FLOAT32>(out, data, index, stride);
        case FLOAT64: return read_numbers_of<FLOAT64>(out, data, index, stride);
        case BFLOAT16: return read_numbers_of<BFLOAT16>(out, data, index, stride);
        default: return read_numbers_of<FLOAT16>(out, data, index, stride);
    }
}

// What a run sees: its tokens, those before them and the initial state, from token `first` on. Later ones are zeros.
struct Inputs {
    const Parameters& p;
    const Sequence& s;
    i64 channel, first;

    DEVICE void get(Numbers& out, i64 i) const {
        const i64 t = first + i;
        if (t >= s.start && t + RUN <= s.end) {
            const i64 index = row_of(p, s) * p.x.batch + t * p.x.length + channel;
            return read_numbers(out, p.x.data, index, p.x.length, p.x.dtype);
        }
#pragma unroll 1
        for (int k = 0; k < RUN; k++) put(out, k, t + k < s.end ? input_at<R>(p, s, t + k, channel) : R(0));
    }
    // An index that is known at run time would put the numbers into memory.
    DEVICE static void put(Numbers& out, int index, R value) {
#pragma unroll
        for (int k = 0; k < RUN; k++) out[k] = k == index ? value : out[k];
    }
};
struct Slopes {
    const Parameters& p;
    const Sequence& s;
    i64 channel, first;

    DEVICE void get(Numbers& out, i64 i) const {
        const i64 t = first + i, index = index_of_slope(p, row_of(p, s), t, channel);
        const R* from = reinterpret_cast<const R*>(p.slopes) + index;
#pragma unroll
        for (int k = 0; k < RUN; k++) out[k] = t + k < s.end ? from[k * p.d_inner] : R(0);
    }
};

// A channel's weights from tap i on, in their order or from the last one back.
struct Weights {
    const Parameters& p;
    i64 channel;
    bool backwards;

    DEVICE void get(Numbers& out, i64 i) const {
        const i64 stride = backwards ? -p.weight.length : p.weight.length, tap = backwards ? p.width - 1 - i : i;
        const i64 index = channel * p.weight.batch + tap * p.weight.length;
        if (i + RUN <= p.width) return read_numbers(out, p.weight.data, index, stride, p.weight.dtype);
#pragma unroll
        for (int k = 0; k < RUN; k++)
            out[k] = i + k < p.width ? read_as<R>(p.weight.data, index + k * stride, int(p.weight.dtype)) : R(0);
    }
};

// sums[j] += factors[k] value[k + j] for the first `count` of RUN factors, and values of which `n_values` take part.
template <bool WHOLE>
DEVICE void add_run(Numbers& sums, const Numbers& factors, const Numbers& now, const Numbers& next, i64 count,
                    i64 n_values) {
#pragma unroll
    for (int k = 0; k < RUN; k++)
#pragma unroll
        for (int j = 0; j < RUN; j++)
            if (WHOLE || (k < count && k + j < n_values))
                sums[j] += factors[k] * (k + j < RUN ? now[(k + j) % RUN] : next[(k + j) % RUN]);
}

// sums[j] += sum over i < count of factor[i] value[i + j]; only the first `n_values` values take part.
template <typename Factors, typename Values>
DEVICE void add_products(Numbers& sums, i64 count, const Factors& factors, const Values& values, i64 n_values) {
    Numbers now, next, some;
    values.get(now, 0);
#pragma unroll 1
    for (i64 i = 0; i < count; i += RUN) {
        values.get(next, i + RUN);
        factors.get(some, i);
        if (i + RUN <= count && i + 2 * RUN - 1 <= n_values) {
            add_run<true>(sums, some, now, next, RUN, 2 * RUN);
        } else {
            add_run<false>(sums, some, now, next, count - i, n_values - i);
        }
#pragma unroll
        for (int k = 0; k < RUN; k++) now[k] = next[k];
    }
}

// The sums over taps of a run, before the activation.
DEVICE void sums_of_run(Numbers& sums, const Parameters& p, const Place& at) {
    const Sequence s = sequence_at(p, at.row, at.first);
    const R bias = bias_at<R>(p, at.channel);
#pragma unroll
    for (int j = 0; j < RUN; j++) sums[j] = bias;
    if (at.first + at.count <= s.end) {
        const Inputs inputs = {p, s, at.channel, at.first - p.width + 1};
        return add_products(sums, p.width, Weights{p, at.channel, false}, inputs, ALL);
    }
#pragma unroll 1
    for (int j = 0; j < at.count; j++) {
        const i64 t = at.first + j;
        Inputs::put(sums, j, sum_of_taps<R>(p, sequence_at(p, at.row, t), t, at.channel));
    }
}

KERNEL(THREADS, 1) forward(PARAMETER Parameters p) {
    if (i64(blockIdx.x) >= p.n_blocks) return put_last_state(p, index_of_thread() - p.n_blocks * THREADS);
    const Place at = place_of(p, index_of_thread());
    if (!at.inside) return;
    Numbers sums;
    sums_of_run(sums, p, at);
#pragma unroll
    for (int j = 0; j < RUN; j++) {
        const R y = p.silu ? sums[j] * sigmoid(sums[j]) : sums[j];
        if (j < at.count) write_as<R>(p.y.data, index_of(p.y, at, j), int(p.y.dtype), y);
    }
}

KERNEL(THREADS, 1) slopes(PARAMETER Parameters p) {
    const Place at = place_of(p, index_of_thread());
    if (!at.inside) return;
    Numbers sums;
    if (p.silu) sums_of_run(sums, p, at);
#pragma unroll
    for (int j = 0; j < RUN; j++) {
        if (j >= at.count) continue;
        R slope = read_as<R>(p.dy.data, index_of(p.dy, at, j), int(p.dy.dtype));
        if (p.silu) {
            const R gate = sigmoid(sums[j]);
            slope *= gate * (R(1) + sums[j] * (R(1) - gate));
        }
        reinterpret_cast<R*>(p.slopes)[index_of_slope(p, at.row, at.first + j, at.channel)] = slope;
    }
}

// The gradient of the input at a token.
DEVICE R gradient_at(const Parameters& p, const Sequence& s, i64 t, i64 channel) {
    R sum = from_last_state<R>(p, s, t, channel);
    for (i64 i = 0; i < p.width && t + i < s.end; i++)
        sum += weight_at<R>(p, channel, p.width - 1 - i) * slope_at(p, s, t + i, channel);
    return sum;
}

KERNEL(THREADS, 1) inputs(PARAMETER Parameters p) {
    const Place at = place_of(p, index_of_thread());
    if (!at.inside) return;
    const Sequence s = sequence_at(p, at.row, at.first);
    Numbers sums = {};
    if (at.first + at.count <= s.end) {
#pragma unroll
        for (int j = 0; j < RUN; j++)
            if (j < at.count) sums[j] = from_last_state<R>(p, s, at.first + j, at.channel);
        const Slopes slopes = {p, s, at.channel, at.first};
        add_products(sums, p.width, Weights{p, at.channel, true}, slopes, s.end - at.first);
    } else {
#pragma unroll 1
        for (int j = 0; j < at.count; j++) {
            const i64 t = at.first + j;
            Inputs::put(sums, j, gradient_at(p, sequence_at(p, at.row, t), t, at.channel));
        }
    }
#pragma unroll
    for (int j = 0; j < RUN; j++)
        if (j < at.count) write_as<R>(p.dx.data, index_of(p.dx, at, j), int(p.dx.dtype), sums[j]);
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

// One thread a part, RUN taps and a channel; the last one of a part has the bias.
KERNEL(THREADS, 1) weights(PARAMETER Parameters p) {
    const i64 groups = (p.width + RUN - 1) / RUN + 1;
    const Parts channels(index_of_thread(), p.d_inner), taps(channels.whole, groups), rows(taps.whole, p.n_groups);
    const i64 part = taps.whole, channel = channels.rest, row = rows.whole;
    if (part >= p.n_parts) return;
    const i64 begin = rows.rest * p.piece, end = min(p.length, begin + p.piece), tap = taps.rest * RUN;
    R* to = reinterpret_cast<R*>(p.parts) + part * (p.width + 1) * p.d_inner + channel;
    if (taps.rest == groups - 1) {
        R sum = R(0);
        for (i64 t = begin; t < end; t++)
            sum += reinterpret_cast<const R*>(p.slopes)[index_of_slope(p, row, t, channel)];
        to[p.width * p.d_inner] = sum;
        return;
    }
    Numbers sums = {};
    for (i64 t = begin; t < end;) {
        const Sequence s = sequence_at(p, row, t);
        const i64 stop = s.end <= t ? end : min(end, s.end);  // offsets that fall lead nowhere
        const Inputs inputs = {p, s, channel, t - p.width + 1 + tap};
        add_products(sums, stop - t, Slopes{p, s, channel, t}, inputs, ALL);
        t = stop;
    }
#pragma unroll
    for (int k = 0; k < RUN; k++)
        if (tap + k < p.width) to[(tap + k) * p.d_inner] = sums[k];
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
