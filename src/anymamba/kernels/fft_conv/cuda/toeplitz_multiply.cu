// The products; see toeplitz.cuh.
//
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
// The channels of a block are 8 bytes of a row of a time, and writing a part of a sector costs as much as writing it
// whole: half of the time of short sequences. So GROUP blocks with neighbouring channels exchange their sums, and each
// writes some of the times.
#include "toeplitz.cuh"

constexpr int TILES = 8, ROWS = 8 * ROW_TILES, CHANNELS = 4, SHARES = 2;  // SHARES: the warps of a channel
constexpr int CHUNK = 16 * TILES, TILE = CHUNK * SHARES, SHARERS = 32 * SHARES, THREADS = CHANNELS * SHARERS;
constexpr int STRIDE = 2 * CHUNK + (BY_TIME ? 0 : 16);  // of a row of a chunk: no bank conflicts
constexpr int OF_CHANNEL = ROWS * STRIDE, STAGE = CHANNELS * OF_CHANNEL;
constexpr int PIECES = CHUNK / 8;                                // of 16 bytes, of a row of a chunk
constexpr int APART = BY_TIME ? SHARERS / 2 : SHARERS / PIECES;  // times, or rows, between two pieces of a thread
constexpr int COPIES = (BY_TIME ? CHUNK : ROWS) / APART;
constexpr int GROUP = BY_TIME ? 1 : 4, EXCHANGED = CLUSTERS ? GROUP : 1;  // blocks

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

    explicit DEVICE Block(const Parameters& p) {
        constexpr int of_group = GROUP * CHANNELS;
        const int across = int(p.width + of_group - 1) / of_group, down = int(p.padded_rows) / ROWS;
        const int index = work_at(p, int(blockIdx.x) / GROUP, int(gridDim.x) / GROUP), n_tiles = int(p.n_tiles);
        const int place = p.near ? index / n_tiles : index % (across * down);
        channel = place % across * of_group + int(blockIdx.x) % GROUP * CHANNELS, row = place / across * ROWS;
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

// A thread has one time of all rows, of the channels of one block. It reads a few rows before it writes the first.
template <bool ALIGNED>
DEVICE void write_time(const u16* from, int block, u16* to, const Parameters& p, int n_rows, int n_channels) {
    static_assert(CHANNELS == 4);
    constexpr int at_once = 4;
#pragma unroll
    for (int first = 0; first < ROWS; first += at_once) {
        uint2 found[at_once];
#pragma unroll
        for (int i = 0; i < at_once; i++) {
            if (first + i >= n_rows) break;
            const uint2* place = reinterpret_cast<const uint2*>(from + (first + i) * OUTPUT_ROW);
            found[i] = read_of_block(place, block);
        }
#pragma unroll
        for (int i = 0; i < at_once; i++) {
            if (first + i >= n_rows) return;
            const u32 two[2] = {found[i].x, found[i].y};
            const uint2 words = {two[turned(0, first + i)], two[turned(1, first + i)]};
            if constexpr (ALIGNED) {
                *reinterpret_cast<uint2*>(to) = words;
            } else {
#pragma unroll
                for (int c = 0; c < CHANNELS; c++)
                    if (c < n_channels) to[c] = u16((c < 2 ? words.x : words.y) >> c % 2 * 16);
            }
            to += p.y.row;
        }
    }
}

DEVICE void write_rows(const u8* sums, const Parameters& p, const Block& at) {
    static_assert(THREADS == TILE);
    const int own = int(blockIdx.x) % EXCHANGED, block = threadIdx.x % EXCHANGED;
    const int place = threadIdx.x / EXCHANGED + own * (TILE / EXCHANGED),
              channel = at.channel + (block - own) * CHANNELS;
    const int time = time_at(p, at.tile * TILE + place);
    if (time < 0 || time >= p.length) return;
    u16* to = reinterpret_cast<u16*>(p.y.data) + at.row * p.y.row + time * p.y.token + channel;
    const u16* from = reinterpret_cast<const u16*>(sums) + place * CHANNELS;
    const int n_channels = int(p.width) - channel, n_rows = n_channels > 0 ? int(p.rows) - at.row : 0;
    if (p.aligned)
        write_time<true>(from, block, to, p, n_rows, n_channels);
    else
        write_time<false>(from, block, to, p, n_rows, n_channels);
}

CLUSTERED_KERNEL(GROUP, THREADS, 512 / THREADS) multiply(PARAMETER Parameters p) {
    let_next_start();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int channel = warp % CHANNELS, share = warp / CHANNELS;
    const Block at(p);
    const int n_chunks = at.channel < p.width ? at.lags() / CHUNK : 0, own = n_chunks - SHARES + share,
              thread = 32 * share + lane;
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
    if constexpr (BY_TIME) {
        sync_block();
        write_times(shared_memory(), p, at);
    } else {
        sync_cluster();
        write_rows(shared_memory(), p, at);
        leave_cluster();
    }
}
