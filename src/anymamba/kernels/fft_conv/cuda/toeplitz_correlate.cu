// The gradient of the filters; see toeplitz.cuh.
//
// A warp has a group of 8 differences of tiles of 16, and of each the sum over time of a tile of dy times one of u,
// contracted over BATCH rows: (16 times of dy, 16 times of u). A block has WARPS neighbouring groups of PAIR channels
// and goes through chunks of SPAN times, copying AHEAD of them; of u it keeps the chunks that its last warp still
// needs.
#include "toeplitz.cuh"

constexpr int GROUP = 8, WARPS = 4, PAIR = 2, SPAN = 16 * GROUP, ENTRIES = SPAN + 16, BATCH = 8 * ROW_TILES;
constexpr int CORRELATE_THREADS = 32 * WARPS * PAIR, SPAN_STRIDE = 2 * SPAN + (BY_TIME ? 0 : 16);
constexpr int SLOT = BATCH * SPAN_STRIDE;
constexpr int AHEAD = 2, U_SLOTS = WARPS + AHEAD, DY_SLOTS = 1 + AHEAD, SLOTS = U_SLOTS + DY_SLOTS;

// The walk over groups of rows and, for each, chunks of time, and what a thread copies of the next chunk.
struct Walk {
    i64 from;  // the place of its piece in u; that in dy is `shift` later
    i64 shift;
    u32 to;                                 // in a chunk in shared memory
    int time, chunk, row, u_slot, dy_slot;  // of that chunk

    DEVICE Walk(const Parameters& p, int first_channel, int first_group, int first_row) {
        const int thread = threadIdx.x, place = BY_TIME ? thread / 2 : thread % 16 * 8;
        const int own_row = BY_TIME ? thread % 2 * 8 : thread / 16;
        time = place, chunk = 0, row = first_row + own_row, u_slot = 0, dy_slot = 0;
        from = first_channel * of_channel(p) + (BY_TIME ? place * p.rows + row : row * p.padded_length + place);
        shift = first_group * SPAN * step(p);
        to = BY_TIME ? piece_at_time(place, thread % 2) : own_row * SPAN_STRIDE + 2 * place;
    }
    DEVICE static i64 step(const Parameters& p) { return BY_TIME ? p.rows : 1; }
    DEVICE static i64 of_channel(const Parameters& p) {
        return BY_TIME ? p.rows * p.length : p.padded_rows * p.padded_length;
    }
    DEVICE void copy(const Parameters& p, int first_channel, int first_group) const {
        const int length = int(BY_TIME ? p.length : p.padded_length);
        if (!BY_TIME && threadIdx.x / 16 >= BATCH) return;
        const bool exists = !BY_TIME || row < p.rows;
        const bool u_ok = exists && time < length, dy_ok = exists && time + first_group * SPAN < length;
        u8* slots = shared_memory() + to;
#pragma unroll
        for (int c = 0; c < PAIR; c++) {
            const bool ok = first_channel + c < p.width;
            const i64 here = from + c * of_channel(p);
            copy_16_bytes(slots + (c * SLOTS + u_slot) * SLOT, p.inputs + here, ok && u_ok);
            copy_16_bytes(slots + (c * SLOTS + U_SLOTS + dy_slot) * SLOT, p.outputs + here + shift, ok && dy_ok);
        }
    }
    DEVICE void go_on(const Parameters& p, int n_chunks) {
        time += SPAN, from += SPAN * step(p);
        if (++chunk == n_chunks) {
            from += BATCH * (BY_TIME ? 1 : p.padded_length) - n_chunks * SPAN * step(p);
            time -= n_chunks * SPAN, chunk = 0, row += BATCH;
        }
        u_slot = after(u_slot, U_SLOTS), dy_slot = after(dy_slot, DY_SLOTS);
    }
    DEVICE static int after(int slot, int count) { return slot + 1 == count ? 0 : slot + 1; }
};

typedef u32 Times[2 * ROW_TILES];  // a lane's words of 16 times of u
typedef float Sums[GROUP][2][4];   // for a difference and half of the times of u

DEVICE void load_times(u32 (&words)[2], const u8* from) { load_tiles_transposed(words, from); }
DEVICE void load_times(u32 (&words)[4], const u8* from) {
    if constexpr (BY_TIME) {
        load_tiles(words, from);
    } else {
        load_tiles_transposed(words, from);
    }
}
DEVICE void multiply_times(float (&sums)[4], const u32 (&dy)[4], const u32 (&u)[4], int half) {
    const u32 two[2] = {u[2 * half], u[2 * half + 1]};
    multiply_tiles(sums, dy, two);
}

