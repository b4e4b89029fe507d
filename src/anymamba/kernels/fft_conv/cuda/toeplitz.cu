// The causal convolution with filters as long as the sequence, by products of 16-bit tiles on tensor cores.
//
//     y[t] = sum over s <= t of k[t - s] u[s]
//
// For each channel this is a Toeplitz matrix times (length, rows). The matrix is never made: a word of a tile of it is
// a pair of neighbouring terms of the filter, so that a warp that goes on by 16 inputs needs two new words of the
// filter for all its tiles. The gradient of the filter sums products of tiles of dy and u along their diagonals. Sums
// are in float32, in an order that depends on the sizes only.
//
// Between the kernels a tensor is ordered (width, padded_rows, padded_length), with zeros where it is padded. If
// BY_TIME, tensors come and go as (width, length, rows), and `order` makes lines only.
//
// Needs BY_TIME, and ROW_TILES: 1 for up to 8 rows, or 2, also if BY_TIME.
#include "device.cuh"

struct Rows {  // a tensor (rows, length, width); the last dimension is dense
    u8* data;
    i64 row, token, dtype;
};
// All fields have 8 bytes; the order is that of products.TENSORS and products.FIELDS.
struct Parameters {
    Rows x;                // what `order` reads
    Rows y;                // what `multiply` writes
    const float* filters;  // (width, taps)
    u16* ordered;          // what `order` writes, or `multiply` reads
    const u16* inputs;     // u and the gradient of y, ordered, for `correlate`
    const u16* outputs;
    u32* lines;    // (width, 2, line): the filters in words, as `multiply` reads them
    float* parts;  // (n_parts, width, n_groups, ENTRIES): sums over some of the rows
    float* found;  // (width, taps): the gradient of the filters
    i64 rows, length, width, taps, padded_rows, padded_length, line;
    i64 order_blocks;  // those of `order` that order; the others make lines
    i64 n_tiles;       // of outputs, of `multiply`
    i64 n_groups, n_parts, rows_of_part;
    i64 adjoint;  // whether the matrix is transposed: for the gradient of the inputs
    i64 aligned;  // whether neighbouring channels can be read, or written, at once
    i64 near;     // whether blocks that read the same are neighbours, rather than those with most work first
};

// ------------------------------------------------------------------------------------------------ order
// A block turns ORDERED times of ORDERED channels of a row in shared memory, where a channel has a row of 32 words,
// each of two times. Pieces of 4 words are permuted so that no two lanes use one bank at a time.

constexpr int ORDERED = 64, ORDER_THREADS = 256, LINE_START = 16;  // words of zeros before the filter's first

DEVICE u32* piece_of_channel(int channel, int piece) {
    return reinterpret_cast<u32*>(shared_memory()) + channel * (ORDERED / 2) + (piece ^ channel / 8) * 4;
}

// Eight neighbouring channels at one time, zeros outside.
DEVICE uint4 read_channels(const Parameters& p, i64 row, i64 time, i64 channel) {
    uint4 found = {0u, 0u, 0u, 0u};
    if (row >= p.rows || time >= p.length || channel >= p.width) return found;
    const u16* from = reinterpret_cast<const u16*>(p.x.data) + row * p.x.row + time * p.x.token + channel;
    if (p.aligned) return *reinterpret_cast<const uint4*>(from);
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 first = channel + 2 * i < p.width ? from[2 * i] : 0;
        words[i] = first | u32(channel + 2 * i + 1 < p.width ? from[2 * i + 1] : 0) << 16;
    }
    return {words[0], words[1], words[2], words[3]};
}

DEVICE float term(const Parameters& p, const float* filter, int lag) {
    return lag >= 0 && lag < p.taps ? filter[lag] : 0.f;
}

// The two copies of a channel's filter, for even and odd places in a tile, in words of two terms.
DEVICE void make_line(const Parameters& p, i64 channel) {
    const float* filter = p.filters + channel * p.taps;
    u32* to = p.lines + channel * 2 * p.line;
    for (int i = threadIdx.x; i < p.line; i += ORDER_THREADS) {
        const int lag = 2 * (i - LINE_START);
        const float even = term(p, filter, lag), odd = term(p, filter, lag + 1);
        if (p.adjoint) {
            to[i] = floats_as_bfloats(even, odd);
            to[p.line + i] = floats_as_bfloats(odd, term(p, filter, lag + 2));
        } else {
            to[i] = floats_as_bfloats(even, term(p, filter, lag - 1));
            to[p.line + i] = floats_as_bfloats(odd, even);
        }
    }
}

