// The gradients of the selective scan for everything; see general_forward.cu.
//
// From the state saved before 64 tokens the states before each tile are computed once more (`checkpoints`), then
// the tiles are worked on backwards: states inside one are recomputed and kept in shared memory. For a state
//
//     e = dh + C g         gradient of h, g that of the scan's own output
//     dC = g h,  dB = weight u e,  du += weight B e
//     x = a h[t-1] e       gradient of delta A:  dA += delta x,  ddelta += A x + a' B u e,  dh = a e
//
// with conjugates where A is complex; weight and a' are delta and 1, or of the zero-order hold (exp(delta A) - 1) / A
// and exp(delta A), and dA has another term then. dB and dC are sums over lanes; each block writes its part.
//
// Launch: as general_forward.cu.
#include "general.cuh"

struct OfBlock {
    R d[TILE][32], u[TILE][32], g[TILE][32];
    R y[WARPS][TILE][32], du[WARPS][TILE][32], dd[WARPS][TILE][32];  // sums over the states of a warp
    T before[WARPS][TILE][SLAB][32];                                 // each lane's states before each token
    OfSlab of_slab[WARPS];
};

constexpr int TILES = SAVED_EVERY / TILE;

DEVICE void prepare(OfBlock& block, const Parameters& p, const Place& at, i64 first, int tokens, int lane, int warp) {
    for (int t = warp; t < TILE; t += WARPS) {
        const bool ok = t < tokens && lane < at.count;
        block.d[t][lane] = ok ? delta_at(p, at, first + t, lane) : R(0);
        block.u[t][lane] = ok ? element(p.u, at, first + t, lane) : R(0);
        block.g[t][lane] = ok ? dscan_at(p, at, first + t, lane) : R(0);
        for (int w = 0; w < WARPS; w++) block.y[w][t][lane] = block.du[w][t][lane] = block.dd[w][t][lane] = R(0);
    }
}

// Run a slab over a tile; KEEP its states before each token and y.
template <bool KEEP, bool ZOH>
DEVICE void run(T (&h)[SLAB], const States& own, OfBlock& block, const Parameters& p, const Place& at, int tokens,
                const Boundaries& edges, int around, i64 slab, int lane, int warp) {
    const bool constant_B = !p.B.data, constant_C = !p.C.data;
    for (int t = 0; t < tokens; t++) {
        if (edges.starts >> t & 1)
            get_of_sequence(h, p.initial_state, p, at, sequence_at(p, at, around, t), slab, lane);
        const R d = block.d[t][lane], u = block.u[t][lane];
        T B[SLAB], C[SLAB];
        matrix_at(B, own.B, block.of_slab[warp].B[t], constant_B);
        if (KEEP) matrix_at(C, own.C, block.of_slab[warp].C[t], constant_C);
        R y = R(0);
#pragma unroll
        for (int i = 0; i < SLAB; i++) {
            const T a = exponential(d * own.A[i]);
            if (KEEP) block.before[warp][t][i][lane] = h[i];
            h[i] = a * h[i] + u * (weight<ZOH>(d, own.A[i], a) * B[i]);
            if (KEEP) y += PAIR * real_part(C[i] * h[i]);
        }
        if (KEEP) block.y[warp][t][lane] += y;
    }
}

// Write the sums over lanes of a slab's numbers; the first `count` states exist.
DEVICE void put_sums(u8* parts, i64 index, const T (&values)[SLAB], i64 count, int lane) {
    constexpr int NUMBERS = sizeof(T) / sizeof(R) * SLAB, LANES = 32 / NUMBERS;
    R numbers[NUMBERS];
#pragma unroll
    for (int i = 0; i < SLAB; i++) split(numbers + i * (NUMBERS / SLAB), values[i]);
    const R sum = sums_of_warp(numbers, lane);
    const int i = lane / LANES;
    if (lane % LANES == 0 && i / (NUMBERS / SLAB) < count)
        reinterpret_cast<R*>(parts)[index * (NUMBERS / SLAB) + i] = sum;
}

