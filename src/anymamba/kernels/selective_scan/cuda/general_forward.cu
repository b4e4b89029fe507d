// The selective scan forward for everything: complex A, float64, exact zero-order hold, constant B and C, many states.
//
// Lanes are channels and warps take slabs of states in turn; time runs inside. A tile's d and u are in shared memory,
// the running state between tiles in chunk_states. The passes are those of forward.cu.
//
// Launch: 32 channels and 4 warps a block; slabs of 4 states keep a and h in registers for float64, too.
#include "general.cuh"

struct OfBlock {
    R d[TILE][32], x[TILE][32];  // delta after the softplus; u, or the gradient of the scan's own output
    R y[WARPS][TILE][32];
    OfSlab of_slab[WARPS];
};

// Run a slab over a tile. d and x of its tokens, B, C and the sums for y are in shared memory.
template <int PASSAGE, bool ZOH>
DEVICE void run(T (&h)[SLAB], T (&decay)[SLAB], const States& own, OfBlock& block, const Parameters& p, const Place& at,
                int tokens, const Boundaries& edges, int around, i64 slab, int lane, int warp) {
    constexpr bool reverse = PASSAGE == REVERSE, forward = PASSAGE == FORWARD;
    const bool constant_B = !p.B.data, constant_C = !p.C.data;
    for (int s = 0; s < tokens; s++) {
        const int t = reverse ? tokens - 1 - s : s;
        const bool starts = edges.starts >> t & 1, ends = edges.ends >> t & 1;
        i64 sequence = 0;
        if (starts | ends) sequence = sequence_at(p, at, around, t);
        if (!reverse && starts) get_of_sequence(h, p.initial_state, p, at, sequence, slab, lane);
        if (reverse && ends) get_of_sequence(h, p.dlast_state, p, at, sequence, slab, lane);
        const R d = block.d[t][lane], x = block.x[t][lane];
        R y = R(0);
        T B[SLAB], C[SLAB];
        if (!reverse) matrix_at(B, own.B, block.of_slab[warp].B[t], constant_B);
        if (PASSAGE != SUMMARY) matrix_at(C, own.C, block.of_slab[warp].C[t], constant_C);
#pragma unroll
        for (int i = 0; i < SLAB; i++) {
            const T a = exponential(d * own.A[i]);
            if (reverse) {
                h[i] = conjugate(a) * (PAIR * x * conjugate(C[i]) + h[i]);
                if (starts) h[i] = number(R(0));
            } else {
                h[i] = a * h[i] + x * (weight<ZOH>(d, own.A[i], a) * B[i]);
                if (forward) y += PAIR * real_part(C[i] * h[i]);
            }
            if (!forward) decay[i] = a * decay[i];
        }
        if (forward) block.y[warp][t][lane] += y;
        if (forward && ends) put_of_sequence(p.last_state, h, p, at, sequence, slab, lane);
    }
}