// sums += the products of a chunk. `ring` has the last tiles of u; there are none before the first chunk.
template <bool FIRST>
DEVICE void correlate_chunk(Sums& sums, u32 (&ring)[GROUP][4], const u8* u, const u8* dy) {
    constexpr int step = BY_TIME ? 512 : 32;
    u32 tiles[2][4];
    load_times(tiles[0], dy);
    load_times(ring[0], u);
#pragma unroll
    for (int m = 0; m < GROUP; m++) {
        if (m + 1 < GROUP) load_times(tiles[(m + 1) % 2], dy + step * (m + 1));
#pragma unroll
        for (int d = GROUP - 1; d >= 0; d--) {
            if (!FIRST || d <= m) {
#pragma unroll
                for (int n = 0; n < 2; n++) multiply_times(sums[d][n], tiles[m % 2], ring[(m - d) & (GROUP - 1)], n);
            }
            if (d == GROUP - 1 && m + 1 < GROUP) load_times(ring[m + 1], u + step * (m + 1));
        }
    }
}

// The same for 8 rows: two tiles of dy at a time, and for each difference their two of u, fill the 16 that tensor cores
// contract. A tile of u takes the place of the last but seventh as soon as that is not needed.
template <bool FIRST>
DEVICE void correlate_chunk(Sums& sums, u32 (&ring)[GROUP][2], const u8* u, const u8* dy) {
    load_times(ring[0], u);
#pragma unroll
    for (int m = 0; m < GROUP; m += 2) {
        u32 tiles[4];
        load_tiles_transposed(tiles, dy + 32 * m);
#pragma unroll
        for (int d = GROUP - 1; d >= 0; d--) {
            if (!FIRST || d <= m + 1) {
                const u32(&one)[2] = ring[(m - d) & (GROUP - 1)], (&next)[2] = ring[(m + 1 - d) & (GROUP - 1)];
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const u32 two[2] = {FIRST && d > m ? 0u : one[n], next[n]};
                    multiply_tiles(sums[d][n], tiles, two);
                }
            }
            if (d == GROUP - 1) load_times(ring[m + 1], u + 32 * (m + 1));
            if (d == GROUP - 2 && m + 2 < GROUP) load_times(ring[m + 2], u + 32 * (m + 2));
        }
    }
}

// Where a lane's row of a matrix is. Tensor cores take the quarters of a tile of dy, (times, rows), column by column
// and those of u row by row.
DEVICE int place_in_slot(int lane, bool of_dy) {
    const int upper = lane / 16, lower = lane / 8 % 2, line = lane % 8;
    if (ROW_TILES == 1) return line * SPAN_STRIDE + (of_dy ? lane / 8 : lower) * 16;
    const int octet = of_dy ? lower : upper, row_tile = of_dy ? upper : lower;
    return BY_TIME ? piece_at_time(8 * octet + line, row_tile) : (8 * row_tile + line) * SPAN_STRIDE + octet * 16;
}

// The sums along the diagonals of a group: entry e is that of a lag of e - 16 from the group's first.
//
// With g = lane / 4 and t = lane % 4 a lane's sums are of lags 8 h + g - 2t and one less: `half_tiles` and `others`,
// for h = -1 to 15, which many numbers of a tile and of the next one share. Each lane sends what it has to the lane of
// the lag's last three bits; the four lanes t then share the rest of the sum, and the entries, among themselves.
constexpr int HALVES = 2 * GROUP + 1, EIGHTS = ENTRIES / 8, PADDED_EIGHTS = 20;

// What a lane sends of each 8 entries, where it is moved down by `by`: of h, or of h + 1 if it comes from the 8 after.
DEVICE void take(float (&of)[PADDED_EIGHTS], const float (&halves)[HALVES], int g, int t, int by) {
    const bool later = g < by;
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {  // of h = e - 2, which is number e - 1
        const float here = e > 0 ? halves[e - 1] : 0.f, next = e < HALVES ? halves[e] : 0.f;
        of[e] += shuffle(later ? next : here, (g + by) % 8 * 4 + t);
    }
}

DEVICE void write_diagonals(const Sums& sums, float* to, int lane) {
    const int g = lane / 4, t = lane % 4;
    float half_tiles[HALVES], others[HALVES];
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        if (h % 2) {  // the middle of a tile
            half_tiles[h] = sums[h / 2][0][0] + sums[h / 2][1][2], others[h] = sums[h / 2][0][1] + sums[h / 2][1][3];
        } else {  // the lower left of a tile, the upper right of the next one
            half_tiles[h] = others[h] = 0.f;
            if (h > 0) half_tiles[h] += sums[h / 2 - 1][0][2], others[h] += sums[h / 2 - 1][0][3];
            if (h < 2 * GROUP) half_tiles[h] += sums[h / 2][1][0], others[h] += sums[h / 2][1][1];
        }
    }
    float of[PADDED_EIGHTS] = {};
    take(of, half_tiles, g, t, 2 * t);
    take(of, others, g, t, 2 * t + 1);
    float pairs[PADDED_EIGHTS / 2], found[PADDED_EIGHTS / 4];