KERNEL(ORDER_THREADS, 6) order(PARAMETER Parameters p) {
    let_next_start();
    const int block = int(blockIdx.x), thread = threadIdx.x;
    if (block >= p.order_blocks) return make_line(p, block - p.order_blocks);
    const int across = int(p.width + ORDERED - 1) / ORDERED, times = int(p.padded_length) / ORDERED;
    const int first = block % across * ORDERED, start = block / across % times * ORDERED, row = block / across / times;
    const int octet = thread % 8, pair = thread / 8;
    const uint4 a = read_channels(p, row, start + 2 * pair, first + 8 * octet);
    const uint4 b = read_channels(p, row, start + 2 * pair + 1, first + 8 * octet);
    const u32 here[4] = {a.x, a.y, a.z, a.w}, next[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        piece_of_channel(8 * octet + 2 * i, pair / 4)[pair % 4] = permute_bytes(here[i], next[i], 0x5410);
        piece_of_channel(8 * octet + 2 * i + 1, pair / 4)[pair % 4] = permute_bytes(here[i], next[i], 0x7632);
    }
    sync_block();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int channel = (thread + i * ORDER_THREADS) / 8, piece = thread % 8;
        if (first + channel >= p.width) continue;
        u16* to = p.ordered + ((first + channel) * p.padded_rows + row) * p.padded_length + start + 8 * piece;
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(piece_of_channel(channel, piece));
    }
}

// ------------------------------------------------------------------------------------------------ multiply
// A block has TILE outputs of ROWS rows of CHANNELS channels; a warp has CHUNK outputs of one channel, TILES tiles
// of 16. Inputs come through shared memory, a chunk at a time, which the warps of their channel copy and wait for; the
// filters of the channel stay there.
//
// With g = lane / 4 and t = lane % 4 the words of the tile `lag` 16s below the diagonal are terms 16 lag + g - 2t and
// the one before; 8 more for the lower left quarter, 8 fewer for the upper right one, the same for the others.
//
// The transposed matrix is the same one if groups of 8 times are taken in reverse order, in and out: only the words of
// the filter differ, which are then terms 8 n + 2t - g and the one after.
//
// If BY_TIME, a time has the 32 bytes of 16 rows in shared memory, whose halves are exchanged at every other four
// times: tensor cores take 8 of them at once.

constexpr int TILES = 8, ROWS = 8 * ROW_TILES, CHANNELS = 4, SHARES = 2;  // SHARES: the warps of a channel
constexpr int CHUNK = 16 * TILES, TILE = CHUNK * SHARES, SHARERS = 32 * SHARES, THREADS = CHANNELS * SHARERS;
constexpr int STRIDE = 2 * CHUNK + (BY_TIME ? 0 : 16);  // of a row of a chunk: no bank conflicts
constexpr int OF_CHANNEL = ROWS * STRIDE, STAGE = CHANNELS * OF_CHANNEL;
constexpr int PIECES = CHUNK / 8;                                // of 16 bytes, of a row of a chunk
constexpr int APART = BY_TIME ? SHARERS / 2 : SHARERS / PIECES;  // times, or rows, between two pieces of a thread
constexpr int COPIES = (BY_TIME ? CHUNK : ROWS) / APART;

DEVICE int piece_at_time(int time, int half) { return time * 32 + (half ^ time / 4 % 2) * 16; }
DEVICE void load_columns(u32 (&words)[4], const u8* from) {
    if constexpr (BY_TIME) {
        load_tiles_transposed(words, from);
    } else {
        load_tiles(words, from);
    }
}

DEVICE int octets(const Parameters& p) { return int(p.length + 7) / 8; }
DEVICE int octet_at(const Parameters& p, int place) { return p.adjoint ? octets(p) - 1 - place : place; }

