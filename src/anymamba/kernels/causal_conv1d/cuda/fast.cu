// The causal convolution of up to four taps in float32, for tokens of one dtype: at the speed of memory.
//
//     y[t] = act(bias + sum_i weight[i] x[t - width + 1 + i])
//
// A lane has four neighbouring channels and a warp 128; a warp takes a piece of time and keeps the last three inputs in
// registers, so that each token is read once (and three more before the piece).
// Backward runs forwards in time: the gradient of a token is complete three tokens later, when it is written. Taps are
// counted so that the fourth is the present; narrower weights leave the first ones out, and what these would see, too.
//
// Where sequences are packed a piece is cut where one begins. Sums over time are added warp by warp in a block, then
// block by block in `sum_parts`.
//
// Launch: 128 threads. Blocks after p.n_blocks write states: last_state, or the gradient of initial_state.
//
// Needs DTYPE.
#include "parameters.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS, CHANNELS = 4, LANES = 32, BLOCK_CHANNELS = LANES * CHANNELS, TAPS = 4;
// Tokens that are asked for at once.
template <bool ALIGNED>
constexpr int AHEAD = ALIGNED ? 8 : 2;
template <bool ALIGNED>
constexpr int AHEAD_BACKWARD = ALIGNED ? 4 : 1;

typedef ElementOf<DTYPE>::Type Element;
typedef float Four[CHANNELS];

struct Place {
    i64 row, group;  // of pieces
    i64 channel;     // of the lane
    int count;       // of its channels that exist
    i64 begin, end;  // tokens of the warp's piece
};
DEVICE Place place_of_warp(const Parameters& p) {
    const i64 blocks = (p.d_inner + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS, index = i64(blockIdx.x);
    Place at;
    at.row = index / blocks / p.n_groups, at.group = index / blocks % p.n_groups;
    at.channel = index % blocks * BLOCK_CHANNELS + threadIdx.x % LANES * CHANNELS;
    at.count = int(max(i64(0), min(i64(CHANNELS), p.d_inner - at.channel)));
    at.begin = min(p.length, (at.group * WARPS + threadIdx.x / LANES) * p.piece);
    at.end = min(p.length, at.begin + p.piece);
    return at;
}

template <bool ALIGNED>
DEVICE void get(Four& out, const Element* from, int count) {
    if constexpr (ALIGNED) {
        if (count > 0) read<DTYPE>(out, from);
    } else {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            float value[1] = {0.f};
            if (i < count) read<DTYPE>(value, from + i);
            out[i] = value[0];
        }
    }
}
template <bool ALIGNED>
DEVICE void put(Element* to, const Four& values, int count) {
    if constexpr (ALIGNED) {
        if (count > 0) write<DTYPE>(to, values);
    } else {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            const float value[1] = {values[i]};
            if (i < count) write<DTYPE>(to + i, value);
        }
    }
}
DEVICE void copy(Four& to, const Four& from) {
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) to[i] = from[i];
}

// The row of a tensor that the lane works on, from token t.
DEVICE Element* row_at(const Rows& rows, const Place& at, i64 t) {
    return reinterpret_cast<Element*>(rows.data) + at.row * rows.batch + t * rows.length + at.channel;
}
DEVICE i64 lane_state(const Parameters& p, const Place& at, i64 sequence, i64 k) {
    return state_index(p, sequence, k, at.channel);
}

// Four channels of the weights, in the order of the taps, with the bias as the last row.
struct Weights {
    Four of[TAPS], bias;
};
DEVICE void put_weights_in_shared(const Parameters& p, const Place& at) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    const i64 first = at.channel - threadIdx.x % LANES * CHANNELS;
    const int skipped = TAPS - int(p.width);
    for (int i = threadIdx.x; i < BLOCK_CHANNELS * (TAPS + 1); i += THREADS) {
        const int channel = i / (TAPS + 1), tap = i % (TAPS + 1);
        const bool inside = first + channel < p.d_inner && tap >= skipped;
        float value = 0.f;
        if (inside)
            value = tap == TAPS ? bias_at<float>(p, first + channel) : weight_at<float>(p, first + channel, tap - skipped);
        shared[tap * BLOCK_CHANNELS + channel] = value;
    }
    sync_block();
}
DEVICE Weights weights_of_lane() {
    const float* shared = reinterpret_cast<const float*>(shared_memory()) + threadIdx.x % LANES * CHANNELS;
    Weights w;
#pragma unroll
    for (int i = 0; i < TAPS; i++) read<FLOAT32>(w.of[i], shared + i * BLOCK_CHANNELS);
    read<FLOAT32>(w.bias, shared + TAPS * BLOCK_CHANNELS);
    return w;
}