KERNEL(THREADS, DOUBLE ? 1 : COMPLEX ? 3 : 4) scan(PARAMETER Parameters p) {
    const bool reverse = p.passage == REVERSE, forward = p.passage == FORWARD;
    const Place at = place_of_block(p, 32, reverse ? int(p.first_chunk) : 0);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i64 length = at.end - at.begin, n_tiles = (length + TILE - 1) / TILE;
    OfBlock& block = *reinterpret_cast<OfBlock*>(shared_memory());
    const i64 scratch = (at.row * p.n_chunks + at.chunk) * p.states * p.channels + at.padded + lane;
    T* running = reinterpret_cast<T*>(p.chunk_states) + scratch;
    T* decays = reinterpret_cast<T*>(p.chunk_decays) + scratch;

    for (i64 k = 0; k < n_tiles; k++) {
        const i64 first = at.begin + (reverse ? n_tiles - 1 - k : k) * TILE;
        const int tokens = int(min(i64(TILE), at.end - first));
        for (int t = warp; t < TILE; t += WARPS) {
            const bool ok = t < tokens && lane < at.count;
            block.d[t][lane] = ok ? delta_at(p, at, first + t, lane) : R(0);
            block.x[t][lane] = !ok       ? R(0)
                               : reverse ? dscan_at(p, at, first + t, lane)
                                         : element(p.u, at, first + t, lane);
            for (int w = 0; w < WARPS; w++) block.y[w][t][lane] = R(0);
        }
        sync_block();
        const int around = sequences_around(p, first, TILE, lane);
        Boundaries edges = boundaries_of_tile(p, around, first, tokens, lane);
        edges.starts &= ~u32(reverse & (first == 0));  // the row's first state has a gradient, too

        for (i64 slab = warp * SLAB; slab < p.d_state; slab += WARPS * SLAB) {
            States own = states_of(p, at, slab, lane);
            T h[SLAB], decay[SLAB];
#pragma unroll
            for (int i = 0; i < SLAB; i++) {
                const bool known = slab + i < p.d_state && (k > 0 || (forward && p.n_chunks > 1));
                h[i] = known ? running[(slab + i) * p.channels] : number(R(0));
                decay[i] = !forward && k > 0 && slab + i < p.d_state ? decays[(slab + i) * p.channels] : number(R(1));
            }
            if (forward && p.saved && first % SAVED_EVERY == 0) {
                const i64 n_saved = (p.length + SAVED_EVERY - 1) / SAVED_EVERY;
                T* saved = reinterpret_cast<T*>(p.saved) + at.padded + lane +
                           (at.row * n_saved + first / SAVED_EVERY) * p.states * p.channels;
                put(saved, h, p, slab);
            }
            put_matrices(block.of_slab[warp], !reverse, p.passage != SUMMARY, p, at, first, tokens, slab, lane);
            const auto work = [&](auto passage, auto zoh) {
                run<passage.value, zoh.value>(h, decay, own, block, p, at, tokens, edges, around, slab, lane, warp);
            };
            const auto work_by = [&](auto passage) { p.zoh ? work(passage, Is<1>()) : work(passage, Is<0>()); };
            if (forward) {
                work_by(Is<FORWARD>());
            } else if (reverse) {
                work(Is<REVERSE>(), Is<0>());  // u has no part in it
            } else {
                work_by(Is<SUMMARY>());
            }
            put(running, h, p, slab);
            if (!forward) put(decays, decay, p, slab);
        }
        sync_block();
        for (int t = warp; forward && t < tokens; t += WARPS) {
            if (lane >= at.count) continue;
            R y = R(0);
            for (int w = 0; w < WARPS; w++) y += block.y[w][t][lane];
            if (p.D) y += reinterpret_cast<const R*>(p.D)[at.channel + lane] * block.x[t][lane];
            if (p.z.data) {
                const R z = element(p.z, at, first + t, lane);
                y *= z * sigmoid(z);
            }
            put_element(p.y, at, first + t, lane, y);
        }
        sync_block();
    }
}

// One token: the state goes in and the new state comes out. p.lanes lanes (a power of two, as many as there are states
// for) share the states of a channel, neighbouring lanes neighbouring states, so that the state is read and written in
// the order of its memory.
KERNEL(THREADS, 1) step(PARAMETER Parameters p) {
    const int lanes = int(p.lanes), part = threadIdx.x % lanes;
    const i64 index = (i64(blockIdx.x) * THREADS + threadIdx.x) / lanes;
    const bool inside = index < p.batch * p.d_inner;
    Place at;
    at.row = inside ? index / p.d_inner : 0, at.channel = inside ? index % p.d_inner : 0;
    at.group = at.channel / (p.d_inner / p.n_groups);
    const R d = delta_at(p, at, 0, 0), u = element(p.u, at, 0, 0);
    const i64 matrix = at.channel * p.d_state, state = (at.row * p.d_inner + at.channel) * p.d_state;
    const i64 row_B = at.row * p.B.batch + at.group * p.B.group, row_C = at.row * p.C.batch + at.group * p.C.group;
    const T *A = reinterpret_cast<const T*>(p.A) + matrix, *before = reinterpret_cast<const T*>(p.initial_state);
    T* after = reinterpret_cast<T*>(p.last_state) + state;
    R y = R(0);
    for (i64 n = part; inside && n < p.d_state; n += lanes) {
        const T rate = A[n], a = exponential(d * rate);
        const T B = p.B.data ? read_number(p.B.data, row_B + n, int(p.B.dtype))
                             : reinterpret_cast<const T*>(p.constant_B)[matrix + n];
        const T C = p.C.data ? read_number(p.C.data, row_C + n, int(p.C.dtype))
                             : reinterpret_cast<const T*>(p.constant_C)[matrix + n];
        const T h = a * (before ? before[state + n] : number(R(0))) +
                    u * ((p.zoh ? weight<true>(d, rate, a) : weight<false>(d, rate, a)) * B);
        y += PAIR * real_part(C * h);
        after[n] = h;
    }
    for (int m = lanes / 2; m > 0; m /= 2) y += shuffle_xor(y, m);
    if (!inside || part > 0) return;
    if (p.D) y += reinterpret_cast<const R*>(p.D)[at.channel] * u;
    if (p.z.data) {
        const R z = element(p.z, at, 0, 0);
        y *= z * sigmoid(z);
    }
    put_element(p.y, at, 0, 0, y);
}