// What a block works on.
struct Block {
    int channel, row, tile, start;  // inputs before `start` are further away than the filter has taps

    DEVICE Block(const Parameters& p, int index) {
        const int across = int(p.width + CHANNELS - 1) / CHANNELS, down = int(p.padded_rows) / ROWS;
        const int n_tiles = int(p.n_tiles);
        const int place = p.near ? index / n_tiles : index % (across * down);
        channel = place % across * CHANNELS, row = place / across * ROWS;
        tile = n_tiles - 1 - (p.near ? index % n_tiles : index / (across * down));
        start = max(0, tile * TILE - int(p.taps) + 1) / CHUNK * CHUNK;
    }
    DEVICE int lags() const { return (tile + 1) * TILE - start; }
};

// The warps of a channel wait for each other.
DEVICE void sync_channel(int channel) { sync_part(1 + channel, SHARERS); }

DEVICE void copy_lines(u32* lines, const Parameters& p, const Block& at, int channel, int thread) {
    const int pieces = at.channel + channel < p.width ? (LINE_START + at.lags() / 2) / 4 : 0;
    for (int i = 0; i < 2; i++)
        for (int k = thread; k < pieces; k += SHARERS)
            copy_16_bytes(lines + (2 * channel + i) * p.line + 4 * k,
                          p.lines + (2 * (at.channel + channel) + i) * p.line + 4 * k);
}

// What a thread copies of the next chunk of its channel: a piece of some rows, or some times of 8 rows.
struct Inputs {
    const u16* from;
    u8* to;     // in the first stage
    int place;  // of the piece, in octets, in the order in which they are read; or the first time
    int n_inside;

    DEVICE Inputs(const Parameters& p, u8* stages, const Block& at, int channel, int thread) {
        const bool exists = at.channel + channel < p.width;
        const i64 line = at.channel + channel;
        to = stages + channel * OF_CHANNEL;
        if constexpr (BY_TIME) {
            const int half = thread % 2, time = thread / 2, row = at.row + 8 * half;
            place = 8 * octet_at(p, at.start / 8 + time / 8) + time % 8;
            from = p.ordered + (line * p.length + place) * p.rows + row;
            to += piece_at_time(time, half);
            n_inside = exists && row < p.rows ? int(p.length) : 0;
        } else {
            const int piece = thread % PIECES, row = thread / PIECES;
            place = at.start / 8 + piece;
            from = p.ordered + (line * p.padded_rows + at.row + row) * p.padded_length + 8 * octet_at(p, place);
            to += row * STRIDE + 16 * piece;
            n_inside = exists ? octets(p) : 0;
        }
    }
    // The rows of a time are in the same half of its 32 bytes as those APART times later.
    DEVICE void copy(const Parameters& p, int stage) {
        const int sign = p.adjoint ? -1 : 1;
        u8* here = to + stage * STAGE;
        if constexpr (BY_TIME) {
            const i64 step = sign * APART * p.rows;
#pragma unroll
            for (int i = 0; i < COPIES; i++)
                copy_16_bytes(here + i * APART * 32, from + i * step, u32(place + i * sign * APART) < u32(n_inside));
            from += COPIES * step, place += sign * CHUNK;
        } else {
            const i64 step = APART * p.padded_length;
            const bool ok = place < n_inside;
#pragma unroll
            for (int i = 0; i < COPIES; i++) copy_16_bytes(here + i * APART * STRIDE, from + i * step, ok);
            from += sign * CHUNK, place += PIECES;
        }
    }
};

// The words of the filter that a lane has: at step k those of tile m are in place (m - k) % TILES. A word that two
// tiles share is read twice, since tensor cores take a tile from four neighbouring registers.
struct Words {
    const volatile u32* line;  // those of the first tile at the first step of the chunk
    u32 tiles[TILES][4];

    DEVICE Words(const u32* lane_line, int lag) : line(lane_line + 8 * lag) {
#pragma unroll
        for (int m = 0; m < TILES; m++) get(m, m);
    }
    DEVICE void get(int place, int tile) {
        const volatile u32* from = line + 8 * tile;
        tiles[place][0] = from[0], tiles[place][1] = from[4], tiles[place][2] = from[-4], tiles[place][3] = from[0];
    }
};