// The sequence of token t: all lanes look at offsets at once, 32 at a time.
DEVICE Sequence find_sequence(const Parameters& p, i64 row, i64 t) {
    if (!p.offsets) return {row, 0, p.length};
    const int lane = threadIdx.x % LANES;
    i64 low = 0, count = p.n_sequences;  // it is one of these
    while (count > 1) {
        const i64 step = (count + LANES - 1) / LANES;
        const int last = max(0, last_bit(ballot(lane * step < count && offset_at(p, low + lane * step) <= t)));
        low += last * step;
        count = min(step, count - last * step);
    }
    Sequence s = sequence_by(p, low);
    if (s.end <= t) s.end = p.length;  // these were no offsets
    return s;
}
// The same for the first token after a sequence: mostly the next one's.
DEVICE Sequence sequence_after(const Parameters& p, const Sequence& before, i64 t) {
    const Sequence next = sequence_by(p, before.index + 1);
    if (before.index + 1 < p.n_sequences && next.start <= t && t < next.end) return next;
    return find_sequence(p, 0, t);
}

// The three inputs before token t.
template <bool ALIGNED>
DEVICE void get_window(Four (&window)[TAPS - 1], const Parameters& p, const Place& at, const Sequence& s, i64 t) {
#pragma unroll
    for (int i = 0; i < TAPS - 1; i++) {
        const i64 from = t - (TAPS - 1) + i, k = from - s.start + p.width - 1;
        Four none = {};
        copy(window[i], none);
        if (from >= s.start) {
            get<ALIGNED>(window[i], row_at(p.x, at, from), at.count);
        } else if (p.initial_state && k >= 0) {
            const Element* state = reinterpret_cast<const Element*>(p.initial_state);
            get<ALIGNED>(window[i], state + lane_state(p, at, s.index, k), at.count);
        }
    }
}
DEVICE void shift(Four (&window)[TAPS - 1], const Four& x) {
    copy(window[0], window[1]), copy(window[1], window[2]), copy(window[2], x);
}

// The sum over taps for the present input x.
DEVICE void sum_over_taps(Four& sum, const Weights& w, const Four (&window)[TAPS - 1], const Four& x, int width) {
    copy(sum, w.bias);
#pragma unroll
    for (int tap = 0; tap < TAPS - 1; tap++)
        if (width >= TAPS - tap) {
#pragma unroll
            for (int i = 0; i < CHANNELS; i++) sum[i] = fmaf(w.of[tap][i], window[tap][i], sum[i]);
        }
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) sum[i] = fmaf(w.of[TAPS - 1][i], x[i], sum[i]);
}

// ------------------------------------------------------------------------------------------------ forward