// Run the gradients of a slab back over a tile, with what `run` kept. Sums of selective B and C are written, those over
// time added up.
template <bool ZOH>
DEVICE void run_back(T (&dh)[SLAB], States& sums, const States& own, OfBlock& block, const Parameters& p,
                     const Place& at, i64 first, int tokens, const Boundaries& edges, int around, i64 slab, int lane,
                     int warp) {
    const bool constant_B = !p.B.data, constant_C = !p.C.data;
    for (int t = tokens - 1; t >= 0; t--) {
        const bool starts = edges.starts >> t & 1, ends = edges.ends >> t & 1;
        i64 sequence = 0;
        if (starts | ends) sequence = sequence_at(p, at, around, t);
        if (ends) get_of_sequence(dh, p.dlast_state, p, at, sequence, slab, lane);
        const R d = block.d[t][lane], u = block.u[t][lane], g = PAIR * block.g[t][lane];
        T B[SLAB], C[SLAB];
        matrix_at(B, own.B, block.of_slab[warp].B[t], constant_B);
        matrix_at(C, own.C, block.of_slab[warp].C[t], constant_C);
        R du = R(0), dd = R(0);
#pragma unroll
        for (int i = 0; i < SLAB; i++) {
            const T a = exponential(d * own.A[i]), before = block.before[warp][t][i][lane];
            const T scale = weight<ZOH>(d, own.A[i], a), after = a * before + u * (scale * B[i]);
            const T e = dh[i] + g * conjugate(C[i]);
            sums.C[i] = g * conjugate(after) + (constant_C ? sums.C[i] : number(R(0)));
            sums.B[i] = u * (conjugate(scale) * e) + (constant_B ? sums.B[i] : number(R(0)));
            dh[i] = conjugate(a) * e;
            const T x = dh[i] * conjugate(before), drive = e * conjugate(B[i]);
            sums.A[i] = sums.A[i] + d * x;
            if constexpr (ZOH) {
                const T slope = expm1_ratio_slope(d * own.A[i], a, expm1_ratio(d * own.A[i], a));
                sums.A[i] = sums.A[i] + (u * d * d) * (conjugate(slope) * drive);
            }
            du += real_part(conjugate(scale) * drive);
            dd += real_part(conjugate(own.A[i]) * x) + u * real_part((ZOH ? conjugate(a) : number(R(1))) * drive);
        }
        block.du[warp][t][lane] += du, block.dd[warp][t][lane] += dd;
        const i64 part = ((at.block * p.batch + at.row) * p.length + first + t) * p.d_state + slab;
        if (!constant_B) put_sums(p.dB_parts, part, sums.B, p.d_state - slab, lane);
        if (!constant_C) put_sums(p.dC_parts, part, sums.C, p.d_state - slab, lane);
        if (starts) {
            if (p.dinitial_state) put_of_sequence(p.dinitial_state, dh, p, at, sequence, slab, lane);
#pragma unroll
            for (int i = 0; i < SLAB; i++) dh[i] = number(R(0));
        }
    }
}

// Add to a part, or write it for the first time.
DEVICE void add(u8* parts, i64 index, T value, bool first) {
    T* to = reinterpret_cast<T*>(parts) + index;
    *to = first ? value : *to + value;
}

