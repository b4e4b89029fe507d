// The causal convolution of up to four taps in float32, for tokens of one dtype: at the speed of memory.
//
//     y[t] = act(bias + sum_i weight[i] x[t - width + 1 + i])
//
// A lane has four neighbouring channels and a warp 128; a warp takes a piece of time and keeps the last three inputs in
// registers, so that each token is read once (and three more before the piece). Groups of tokens are copied to shared
// memory ahead of the group that is worked on, so that enough bytes are on their way. A lane reads only what it has
// copied itself, so there are no barriers. PLAIN code is for a whole group of four taps with the activation, as a Mamba
// block has them: it has no branches, so that nothing is moved between registers.
// Backward runs forwards in time: the gradient of a token is complete three tokens later, when it is written. Taps are
// counted so that the fourth is the present; narrower weights leave the first ones out, and what these would see, too.
//
// Where sequences are packed a piece is cut where one begins. Sums over time are added warp by warp in a block, then
// block by block in `sum_parts`.
//
// Launch: 128 threads. Blocks after p.n_blocks write states: the last ones of a packed sequence each, or the gradients
// of initial ones.
//
// Needs DTYPE.
#include "parameters.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS, CHANNELS = 4, LANES = 32, BLOCK_CHANNELS = LANES * CHANNELS, TAPS = 4;
constexpr int GROUP = 4;                    // tokens that are copied at once, as many as taps
constexpr int AHEAD = 2;                    // groups that are on their way while one is worked on
constexpr int SLOTS = (AHEAD + 1) * GROUP;  // of a tensor: tokens that a lane has in shared memory

typedef ElementOf<DTYPE>::Type Element;
typedef float Four[CHANNELS];