template <bool ALIGNED>
DEVICE void forward_piece(const Parameters& p) {
    constexpr int N = AHEAD<ALIGNED>;
    const Place at = place_of_warp(p);
    put_weights_in_shared(p, at);
    const Weights w = weights_of_lane();
    const int width = int(p.width);
    const bool silu = p.silu;
    if (at.begin >= at.end) return;
    Four window[TAPS - 1];
    Sequence s = find_sequence(p, at.row, at.begin);
    for (i64 t = at.begin;;) {
        const i64 stop = min(at.end, s.end);
        get_window<ALIGNED>(window, p, at, s, t);
        const Element* x = row_at(p.x, at, t);
        Element* y = row_at(p.y, at, t);
        for (int left = int(stop - t); left > 0; left -= N) {
            Four some[N] = {};
#pragma unroll
            for (int i = 0; i < N; i++)
                if (i < left) get<ALIGNED>(some[i], x + i * p.x.length, at.count);
            x += N * p.x.length;
#pragma unroll
            for (int i = 0; i < N; i++) {
                Four sum;
                sum_over_taps(sum, w, window, some[i], width);
                shift(window, some[i]);
                if (silu) {
#pragma unroll
                    for (int c = 0; c < CHANNELS; c++) sum[c] *= sigmoid_fast(sum[c]);
                }
                if (i < left) put<ALIGNED>(y, sum, at.count);
                y += p.y.length;
            }
        }
        t = stop;
        if (t >= at.end) return;
        s = sequence_after(p, s, t);
    }
}

KERNEL(THREADS, 5) forward(PARAMETER Parameters p) {
    if (i64(blockIdx.x) >= p.n_blocks) {
        put_last_state(p, (i64(blockIdx.x) - p.n_blocks) * THREADS + threadIdx.x);
    } else if (p.aligned) {
        forward_piece<true>(p);
    } else {
        forward_piece<false>(p);
    }
}

// ------------------------------------------------------------------------------------------------ backward

// A lane's gradients of weights, and those of the last three inputs as far as they are known.
struct Sums {
    Four of[TAPS], bias, pending[TAPS - 1];
};

struct Span {  // what a warp writes at a time: tokens of one sequence, counted from its first one
    int tokens;
    int last_state;  // from here on the gradient of the last state adds to them
};

template <bool ALIGNED>
DEVICE void write_gradient(const Parameters& p, const Place& at, const Sequence& s, const Span& span, Element* dx,
                           int t, const Four& known) {
    Four sum;
    copy(sum, known);
    if (t >= span.last_state) {
        const i64 k = t - span.last_state;
        Four more = {};
        const Element* state = reinterpret_cast<const Element*>(p.dlast_state);
        if (k < p.width - 1) get<ALIGNED>(more, state + lane_state(p, at, s.index, k), at.count);
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) sum[i] += more[i];
    }
    put<ALIGNED>(dx + t * p.dx.length, sum, at.count);
}

// The gradient before the activation.
DEVICE void take_through_activation(Four& slope, const Four& sum) {
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
        const float gate = sigmoid_fast(sum[i]);
        slope[i] *= gate * fmaf(sum[i], 1.f - gate, 1.f);
    }
}

// One token: its part in the gradients of the inputs that it saw and, if it is the span's own, of the weights.
DEVICE void add_token(Sums& sums, Four& finished, const Weights& w, Four (&window)[TAPS - 1], const Four& x, Four& slope,
                      int width, bool silu, bool is_own) {
    if (silu) {
        Four sum;
        sum_over_taps(sum, w, window, x, width);
        take_through_activation(slope, sum);
    }
    copy(finished, sums.pending[0]);
    copy(sums.pending[0], sums.pending[1]), copy(sums.pending[1], sums.pending[2]);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
        if (width > 3) finished[i] = fmaf(w.of[0][i], slope[i], finished[i]);
        if (width > 2) sums.pending[0][i] = fmaf(w.of[1][i], slope[i], sums.pending[0][i]);
        if (width > 1) sums.pending[1][i] = fmaf(w.of[2][i], slope[i], sums.pending[1][i]);
        sums.pending[2][i] = w.of[3][i] * slope[i];
    }
    if (is_own) {
#pragma unroll
        for (int tap = 0; tap < TAPS - 1; tap++)
            if (width >= TAPS - tap) {
#pragma unroll
                for (int i = 0; i < CHANNELS; i++) sums.of[tap][i] = fmaf(slope[i], window[tap][i], sums.of[tap][i]);
            }
#pragma unroll
        for (int i = 0; i < CHANNELS; i++)
            sums.of[TAPS - 1][i] = fmaf(slope[i], x[i], sums.of[TAPS - 1][i]), sums.bias[i] += slope[i];
    }
    shift(window, x);
}