#pragma unroll
    for (int e = 0; e < PADDED_EIGHTS / 2; e++) {
        const float keeps = t % 2 ? of[2 * e + 1] : of[2 * e], gives = t % 2 ? of[2 * e] : of[2 * e + 1];
        pairs[e] = keeps + shuffle_xor(gives, 1);
    }
#pragma unroll
    for (int e = 0; e < PADDED_EIGHTS / 4; e++) {
        const float keeps = t < 2 ? pairs[2 * e] : pairs[2 * e + 1], gives = t < 2 ? pairs[2 * e + 1] : pairs[2 * e];
        found[e] = keeps + shuffle_xor(gives, 2);
        const int eighth = 4 * e + t;
        if (eighth < EIGHTS) to[8 * eighth + g] = found[e];
    }
}

KERNEL(CORRELATE_THREADS, 2) correlate(PARAMETER Parameters p) {
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pair = warp / WARPS;
    const int share = pair % 2 ? WARPS - 1 - warp % WARPS : warp % WARPS;  // schedulers have warps with more and less
    const int across = int(p.width + PAIR - 1) / PAIR, block = work_at(p, int(blockIdx.x), int(gridDim.x));
    const int quads = int(p.n_groups + WARPS - 1) / WARPS, others = across * int(p.n_parts);
    const int place = p.near ? block / quads : block % others;
    const int first_group = (p.near ? block % quads : block / others) * WARPS;
    const int first_channel = place % across * PAIR, channel = first_channel + pair, part = place / across;
    const int group = first_group + share, n_chunks = int(p.length + SPAN - 1) / SPAN - first_group;
    const int first_row = part * int(p.rows_of_part), rows = min(int(p.rows_of_part), int(p.padded_rows) - first_row);
    const int n_stages = (rows + BATCH - 1) / BATCH * n_chunks;
    const bool works = channel < p.width && group < p.n_groups;
    Walk next(p, first_channel, first_group, first_row);
    for (int stage = 0; stage < AHEAD; stage++) {
        if (stage < n_stages) next.copy(p, first_channel, first_group);
        end_of_copies();
        next.go_on(p, n_chunks);
    }
    const u8* mine = shared_memory() + pair * SLOTS * SLOT;
    const u8 *mine_of_u = mine + place_in_slot(lane, false), *mine_of_dy = mine + place_in_slot(lane, true);
    Sums sums = {};
    Times ring[GROUP] = {};
    int chunk = 0, u_slot = share == 0 ? 0 : U_SLOTS - share, dy_slot = 0;
#pragma unroll 1
    for (int stage = 0; stage < n_stages; stage++) {
        const u8 *u = mine_of_u + u_slot * SLOT, *dy = mine_of_dy + (U_SLOTS + dy_slot) * SLOT;
        wait_for_copies<AHEAD - 1>();
        sync_block();  // the chunks are there, and those that the next ones replace have been read
        if (stage + AHEAD < n_stages) next.copy(p, first_channel, first_group);
        end_of_copies();
        next.go_on(p, n_chunks);
        if (works && chunk > share) {
            correlate_chunk<false>(sums, ring, u, dy);
        } else if (works && chunk == share) {
            correlate_chunk<true>(sums, ring, u, dy);
        }
        chunk = Walk::after(chunk, n_chunks);
        u_slot = Walk::after(u_slot, U_SLOTS), dy_slot = Walk::after(dy_slot, DY_SLOTS);
    }
    if (works) write_diagonals(sums, p.parts + ((part * p.width + channel) * p.n_groups + group) * ENTRIES, lane);
}

// The gradient of the filters: parts in their order, and where two groups have products for one lag, both.
KERNEL(ORDER_THREADS, 4) finish(PARAMETER Parameters p) {
    wait_for_previous();
    const i64 i = i64(blockIdx.x) * ORDER_THREADS + threadIdx.x;
    if (i >= p.width * p.taps) return;
    const i64 channel = i / p.taps;
    const int lag = int(i % p.taps), group = lag / SPAN, place = lag % SPAN;
    float sum = 0.f;
    for (int part = 0; part < p.n_parts; part++) {
        const float* from = p.parts + ((part * p.width + channel) * p.n_groups + group) * ENTRIES;
        if (group < p.n_groups) sum += from[16 + place];
        if (group + 1 < p.n_groups && place > SPAN - 16) sum += from[ENTRIES + place - (SPAN - 16)];
    }
    p.found[i] = sum;
}
