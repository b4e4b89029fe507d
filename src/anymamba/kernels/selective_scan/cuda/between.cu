// What runs before, between and after the large kernels: sequences, what passes from chunk to chunk, sums of parts.
//
// Every sum has an order of its own, by the shapes; nothing is added by who comes first.
//
// Launch: threads of 256; all of these are bound by memory, or short.
#include "sums.cuh"

constexpr int THREADS = 256;
DEVICE i64 index_of_thread() { return i64(blockIdx.x) * THREADS + threadIdx.x; }

// sequence_of[t]: the last sequence that starts at or before t.
KERNEL(THREADS, 1) find_sequences(PARAMETER Parameters p) {
    const i64 t = index_of_thread();
    if (t >= p.length) return;
    i64 low = 0, high = p.n_sequences - 1;
    while (low < high) {
        const i64 middle = (low + high + 1) / 2;
        if (p.offsets[middle] <= t) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    p.sequence_of[t] = int(low);
}

// A sequence without tokens hands on its state, and the state's gradient. One block a sequence.
KERNEL(THREADS, 1) pass_empty(PARAMETER Parameters p) {
    const i64 s = i64(blockIdx.x), size = p.d_inner * p.d_state;
    if (start_of_sequence(p, s) < start_of_sequence(p, s + 1)) return;
    const T* from = reinterpret_cast<const T*>(p.dinitial_state ? p.dlast_state : p.initial_state);
    T* to = reinterpret_cast<T*>(p.dinitial_state ? p.dinitial_state : p.last_state);
    for (i64 i = threadIdx.x; i < size; i += THREADS) to[s * size + i] = from ? from[s * size + i] : number(R(0));
}

// What leaves a row of chunks for a state and channel, whose numbers of the first chunk are at `first`, and of the
// others `size` further on. `visit` is called with each chunk on the way and what arrives at it; `used` chunks hand
// something on.
template <typename Visit>
DEVICE T through_chunks(const Parameters& p, i64 first, i64 size, i64 used, Visit visit) {
    constexpr int AHEAD = 8;  // chunks whose numbers are asked for at once
    const T* states = reinterpret_cast<const T*>(p.chunk_states) + first;
    const T* decays = reinterpret_cast<const T*>(p.chunk_decays) + first;
    const bool reverse = p.passage == REVERSE;
    T h = number(R(0));
    for (i64 k0 = 0; k0 < p.n_chunks; k0 += AHEAD) {
        T leaving[AHEAD], decay[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            if (k0 + k >= used) continue;
            const i64 chunk = reverse ? p.n_chunks - 1 - k0 - k : k0 + k;
            leaving[k] = states[chunk * size], decay[k] = decays[chunk * size];
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            if (k0 + k >= p.n_chunks) continue;
            const i64 chunk = reverse ? p.n_chunks - 1 - k0 - k : k0 + k;
            visit(chunk, h);
            if (k0 + k >= used) continue;
            bool through = reverse ? passes_through<true>(p, chunk) : passes_through<false>(p, chunk);
            if (!reverse && chunk > 0 && chunk == p.n_chunks - 1)  // on to the end of the row
                through = !p.sequence_of || p.sequence_of[chunk * p.chunk - 1] == p.sequence_of[p.length - 1];
            h = through ? leaving[k] + (reverse ? conjugate(decay[k]) : decay[k]) * h : leaving[k];
        }
    }
    return h;
}

// In place of what leaves each chunk (from nothing) what arrives at it; one thread a row, state and channel.
KERNEL(THREADS, 1) carry(PARAMETER Parameters p) {
    const i64 size = p.states * p.channels, i = index_of_thread();
    if (i >= p.batch * size) return;
    const i64 first = i / size * p.n_chunks * size + i % size;
    T* states = reinterpret_cast<T*>(p.chunk_states) + first;
    // the last chunk on the way hands nothing over
    through_chunks(p, first, size, p.n_chunks - 1, [&](i64 chunk, T h) { states[chunk * size] = h; });
}

// What leaves each row, from what leaves its chunks: the state after its last token or, in reverse, the gradient of the
// one before its first token. Of packed rows that of the last sequence, or of the first. One thread a row, state and
// channel.
KERNEL(THREADS, 1) leave(PARAMETER Parameters p) {
    const i64 size = p.states * p.channels, i = index_of_thread();
    if (i >= p.batch * size) return;
    const i64 row = i / size, n = i % size / p.channels, padded = i % p.channels;
    const i64 of_group = p.channels / p.n_groups, per_group = p.d_inner / p.n_groups;
    const i64 channel = padded / of_group * per_group + padded % of_group;
    if (n >= p.d_state || padded % of_group >= per_group) return;
    const i64 first = row * p.n_chunks * size + i % size;
    const T h = through_chunks(p, first, size, p.n_chunks, [](i64, T) {});
    reinterpret_cast<T*>(p.leaving)[(row * p.d_inner + channel) * p.d_state + n] = h;
}

// dB and dC from the parts of blocks of channels, (block, row, token, state).
KERNEL(THREADS, 1) sum_blocks(PARAMETER Parameters p) {
    const i64 rows = p.batch * p.length * p.d_state, i = index_of_thread();
    if (i >= rows * p.n_groups) return;
    const i64 group = i / rows, place = i % rows, n = place % p.d_state, token = place / p.d_state;
    const i64 to = (token * p.n_groups + group) * p.d_state + n;
#pragma unroll
    for (int m = 0; m < 2; m++) {
        const u8* parts = m ? p.dC_parts : p.dB_parts;
        if (!(m ? p.C : p.B).data) continue;  // constant
        const T* from = reinterpret_cast<const T*>(parts) + group * p.blocks_of_group * rows + place;
        const T sum = sum_of(from, rows, p.blocks_of_group);
        write_number(m ? p.dC : p.dB, to, int(m ? p.dC_dtype : p.dB_dtype), sum);
    }
}

KERNEL(THREADS, 1) sum_parts(PARAMETER Parameters p) { sum_part(p, index_of_thread()); }