// The tokens from t to `stop`, all of sequence s.
template <bool ALIGNED>
DEVICE void backward_span(Sums& sums, const Parameters& p, const Place& at, const Sequence& s, const Weights& w, i64 t,
                          i64 stop) {
    constexpr int N = AHEAD_BACKWARD<ALIGNED>;
    const int width = int(p.width);
    const bool silu = p.silu;
    const i64 last = p.dlast_state ? s.end - p.width + 1 - t : i64(1) << 30;
    const Span span = {int(stop - t), int(max(-i64(1) << 30, min(last, i64(1) << 30)))};
    const int end = int(min(stop + width - 1, s.end) - t);  // later tokens have seen none of the span
    Four window[TAPS - 1];
    get_window<ALIGNED>(window, p, at, s, t);
#pragma unroll
    for (int i = 0; i < TAPS - 1; i++) {
        Four none = {};
        copy(sums.pending[i], none);
    }
    const Element *x = row_at(p.x, at, t), *dy = row_at(p.dy, at, t);
    Element* dx = row_at(p.dx, at, t);
    int done = 0;
    for (; done + N <= span.tokens; done += N) {
        Four xs[N], slopes[N];
#pragma unroll
        for (int i = 0; i < N; i++) {
            get<ALIGNED>(xs[i], x + i * p.x.length, at.count);
            get<ALIGNED>(slopes[i], dy + i * p.dy.length, at.count);
        }
        x += N * p.x.length, dy += N * p.dy.length;
#pragma unroll
        for (int i = 0; i < N; i++) {
            Four finished;
            add_token(sums, finished, w, window, xs[i], slopes[i], width, silu, true);
            if (done + i >= TAPS - 1)
                write_gradient<ALIGNED>(p, at, s, span, dx, done + i - (TAPS - 1), finished);
        }
    }
#pragma unroll 1
    for (; done < end; done++) {
        Four now = {}, slope = {}, finished;
        get<ALIGNED>(now, x, at.count);
        get<ALIGNED>(slope, dy, at.count);
        x += p.x.length, dy += p.dy.length;
        add_token(sums, finished, w, window, now, slope, width, silu, done < span.tokens);
        if (done >= TAPS - 1) write_gradient<ALIGNED>(p, at, s, span, dx, done - (TAPS - 1), finished);
    }
#pragma unroll
    for (int i = 0; i < TAPS - 1; i++) {
        const int t_of = done - (TAPS - 1) + i;
        if (t_of >= 0 && t_of < span.tokens) write_gradient<ALIGNED>(p, at, s, span, dx, t_of, sums.pending[i]);
    }
}

// The block's part of the gradients of the weights.
DEVICE void write_parts(const Sums& sums, const Parameters& p, const Place& at) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    constexpr int SIZE = (TAPS + 1) * BLOCK_CHANNELS;
    sync_block();  // the weights have been read
#pragma unroll
    for (int i = 0; i < TAPS; i++) write<FLOAT32>(shared + warp * SIZE + i * BLOCK_CHANNELS + lane * CHANNELS, sums.of[i]);
    write<FLOAT32>(shared + warp * SIZE + TAPS * BLOCK_CHANNELS + lane * CHANNELS, sums.bias);
    sync_block();
    const i64 first = at.channel - lane * CHANNELS, part = at.row * p.n_groups + at.group;
    for (int i = threadIdx.x; i < SIZE; i += THREADS) {
        float sum = 0.f;
#pragma unroll
        for (int k = 0; k < WARPS; k++) sum += shared[k * SIZE + i];
        const i64 tap = i / BLOCK_CHANNELS, channel = first + i % BLOCK_CHANNELS;
        if (channel < p.d_inner) reinterpret_cast<float*>(p.parts)[(part * (TAPS + 1) + tap) * p.d_inner + channel] = sum;
    }
}

