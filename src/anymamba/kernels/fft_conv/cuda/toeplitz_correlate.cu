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

typedef u32 Times[2 * ROW_TILES];  // a lane's words of 16 times
typedef float Sums[GROUP][2][4];   // for a difference and half of the times of u

DEVICE void load_times(u32 (&words)[2], const u8* from) { load_tiles_transposed(words, from); }
DEVICE void load_times(u32 (&words)[4], const u8* from) {
    if constexpr (BY_TIME) {
        load_tiles(words, from);
    } else {
        load_tiles_transposed(words, from);
    }
}
DEVICE void multiply_times(float (&sums)[4], const u32 (&dy)[2], const u32 (&u)[2], int half) {
    multiply_half_tiles(sums, dy, u[half]);
}
DEVICE void multiply_times(float (&sums)[4], const u32 (&dy)[4], const u32 (&u)[4], int half) {
    const u32 two[2] = {u[2 * half], u[2 * half + 1]};
    multiply_tiles(sums, dy, two);
}

// sums += the products of a chunk. `ring` has the last tiles of u; there are none before the first chunk.
template <bool FIRST>
DEVICE void correlate_chunk(Sums& sums, Times (&ring)[GROUP], const u8* u, const u8* dy) {
    constexpr int step = BY_TIME ? 512 : 32;
    Times tiles[2];
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

// Where a lane's row of a matrix is. Tensor cores take the quarters of a tile of dy, (times, rows), column by column
// and those of u row by row.
DEVICE int place_in_slot(int lane, bool of_dy) {
    const int upper = lane / 16, lower = lane / 8 % 2, line = lane % 8;
    if (ROW_TILES == 1) return line * SPAN_STRIDE + lower * 16;
    const int octet = of_dy ? lower : upper, row_tile = of_dy ? upper : lower;
    return BY_TIME ? piece_at_time(8 * octet + line, row_tile) : (8 * row_tile + line) * SPAN_STRIDE + octet * 16;
}

// The sums along the diagonals of a group: entry e is that of a lag of e - 16 from the group's first. A lane has one
// diagonal of a tile. In shared memory the numbers of a diagonal are in one column; there are zeros where it has none.
constexpr int SKEWED_ROW = 36;  // words; few bank conflicts

DEVICE void write_diagonals(const Sums& sums, float* skewed, float* to, int lane) {
    const int g = lane / 4, t = lane % 4;
    float* own = skewed + g * SKEWED_ROW + 15 + g - 2 * t;  // of row g and column 2t
    for (int i = lane; i < 16 * SKEWED_ROW; i += 32) skewed[i] = 0.f;
    float before = 0.f;  // of the previous tile, for lags that are 16 more
#pragma unroll
    for (int d = 0; d < GROUP; d++) {
        sync_warp();
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) own[i / 2 * 8 * (SKEWED_ROW + 1) - 8 * n - i % 2] = sums[d][n][i];
        sync_warp();
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < 16; i++) sum += skewed[i * SKEWED_ROW + lane];
        const float other = shuffle(before, lane + 16 < 31 ? lane + 16 : 31);
        if (lane < 16) to[16 * d + 1 + lane] = other + sum;
        if (lane >= 16 && lane < 31 && d == GROUP - 1) to[16 * d + 1 + lane] = sum;
        before = sum;  // that of lane 31 is 0
    }
}

KERNEL(CORRELATE_THREADS, 2) correlate(PARAMETER Parameters p) {
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pair = warp / WARPS;
    const int share = pair % 2 ? WARPS - 1 - warp % WARPS : warp % WARPS;  // schedulers have warps with more and less
    const int across = int(p.width + PAIR - 1) / PAIR, block = int(blockIdx.x);
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
    sync_block();
    if (!works) return;
    float* to = p.parts + ((part * p.width + channel) * p.n_groups + group) * ENTRIES;
    write_diagonals(sums, reinterpret_cast<float*>(shared_memory()) + warp * 16 * SKEWED_ROW, to, lane);
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