KERNEL(THREADS, DOUBLE ? 1 : COMPLEX ? 2 : 3) scan_backward(PARAMETER Parameters p) {
    const Place at = place_of_block(p, 32, 0);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    OfBlock& block = *reinterpret_cast<OfBlock*>(shared_memory());
    const i64 of_chunk = at.row * p.n_chunks + at.chunk, size = p.states * p.channels, place = at.padded + lane;
    T* running = reinterpret_cast<T*>(p.chunk_states) + of_chunk * size + place;
    T* checkpoints = reinterpret_cast<T*>(p.checkpoints) + of_chunk * TILES * size + place;
    const i64 n_saved = (p.length + SAVED_EVERY - 1) / SAVED_EVERY;
    const R D = p.D && lane < at.count ? reinterpret_cast<const R*>(p.D)[at.channel + lane] : R(0);
    R dD = R(0), dbias = R(0);

    const i64 last_saved = (at.end - 1) / SAVED_EVERY;
    for (i64 index = last_saved; index * SAVED_EVERY >= at.begin; index--) {
        const i64 begin = index * SAVED_EVERY;
        const int n_tiles = int((min(at.end, begin + SAVED_EVERY) - begin + TILE - 1) / TILE);
        for (int k = 0; k < n_tiles; k++) {  // the states before each tile
            const i64 first = begin + k * TILE;
            const int tokens = int(min(i64(TILE), at.end - first));
            if (k + 1 < n_tiles) prepare(block, p, at, first, tokens, lane, warp);
            sync_block();
            const int around = sequences_around(p, first, TILE, lane);
            const Boundaries edges = boundaries_of_tile(p, around, first, tokens, lane);
            for (i64 slab = warp * SLAB; slab < p.d_state; slab += WARPS * SLAB) {
                const States own = states_of(p, at, slab, lane);
                T h[SLAB];
                const T* saved = reinterpret_cast<const T*>(p.saved) + (at.row * n_saved + index) * size + place;
                get(h, k == 0 ? saved : checkpoints + k * size, p, slab);
                if (k == 0) put(checkpoints, h, p, slab);
                if (k + 1 == n_tiles) continue;
                put_matrices(block.of_slab[warp], true, false, p, at, first, tokens, slab, lane);
                p.zoh ? run<false, true>(h, own, block, p, at, tokens, edges, around, slab, lane, warp)
                      : run<false, false>(h, own, block, p, at, tokens, edges, around, slab, lane, warp);
                put(checkpoints + (k + 1) * size, h, p, slab);
            }
            sync_block();
        }
        for (int k = n_tiles - 1; k >= 0; k--) {
            const i64 first = begin + k * TILE;
            const int tokens = int(min(i64(TILE), at.end - first));
            const bool is_first = index == last_saved && k == n_tiles - 1;
            prepare(block, p, at, first, tokens, lane, warp);
            sync_block();
            const int around = sequences_around(p, first, TILE, lane);
            const Boundaries edges = boundaries_of_tile(p, around, first, tokens, lane);
            for (i64 slab = warp * SLAB; slab < p.d_state; slab += WARPS * SLAB) {
                const States own = states_of(p, at, slab, lane);
                T h[SLAB], dh[SLAB];
                States sums;
                get(h, checkpoints + k * size, p, slab);
                put_matrices(block.of_slab[warp], true, true, p, at, first, tokens, slab, lane);
                p.zoh ? run<true, true>(h, own, block, p, at, tokens, edges, around, slab, lane, warp)
                      : run<true, false>(h, own, block, p, at, tokens, edges, around, slab, lane, warp);
#pragma unroll
                for (int i = 0; i < SLAB; i++) sums.A[i] = sums.B[i] = sums.C[i] = dh[i] = number(R(0));
                if (!is_first || p.n_chunks > 1) get(dh, running, p, slab);
                if (p.zoh) {
                    run_back<true>(dh, sums, own, block, p, at, first, tokens, edges, around, slab, lane, warp);
                } else {
                    run_back<false>(dh, sums, own, block, p, at, first, tokens, edges, around, slab, lane, warp);
                }
                put(running, dh, p, slab);
#pragma unroll
                for (int i = 0; i < SLAB; i++) {
                    if (slab + i >= p.d_state) continue;
                    const i64 part = of_chunk * size + (slab + i) * p.channels + place;
                    add(p.dA_parts, part, sums.A[i], is_first);
                    if (!p.B.data) add(p.dB_parts, part, sums.B[i], is_first);
                    if (!p.C.data) add(p.dC_parts, part, sums.C[i], is_first);
                }
            }
            sync_block();
            for (int t = warp; t < tokens; t += WARPS) {
                if (lane >= at.count) continue;
                R y = R(0), du = R(0), dd = R(0);
                for (int w = 0; w < WARPS; w++)
                    y += block.y[w][t][lane], du += block.du[w][t][lane], dd += block.dd[w][t][lane];
                const R g = block.g[t][lane], u = block.u[t][lane];
                if (p.z.data) {
                    const R z = element(p.z, at, first + t, lane), dy = element(p.dy, at, first + t, lane);
                    const R gate = sigmoid(z), own = p.D ? y + D * u : y;
                    put_element(p.dz, at, first + t, lane, dy * own * gate * (R(1) + z * (R(1) - gate)));
                }
                if (p.D) du += D * g, dD += g * u;
                if (p.softplus) {
                    const R raw = raw_delta_at(p, at, first + t, lane);
                    dd = raw > R(20) ? dd : dd * sigmoid(raw);
                }
                put_element(p.du, at, first + t, lane, du);
                put_element(p.ddelta, at, first + t, lane, dd);
                dbias += dd;
            }
            sync_block();
        }
    }
    block.du[warp][0][lane] = dD, block.dd[warp][0][lane] = dbias;
    sync_block();
    if (warp == 0) {
        for (int w = 1; w < WARPS; w++) dD += block.du[w][0][lane], dbias += block.dd[w][0][lane];
        const i64 part = of_chunk * p.channels + place;
        if (p.dD_parts) reinterpret_cast<R*>(p.dD_parts)[part] = dD;
        if (p.dbias_parts) reinterpret_cast<R*>(p.dbias_parts)[part] = dbias;
    }
}