template <bool ALIGNED>
DEVICE void backward_piece(const Parameters& p) {
    const Place at = place_of_warp(p);
    put_weights_in_shared(p, at);
    const Weights w = weights_of_lane();
    Sums sums = {};
    if (at.begin < at.end) {
        Sequence s = find_sequence(p, at.row, at.begin);
        for (i64 t = at.begin;;) {
            const i64 stop = min(at.end, s.end);
            backward_span<ALIGNED>(sums, p, at, s, w, t, stop);
            t = stop;
            if (t >= at.end) break;
            s = sequence_after(p, s, t);
        }
    }
    write_parts(sums, p, at);
}

// The gradient of the sum over taps at a token.
DEVICE float slope_at(const Parameters& p, const Sequence& s, i64 t, i64 channel) {
    float slope = read_as<float>(p.dy.data, row_of(p, s) * p.dy.batch + t * p.dy.length + channel, DTYPE);
    if (p.silu) {
        const float sum = sum_of_taps<float>(p, s, t, channel), gate = sigmoid_fast(sum);
        slope *= gate * fmaf(sum, 1.f - gate, 1.f);
    }
    return slope;
}
// The gradient of an initial state, from the few tokens that saw it; `index` counts its elements.
CALLED void put_initial_state(const Parameters& p, i64 index) {
    if (index >= p.n_sequences * (p.width - 1) * p.d_inner) return;
    const i64 channel = index % p.d_inner, k = index / p.d_inner % (p.width - 1);
    const Sequence s = sequence_by(p, index / p.d_inner / (p.width - 1));
    float sum = p.dlast_state ? from_last_state<float>(p, s, s.start - p.width + 1 + k, channel) : 0.f;
    for (i64 i = 0; i <= k && s.start + i < s.end; i++)
        sum = fmaf(weight_at<float>(p, channel, k - i), slope_at(p, s, s.start + i, channel), sum);
    write_as<float>(p.dinitial_state, index, DTYPE, sum);
}

KERNEL(THREADS, 4) backward(PARAMETER Parameters p) {
    if (i64(blockIdx.x) >= p.n_blocks) {
        put_initial_state(p, (i64(blockIdx.x) - p.n_blocks) * THREADS + threadIdx.x);
    } else if (p.aligned) {
        backward_piece<true>(p);
    } else {
        backward_piece<false>(p);
    }
}

KERNEL(32 * WAYS, 1) sum_parts(PARAMETER Parameters p) { sum_parts_of_block<float>(p); }

// ------------------------------------------------------------------------------------------------ step

DEVICE float one(const void* data, i64 index) {
    float value[1];
    read<DTYPE>(value, static_cast<const Element*>(data) + index);
    return value[0];
}

// One token; one thread a row and channel.
KERNEL(THREADS, 8) step(PARAMETER Parameters p) {
    const i64 index = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (index >= p.batch * p.d_inner) return;
    const i64 row = index / p.d_inner, channel = index % p.d_inner;
    const int width = int(p.width), skipped = TAPS - width;
    float seen[TAPS] = {}, weight[TAPS] = {};
#pragma unroll
    for (int i = 0; i < TAPS; i++) {
        if (i < skipped) continue;
        weight[i] = weight_at<float>(p, channel, i - skipped);
        if (i == TAPS - 1) {
            seen[i] = one(p.x.data, row * p.x.batch + channel);
        } else if (p.initial_state) {
            seen[i] = one(p.initial_state, state_index(p, row, i - skipped, channel));
        }
    }
    float sum = bias_at<float>(p, channel);
#pragma unroll
    for (int i = 0; i < TAPS; i++)
        if (i >= skipped) sum = fmaf(weight[i], seen[i], sum);
    if (p.silu) sum *= sigmoid_fast(sum);
    const float y[1] = {sum};
    write<DTYPE>(reinterpret_cast<Element*>(p.y.data) + row * p.y.batch + channel, y);
#pragma unroll
    for (int i = 1; i < TAPS; i++) {
        const float value[1] = {seen[i]};
        if (i > skipped)
            write<DTYPE>(reinterpret_cast<Element*>(p.last_state) + state_index(p, row, i - 1 - skipped, channel), value);
    }
}