DEVICE constexpr int turn(int place) { return place & (TILES - 1); }

// sums += the products of a chunk. On the diagonal tiles above it are left out, and no new words are needed.
template <bool DIAGONAL>
DEVICE void multiply_chunk(float (&sums)[TILES][ROW_TILES][4], Words& words, const u8* from) {
    constexpr int step = BY_TIME ? 512 : 32;
    u32 columns[2][4];  // two row tiles take four words for 16 times, one takes them for 32
    load_columns(columns[0], from);
#pragma unroll
    for (int k = 0; k < TILES; k++) {
        if (ROW_TILES == 2 && k + 1 < TILES) load_columns(columns[(k + 1) % 2], from + step * (k + 1));
        if (ROW_TILES == 1 && k % 2 == 0 && k + 2 < TILES)
            load_columns(columns[(k / 2 + 1) % 2], from + step * (k + 2));
#pragma unroll
        for (int m = TILES - 1; m >= (DIAGONAL ? k : 0); m--) {
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++) {
                const u32(&four)[4] = columns[(ROW_TILES == 2 ? k : k / 2) % 2];
                const int two = ROW_TILES == 2 ? 2 * n : k % 2 * 2;
                const u32 column[2] = {four[two], four[two + 1]};
                multiply_tiles(sums[m][n], words.tiles[turn(m - k)], column);
            }
            if (!DIAGONAL && m == TILES - 1) words.get(turn(-k - 1), -k - 1);
        }
    }
}

// Sums wait in shared memory as (ROWS, TILE, CHANNELS), or as inputs lie if BY_TIME. The words of neighbouring channels
// at a time are turned by row, and rows are padded: no two lanes use one bank at a time.
constexpr int OUTPUT_ROW = TILE * CHANNELS + 16, WORDS = CHANNELS / 2;
DEVICE constexpr int turned(int word, int row) { return (word + row / 4) % WORDS; }

// The sums of a warp to shared memory in 16 bits.
DEVICE void put_sums(const float (&sums)[TILES][ROW_TILES][4], u8* to, int channel, int start) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int inside = 2 * turned(channel / 2, 2 * t) + channel % 2;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const int time = start + 16 * m + g + i * 4;
                const u32 two = floats_as_bfloats(sums[m][n][i], sums[m][n][i + 1]);  // of rows 2t and 2t + 1
                if constexpr (BY_TIME) {
                    *reinterpret_cast<u32*>(to + channel * TILE * 32 + piece_at_time(time, n) + 4 * t) = two;
                } else {
                    u16* one = reinterpret_cast<u16*>(to) + (8 * n + 2 * t) * OUTPUT_ROW + time * CHANNELS + inside;
                    one[0] = u16(two), one[OUTPUT_ROW] = u16(two >> 16);
                }
            }
}

DEVICE int time_at(const Parameters& p, int place) { return 8 * octet_at(p, place / 8) + place % 8; }

// A thread has every AT_ONCE-th time of 8 rows.
DEVICE void write_times(const u8* sums, const Parameters& p, const Block& at) {
    constexpr int AT_ONCE = THREADS / 2;
    const int half = threadIdx.x % 2, place = threadIdx.x / 2, row = at.row + 8 * half, sign = p.adjoint ? -1 : 1;
    if (row >= p.rows) return;
    const int first = time_at(p, at.tile * TILE + place);
    u16* to = reinterpret_cast<u16*>(p.y.data) + (at.channel * p.length + first) * p.rows + row;
    const u8* from = sums + piece_at_time(place, half);
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) {
        if (at.channel + c >= p.width) break;
#pragma unroll
        for (int later = 0; later < TILE; later += AT_ONCE)
            if (u32(first + sign * later) < u32(p.length))
                *reinterpret_cast<uint4*>(to + sign * later * p.rows) =
                    *reinterpret_cast<const uint4*>(from + (c * TILE + later) * 32);
        to += p.length * p.rows;
    }
}

struct alignas(2 * CHANNELS) AtTime {
    u32 of[WORDS];
};

