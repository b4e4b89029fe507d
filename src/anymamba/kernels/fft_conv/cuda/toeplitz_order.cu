// Inputs in the order of the products, and filters in their words; see toeplitz.cuh.
//
// A block turns ORDERED times of ORDERED channels of a row in shared memory, where a channel has a row of 32 words,
// each of two times. Pieces of 4 words are permuted so that no two lanes use one bank at a time.
#include "toeplitz.cuh"

constexpr int ORDERED = 64;

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