struct Place {
    i64 row, group;  // of pieces
    i64 channel;     // of the lane
    int count;       // of its channels that exist
    i64 begin, end;  // tokens of the warp's piece
};
DEVICE Place place_of_warp(const Parameters& p) {
    // Divisions in 64 bits would take a tenth of the time of a short input; a grid has fewer blocks than 32 bits count.
    const u32 blocks = u32((p.d_inner + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS), n_groups = u32(p.n_groups);
    const u32 index = blockIdx.x / blocks;
    Place at;
    at.row = index / n_groups, at.group = index % n_groups;
    at.channel = i64(blockIdx.x % blocks) * BLOCK_CHANNELS + threadIdx.x % LANES * CHANNELS;
    at.count = int(max(i64(0), min(i64(CHANNELS), p.d_inner - at.channel)));
    at.begin = min(p.length, (at.group * WARPS + threadIdx.x / LANES) * p.piece);
    at.end = min(p.length, at.begin + p.piece);
    return at;
}

// Four numbers as they are in memory: what has been asked for and need not have come yet. Short ones stay in words,
// which is how they are loaded and widened.
#if DTYPE == 0
typedef float4 Packed;
DEVICE Packed nothing() { return make_float4(0.f, 0.f, 0.f, 0.f); }
DEVICE void unpack(Four& out, const Packed& in) { out[0] = in.x, out[1] = in.y, out[2] = in.z, out[3] = in.w; }
#else
typedef uint2 Packed;
DEVICE Packed nothing() { return make_uint2(0u, 0u); }
DEVICE float first_of(u32 word) { return DTYPE == BFLOAT16 ? bits_as_float(word << 16) : half_as_float(u16(word)); }
DEVICE float second_of(u32 word) {
    return DTYPE == BFLOAT16 ? bits_as_float(word & 0xffff0000u) : half_as_float(u16(word >> 16));
}
DEVICE void unpack(Four& out, const Packed& in) {
    out[0] = first_of(in.x), out[1] = second_of(in.x), out[2] = first_of(in.y), out[3] = second_of(in.y);
}
#endif
template <bool ALIGNED>
DEVICE Packed ask(const Element* from, int count) {
    Packed found = nothing();
    if constexpr (ALIGNED) {
        if (count > 0) found = *reinterpret_cast<const Packed*>(from);
    } else {
        alignas(16) Element numbers[CHANNELS] = {};
#pragma unroll
        for (int i = 0; i < CHANNELS; i++)
            if (i < count) numbers[i] = from[i];
        found = *reinterpret_cast<const Packed*>(numbers);
    }
    return found;
}

template <bool ALIGNED>
DEVICE void put(Element* to, const Four& values, int count) {
    if constexpr (ALIGNED) {
        if (count > 0) write_whole<DTYPE>(to, values);
    } else {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            const float value[1] = {values[i]};
            if (i < count) write<DTYPE>(to + i, value);
        }
    }
}
DEVICE void start_copy(Packed* shared, const Element* from) {
    if constexpr (sizeof(Packed) == 16) {
        copy_16_bytes(shared, from);
    } else {
        copy_8_bytes(shared, from);
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
// A number as it is in memory: widening waits for it, so all of a channel are asked for before one is widened.
DEVICE u32 ask_for_bits(const u8* data, i64 index, i64 dtype) {
    return dtype == FLOAT32 ? reinterpret_cast<const u32*>(data)[index] : reinterpret_cast<const u16*>(data)[index];
}
DEVICE float widened(u32 bits, i64 dtype) {
    if (dtype == FLOAT32) return bits_as_float(bits);
    return dtype == BFLOAT16 ? bits_as_float(bits << 16) : half_as_float(u16(bits));
}
// Whether a channel's weights are one aligned vector of 8 bytes.
DEVICE bool are_dense_and_short(const Parameters& p) {
    return p.width == TAPS && p.weight.batch == TAPS && p.weight.length == 1 && p.weight.dtype != FLOAT32 &&
           reinterpret_cast<u64>(p.weight.data) % 8 == 0;
}
// One thread a channel. All warps of a block call it at the same place, since it has a barrier.
DEVICE void put_weights_in_shared(const Parameters& p, const Place& at) {
    static_assert(THREADS == BLOCK_CHANNELS, "");
    float* shared = reinterpret_cast<float*>(shared_memory()) + threadIdx.x;
    const i64 channel = at.channel - threadIdx.x % LANES * CHANNELS + threadIdx.x;
    u32 taps[TAPS] = {}, bias = 0;
    if (channel < p.d_inner) {
        if (p.bias) bias = ask_for_bits(p.bias, channel, p.bias_dtype);
        if (are_dense_and_short(p)) {
            const uint2 words = reinterpret_cast<const uint2*>(p.weight.data)[channel];
            taps[0] = words.x & 0xffffu, taps[1] = words.x >> 16, taps[2] = words.y & 0xffffu, taps[3] = words.y >> 16;
        } else {
#pragma unroll
            for (int i = 0; i < TAPS; i++) {
                const int tap = i - (TAPS - int(p.width));
                const i64 index = channel * p.weight.batch + tap * p.weight.length;
                if (tap >= 0) taps[i] = ask_for_bits(p.weight.data, index, p.weight.dtype);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < TAPS; i++) shared[i * BLOCK_CHANNELS] = widened(taps[i], p.weight.dtype);
    shared[TAPS * BLOCK_CHANNELS] = widened(bias, p.bias_dtype);
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
DEVICE void ask_for_window(Packed (&window)[TAPS - 1], const Parameters& p, const Place& at, const Sequence& s, i64 t) {
    if (t - (TAPS - 1) >= s.start) {  // mostly, so without further questions
        const Element* from = row_at(p.x, at, t - (TAPS - 1));
#pragma unroll
        for (int i = 0; i < TAPS - 1; i++, from += p.x.length) window[i] = ask<ALIGNED>(from, at.count);
        return;
    }
#pragma unroll
    for (int i = 0; i < TAPS - 1; i++) {
        const i64 from = t - (TAPS - 1) + i, k = from - s.start + p.width - 1;
        window[i] = nothing();
        if (from >= s.start) {
            window[i] = ask<ALIGNED>(row_at(p.x, at, from), at.count);
        } else if (p.initial_state && k >= 0) {
            const Element* state = reinterpret_cast<const Element*>(p.initial_state);
            window[i] = ask<ALIGNED>(state + lane_state(p, at, s.index, k), at.count);
        }
    }
}
// The tokens of a span that are still to be copied, at a lane's channels.
struct Tokens {
    Packed* slots;        // the lane's, LANES apart
    const Element* from;  // the first of them
    i64 stride;
    int left, count;  // tokens, channels

    // Start to copy the next group to its slots; what does not exist is left out.
    template <bool ALIGNED>
    DEVICE void copy_group(int slot) {
        const Element* token = from;
#pragma unroll
        for (int i = 0; i < GROUP; i++, token += stride) {
            if (i >= left) continue;
            Packed* to = slots + (slot + i) * LANES;
            if constexpr (ALIGNED) {
                if (count > 0) start_copy(to, token);
            } else {
                *to = ask<false>(token, count);
            }
        }
        from += GROUP * stride, left -= GROUP;
    }
    DEVICE void get(Four& x, int slot) const { unpack(x, slots[slot * LANES]); }
};
constexpr int OF_WEIGHTS = (TAPS + 1) * BLOCK_CHANNELS * 4;  // bytes
// Of one of the block's tensors; slots begin after `before` bytes of shared memory.
DEVICE Packed* slots_of_lane(int before, int tensor, int n_tensors) {
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    return reinterpret_cast<Packed*>(shared_memory() + before) + (warp * n_tensors + tensor) * SLOTS * LANES + lane;
}
DEVICE void shift(Four (&window)[TAPS - 1], const Four& x) {
    copy(window[0], window[1]), copy(window[1], window[2]), copy(window[2], x);
}

// Whether groups of the lane may take PLAIN code, and where its tokens end: a lane without channels has none, unless
// all lanes look for sequences together.
template <bool ALIGNED>
DEVICE bool is_plain(const Parameters& p, const Place& at) {
    return ALIGNED && p.width == TAPS && p.silu && at.count > 0;
}
DEVICE i64 end_of_lane(const Parameters& p, const Place& at) { return at.count > 0 || p.offsets ? at.end : at.begin; }

// The sum over taps for the present input x.
template <bool PLAIN>
DEVICE void sum_over_taps(Four& sum, const Weights& w, const Four (&window)[TAPS - 1], const Four& x, int width) {
    copy(sum, w.bias);
#pragma unroll
    for (int tap = 0; tap < TAPS - 1; tap++)
        if (PLAIN || width >= TAPS - tap) {
#pragma unroll
            for (int i = 0; i < CHANNELS; i++) sum[i] = fmaf(w.of[tap][i], window[tap][i], sum[i]);
        }
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) sum[i] = fmaf(w.of[TAPS - 1][i], x[i], sum[i]);
}

// ------------------------------------------------------------------------------------------------ forward

// The outputs of a group of tokens, of which `left` exist.
template <bool ALIGNED, bool PLAIN>
DEVICE void forward_group(Four (&window)[TAPS - 1], const Tokens& xs, int slot, const Weights& w, const Parameters& p,
                          Element* y, i64 stride, int left, int count) {
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
        Four sum, x;
        xs.get(x, slot + i);
        sum_over_taps<PLAIN>(sum, w, window, x, int(p.width));
        if (PLAIN || i < left) shift(window, x);
        if (PLAIN || p.silu) {
#pragma unroll
            for (int c = 0; c < CHANNELS; c++) sum[c] *= sigmoid_fast(sum[c]);
        }
        if (PLAIN || i < left) put<ALIGNED>(y, sum, PLAIN ? CHANNELS : count);
        y += stride;
    }
}

// The last inputs of a row.
template <bool ALIGNED>
DEVICE void put_window(const Parameters& p, const Place& at, const Sequence& s, const Four (&window)[TAPS - 1]) {
#pragma unroll
    for (int i = 0; i < TAPS - 1; i++) {
        const i64 k = i - (TAPS - p.width);
        if (k >= 0)
            put<ALIGNED>(reinterpret_cast<Element*>(p.last_state) + lane_state(p, at, s.index, k), window[i], at.count);
    }
}

template <bool ALIGNED>
DEVICE void forward_piece(const Parameters& p, const Place& at) {
    const bool plain = is_plain<ALIGNED>(p, at);
    const i64 end = end_of_lane(p, at), stride = p.y.length;
    Sequence s = {};
    i64 stop = at.begin;
    Packed before[TAPS - 1];
    Tokens xs = {slots_of_lane(OF_WEIGHTS, 0, 1), nullptr, p.x.length, 0, at.count};
    const auto begin = [&](i64 t) {
        stop = min(at.end, s.end);
        ask_for_window<ALIGNED>(before, p, at, s, t);
        xs.from = row_at(p.x, at, t), xs.left = int(stop - t);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            xs.copy_group<ALIGNED>(k * GROUP);
            end_of_copies();
        }
    };
    if (at.begin < at.end) {
        s = find_sequence(p, at.row, at.begin);
        begin(at.begin);
    }
    put_weights_in_shared(p, at);
    const Weights w = weights_of_lane();
#pragma unroll 1
    for (i64 t = at.begin; t < end;) {
        Element* y = row_at(p.y, at, t);
        Four window[TAPS - 1];
#pragma unroll
        for (int i = 0; i < TAPS - 1; i++) unpack(window[i], before[i]);
        int slot = 0;
#pragma unroll 1
        for (int left = int(stop - t); left > 0; left -= GROUP) {
            wait_for_copies<AHEAD - 1>();
            xs.copy_group<ALIGNED>(slot == 0 ? SLOTS - GROUP : slot - GROUP);
            end_of_copies();
            if (plain && left >= GROUP) {
                forward_group<ALIGNED, true>(window, xs, slot, w, p, y, stride, left, at.count);
            } else {
                forward_group<ALIGNED, false>(window, xs, slot, w, p, y, stride, left, at.count);
            }
            y += GROUP * stride;
            slot = slot + GROUP == SLOTS ? 0 : slot + GROUP;
        }
        t = stop;
        if (t == p.length && !p.offsets) put_window<ALIGNED>(p, at, s, window);
        if (t < end) {
            wait_for_copies<0>();
            s = sequence_after(p, s, t);
            begin(t);
        }
    }
}

// The last inputs of a packed sequence, by one block: four channels of a thread at a time, all taps of which are asked
// for before one is written.
template <bool ALIGNED>
DEVICE void put_last_inputs(const Parameters& p, i64 sequence) {
    const Sequence s = sequence_by(p, sequence);
    const int n_states = int(p.width) - 1;
    const Element* before = reinterpret_cast<const Element*>(p.initial_state);
    for (i64 channel = threadIdx.x * CHANNELS; channel < p.d_inner; channel += THREADS * CHANNELS) {
        const int count = int(min(i64(CHANNELS), p.d_inner - channel));
        Packed found[TAPS - 1];
#pragma unroll
        for (int k = 0; k < TAPS - 1; k++) {
            const i64 t = s.end - n_states + k;
            found[k] = nothing();
            if (k >= n_states) continue;
            if (t >= s.start) {
                found[k] = ask<ALIGNED>(reinterpret_cast<const Element*>(p.x.data) + t * p.x.length + channel, count);
            } else if (p.initial_state) {
                found[k] = ask<ALIGNED>(before + state_index(p, sequence, t - s.start + n_states, channel), count);
            }
        }
#pragma unroll
        for (int k = 0; k < TAPS - 1; k++) {
            Four values;
            unpack(values, found[k]);
            Element* state = reinterpret_cast<Element*>(p.last_state) + state_index(p, sequence, k, channel);
            if (k < n_states) put<ALIGNED>(state, values, count);
        }
    }
}

KERNEL(THREADS, 5) forward(PARAMETER Parameters p) {
    const Place at = place_of_warp(p);
    wait_for_previous(at.row >= 0 && at.begin >= 0);
    let_next_start();
    const i64 sequence = i64(blockIdx.x) - p.n_blocks;  // of the blocks after those with pieces
    if (sequence >= 0 && p.aligned) {
        put_last_inputs<true>(p, sequence);
    } else if (sequence >= 0) {
        put_last_inputs<false>(p, sequence);
    } else if (p.aligned) {
        forward_piece<true>(p, at);
    } else {
        forward_piece<false>(p, at);
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

template <bool ALIGNED, bool PLAIN>
DEVICE void write_gradient(const Parameters& p, const Place& at, const Sequence& s, const Span& span, Element* to,
                           int t, const Four& known) {
    Four sum;
    copy(sum, known);
    if (!PLAIN && t >= span.last_state) {
        const i64 k = t - span.last_state;
        Packed packed = nothing();
        const Element* state = reinterpret_cast<const Element*>(p.dlast_state);
        if (k < p.width - 1) packed = ask<ALIGNED>(state + lane_state(p, at, s.index, k), at.count);
        Four more;
        unpack(more, packed);
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) sum[i] += more[i];
    }
    put<ALIGNED>(to, sum, PLAIN ? CHANNELS : at.count);
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
template <bool PLAIN>
DEVICE void add_token(Sums& sums, Four& finished, const Weights& w, Four (&window)[TAPS - 1], const Four& x,
                      Four& slope, int width, bool silu, bool is_own) {
    if (PLAIN || silu) {
        Four sum;
        sum_over_taps<PLAIN>(sum, w, window, x, width);
        take_through_activation(slope, sum);
    }
    copy(finished, sums.pending[0]);
    copy(sums.pending[0], sums.pending[1]), copy(sums.pending[1], sums.pending[2]);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
        if (PLAIN || width > 3) finished[i] = fmaf(w.of[0][i], slope[i], finished[i]);
        if (PLAIN || width > 2) sums.pending[0][i] = fmaf(w.of[1][i], slope[i], sums.pending[0][i]);
        if (PLAIN || width > 1) sums.pending[1][i] = fmaf(w.of[2][i], slope[i], sums.pending[1][i]);
        sums.pending[2][i] = w.of[3][i] * slope[i];
    }
    if (PLAIN || is_own) {
#pragma unroll
        for (int tap = 0; tap < TAPS - 1; tap++)
            if (PLAIN || width >= TAPS - tap) {
#pragma unroll
                for (int i = 0; i < CHANNELS; i++) sums.of[tap][i] = fmaf(slope[i], window[tap][i], sums.of[tap][i]);
            }
#pragma unroll
        for (int i = 0; i < CHANNELS; i++)
            sums.of[TAPS - 1][i] = fmaf(slope[i], x[i], sums.of[TAPS - 1][i]), sums.bias[i] += slope[i];
    }
    shift(window, x);
}

// A group of tokens, the first of which is token `done` of the span; those from `end` on do not exist. `to` is where
// the gradient of the first one that is finished goes, three tokens before.
template <bool ALIGNED, bool PLAIN>
DEVICE void backward_group(Sums& sums, Four (&window)[TAPS - 1], const Tokens& xs, const Tokens& dys, int slot,
                           const Weights& w, const Parameters& p, const Place& at, const Sequence& s, const Span& span,
                           Element* to, i64 stride, int done, int end) {
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
        if (!PLAIN && done + i >= end) continue;
        Four finished, x, slope;
        xs.get(x, slot + i), dys.get(slope, slot + i);
        add_token<PLAIN>(sums, finished, w, window, x, slope, int(p.width), p.silu, done + i < span.tokens);
        const int t = done + i - (TAPS - 1);
        if (PLAIN ? i == TAPS - 1 || done > 0 : t >= 0) write_gradient<ALIGNED, PLAIN>(p, at, s, span, to, t, finished);
        to += stride;
    }
}

// What is read for a span: the inputs before it, and its tokens.
struct OfSpan {
    Packed before[TAPS - 1];
    Tokens xs, dys;

    template <bool ALIGNED>
    DEVICE void copy_group(int slot) {
        xs.copy_group<ALIGNED>(slot), dys.copy_group<ALIGNED>(slot);
        end_of_copies();
    }
    template <bool ALIGNED>
    DEVICE void begin(const Parameters& p, const Place& at, const Sequence& s, i64 t, int end) {
        ask_for_window<ALIGNED>(before, p, at, s, t);
        xs.from = row_at(p.x, at, t), dys.from = row_at(p.dy, at, t), xs.left = dys.left = end;
#pragma unroll
        for (int k = 0; k < AHEAD; k++) copy_group<ALIGNED>(k * GROUP);
    }
};
// Tokens after the span's last one, of the same sequence, have seen some of it.
DEVICE int end_of_span(const Parameters& p, const Sequence& s, i64 t, i64 stop) {
    return int(min(stop + p.width - 1, s.end) - t);
}

// The tokens from t to `stop`, all of sequence s.
template <bool ALIGNED>
DEVICE void backward_span(Sums& sums, OfSpan& read, const Weights& w, const Parameters& p, const Place& at,
                          const Sequence& s, i64 t, i64 stop) {
    const bool plain = is_plain<ALIGNED>(p, at);
    const i64 stride = p.dx.length, last = p.dlast_state ? s.end - p.width + 1 - t : i64(1) << 30;
    const Span span = {int(stop - t), int(max(-(i64(1) << 30), min(last, i64(1) << 30)))};
    const int end = end_of_span(p, s, t, stop);
    Element* to = row_at(p.dx, at, t) - (TAPS - 1) * stride;
    Four window[TAPS - 1];
#pragma unroll
    for (int i = 0; i < TAPS - 1; i++) {
        const Four none = {};
        unpack(window[i], read.before[i]);
        copy(sums.pending[i], none);
    }
    int slot = 0;
#pragma unroll 1
    for (int done = 0; done < end; done += GROUP) {
        wait_for_copies<AHEAD - 1>();
        read.copy_group<ALIGNED>(slot == 0 ? SLOTS - GROUP : slot - GROUP);
        if (plain && done + GROUP <= span.tokens && done + GROUP - TAPS < span.last_state) {
            backward_group<ALIGNED, true>(sums, window, read.xs, read.dys, slot, w, p, at, s, span, to, stride, done,
                                          end);
        } else {
            backward_group<ALIGNED, false>(sums, window, read.xs, read.dys, slot, w, p, at, s, span, to, stride, done,
                                           end);
        }
        to += GROUP * stride;
        slot = slot + GROUP == SLOTS ? 0 : slot + GROUP;
    }
    wait_for_copies<0>();
#pragma unroll
    for (int i = 0; i < TAPS - 1; i++) {
        const int t_of = end - (TAPS - 1) + i;
        Element* to = row_at(p.dx, at, t + t_of);
        if (t_of >= 0 && t_of < span.tokens) write_gradient<ALIGNED, false>(p, at, s, span, to, t_of, sums.pending[i]);
    }
}

// The block's part of the gradients of the weights.
DEVICE void write_parts(const Sums& sums, const Parameters& p, const Place& at) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    constexpr int SIZE = (TAPS + 1) * BLOCK_CHANNELS;
    sync_block();  // the weights have been read
#pragma unroll
    for (int i = 0; i < TAPS; i++)
        write<FLOAT32>(shared + warp * SIZE + i * BLOCK_CHANNELS + lane * CHANNELS, sums.of[i]);
    write<FLOAT32>(shared + warp * SIZE + TAPS * BLOCK_CHANNELS + lane * CHANNELS, sums.bias);
    sync_block();
    const i64 first = at.channel - lane * CHANNELS, part = at.row * p.n_groups + at.group;
    for (int i = threadIdx.x; i < SIZE; i += THREADS) {
        float sum = 0.f;
#pragma unroll
        for (int k = 0; k < WARPS; k++) sum += shared[k * SIZE + i];
        const i64 tap = i / BLOCK_CHANNELS, channel = first + i % BLOCK_CHANNELS;
        if (channel < p.d_inner)
            reinterpret_cast<float*>(p.parts)[(part * (TAPS + 1) + tap) * p.d_inner + channel] = sum;
    }
}

template <bool ALIGNED>
DEVICE void backward_piece(const Parameters& p, const Place& at) {
    Sums sums = {};
    Sequence s = {};
    i64 stop = at.begin;
    constexpr int OF_PARTS = WARPS * OF_WEIGHTS;
    OfSpan read = {{},
                   {slots_of_lane(OF_PARTS, 0, 2), nullptr, p.x.length, 0, at.count},
                   {slots_of_lane(OF_PARTS, 1, 2), nullptr, p.dy.length, 0, at.count}};
    if (at.begin < at.end) {
        s = find_sequence(p, at.row, at.begin);
        stop = min(at.end, s.end);
        read.begin<ALIGNED>(p, at, s, at.begin, end_of_span(p, s, at.begin, stop));
    }
    put_weights_in_shared(p, at);
    const Weights w = weights_of_lane();
    const i64 end = end_of_lane(p, at);
#pragma unroll 1
    for (i64 t = at.begin; t < end;) {
        backward_span<ALIGNED>(sums, read, w, p, at, s, t, stop);
        t = stop;
        if (t < end) {
            s = sequence_after(p, s, t);
            stop = min(at.end, s.end);
            read.begin<ALIGNED>(p, at, s, t, end_of_span(p, s, t, stop));
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

KERNEL(THREADS, 3) backward(PARAMETER Parameters p) {
    const Place at = place_of_warp(p);
    wait_for_previous(at.row >= 0 && at.begin >= 0);
    let_next_start();
    if (i64(blockIdx.x) >= p.n_blocks) {
        put_initial_state(p, (i64(blockIdx.x) - p.n_blocks) * THREADS + threadIdx.x);
    } else if (p.aligned) {
        backward_piece<true>(p, at);
    } else {
        backward_piece<false>(p, at);
    }
}

KERNEL(32 * WAYS, 1) sum_parts(PARAMETER Parameters p) {
    wait_for_previous();
    sum_parts_of_block<float>(p);
}

// ------------------------------------------------------------------------------------------------ step

DEVICE float one(const void* data, i64 index) {
    float value[1];
    read<DTYPE>(value, static_cast<const Element*>(data) + index);
    return value[0];
}

// One token; one thread a row and channel.
KERNEL(THREADS, 8) step(PARAMETER Parameters p) {
    wait_for_previous();
    let_next_start();
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
            write<DTYPE>(reinterpret_cast<Element*>(p.last_state) + state_index(p, row, i - 1 - skipped, channel),
                         value);
    }
}