// A thread has one time of all rows.
DEVICE void write_rows(const u8* sums, const Parameters& p, const Block& at) {
    static_assert(THREADS == TILE);
    const int time = time_at(p, at.tile * TILE + threadIdx.x);
    if (time < 0 || time >= p.length) return;
    u16* to = reinterpret_cast<u16*>(p.y.data) + at.row * p.y.row + time * p.y.token + at.channel;
    const u16* from = reinterpret_cast<const u16*>(sums) + threadIdx.x * CHANNELS;
    const int n_rows = int(p.rows) - at.row, n_channels = int(p.width) - at.channel;
    AtTime found[ROWS];  // all are asked for before the first is needed
#pragma unroll
    for (int row = 0; row < ROWS; row++) found[row] = *reinterpret_cast<const AtTime*>(from + row * OUTPUT_ROW);
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        AtTime words;
#pragma unroll
        for (int i = 0; i < WORDS; i++) words.of[i] = found[row].of[turned(i, row)];
        if (row < n_rows && p.aligned) *reinterpret_cast<AtTime*>(to + row * p.y.row) = words;
#pragma unroll
        for (int c = 0; c < CHANNELS; c++)
            if (row < n_rows && !p.aligned && c < n_channels)
                to[row * p.y.row + c] = u16(words.of[c / 2] >> c % 2 * 16);
    }
}

KERNEL(THREADS, 512 / THREADS) multiply(PARAMETER Parameters p) {
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int channel = warp % CHANNELS, share = warp / CHANNELS;
    const Block at(p, int(blockIdx.x));
    const int n_chunks = at.lags() / CHUNK, own = n_chunks - SHARES + share, thread = 32 * share + lane;
    u32* lines = reinterpret_cast<u32*>(shared_memory());
    u8* stages = shared_memory() + CHANNELS * 2 * p.line * 4;
    copy_lines(lines, p, at, channel, thread);
    Inputs inputs(p, stages, at, channel, thread);
    inputs.copy(p, 0);
    end_of_copies();
    wait_for_copies<0>();
    sync_channel(channel);
    const int shift = LINE_START + (p.adjoint ? t - (g + 1) / 2 : g / 2 - t);
    Words words(lines + (2 * channel + g % 2) * p.line + shift, own * TILES);
    const int row_tile = ROW_TILES == 2 ? lane / 16 : 0, octet = ROW_TILES == 2 ? lane / 8 % 2 : lane / 8;
    stages += channel * OF_CHANNEL + (BY_TIME ? piece_at_time(8 * octet + lane % 8, row_tile)
                                              : (8 * row_tile + lane % 8) * STRIDE + 16 * octet);
    float sums[TILES][ROW_TILES][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < n_chunks; chunk++) {
        wait_for_copies<0>();
        sync_channel(channel);  // the chunk is there, and the other stage has been read
        if (chunk + 1 < n_chunks) inputs.copy(p, (chunk + 1) % 2);
        end_of_copies();
        const u8* from = stages + chunk % 2 * STAGE;
        if (chunk < own) {
            multiply_chunk<false>(sums, words, from);
        } else if (chunk == own) {
            multiply_chunk<true>(sums, words, from);
        }
        words.line -= 8 * TILES;
    }
    sync_block();
    put_sums(sums, shared_memory(), channel, share * CHUNK);
    sync_block();
    if constexpr (BY_TIME) {
        write_times(shared_memory(), p, at);
    } else {
        int block = int(blockIdx.x);
        keep(block);  // to compute it again takes no register during the products
        write_rows(shared_memory(), p, Block(p, block));
    }
}

// ------------------------------------------------------------------------------------------------ correlate
// A warp has a group of 8 differences of tiles of 16, and of each the sum over time of a tile of dy times one of u,
// contracted over BATCH rows: (16 times of dy, 16 times of u). A block has WARPS neighbouring groups of PAIR channels
// and goes through chunks of SPAN times, copying AHEAD of them; of u it keeps the chunks that its last warp still
// needs.

constexpr int GROUP = 8, WARPS = 4, PAIR = 2, SPAN = 16 * GROUP, ENTRIES = SPAN + 16, BATCH = ROWS;
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
