// Shared by the tasks of forward and backward: their position, scratch memory, the reading of tensors into it, and the
// states that chunks of time pass to each other. See scan.cpp for the notation.
#pragma once

#include <algorithm>
#include <vector>

#include "scan_block.h"
#include "scratch.h"
#include "sequences.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

// The base of the forward and backward tasks.
template <typename T>
class Task {
  public:
    static constexpr int W = LANES<T>;
    using V = Vector<T>;

    Task(const ScanArgs& a, int64_t row, int64_t chunk, int64_t range)
        : a(a),
          per_group(a.d_inner / a.n_groups),
          ranges_per_group((per_group + a.range - 1) / a.range),
          row(row),
          chunk(chunk),
          range(range),
          group(range / ranges_per_group),
          begin(group * per_group + range % ranges_per_group * a.range),
          end(std::min(begin + a.range, (group + 1) * per_group)),
          n_blocks(int((end - begin + W - 1) / W)),
          states(a.d_state * W),
          n_tiles((a.length + a.tile - 1) / a.tile),
          n_chunks((a.length + a.chunk - 1) / a.chunk),
          first_tile(chunk * (a.chunk / a.tile)),
          last_tile(std::min(first_tile + a.chunk / a.tile, n_tiles)),
          B_(a.tile * a.d_state),
          C_(a.tile * a.d_state),
          per_channel_(n_blocks * states * 5),
          h_(n_blocks * states),
          decays_(n_blocks * (states + W)),
          rows_(a.tile * W * N_ROWS) {
        for (int i = 0; i < n_blocks; i++) {
            const int64_t channel = begin + i * W;
            const int count = int(std::min<int64_t>(W, end - channel));
            gather(a.A, channel, count, of_channel(i, 2));
            for (int64_t j = 0; j < states; j++) {
                const auto rate = make_rate(of_channel(i, 2)[j]);
                of_channel(i, 0)[j] = rate.high;
                of_channel(i, 1)[j] = rate.low;
            }
            if (!a.selective_B) gather(a.constant_B, channel, count, of_channel(i, 3));
            if (!a.selective_C) gather(a.constant_C, channel, count, of_channel(i, 4));
        }
    }

  protected:
    static constexpr int N_ROWS = 8;
    enum RowName { DELTA, DRIVE, Y, U, RAW, DY, DDELTA, DDRIVE };

    const ScanArgs& a;
    const int64_t per_group, ranges_per_group, row, chunk, range, group, begin, end;
    const int n_blocks;
    const int64_t states, n_tiles, n_chunks, first_tile, last_tile;

    T* rows(RowName name) const { return rows_.get() + name * a.tile * W; }
    T* of_channel(int block, int what) const { return per_channel_.get() + (block * 5 + what) * states; }

    Block<T> block(int i) const {
        Block<T> k{};
        k.channel = begin + i * W;
        k.count = int(std::min<int64_t>(W, end - k.channel));
        k.d_state = int(a.d_state);
        k.zoh = a.zoh, k.selective_B = a.selective_B, k.selective_C = a.selective_C;
        k.B = B_.get(), k.C = C_.get();
        k.high = of_channel(i, 0), k.low = of_channel(i, 1), k.rate = of_channel(i, 2);
        k.constant_B = of_channel(i, 3), k.constant_C = of_channel(i, 4);
        k.delta = rows(DELTA), k.drive = rows(DRIVE), k.y = rows(Y);
        k.h = h_.get() + i * states;
        return k;
    }

    // Read selective B and C of a tile, converted to T.
    void read_matrices(int64_t first, int n_steps) const {
        if (a.selective_B) read_matrix(a.B, first, n_steps, B_.get());
        if (a.selective_C) read_matrix(a.C, first, n_steps, C_.get());
    }
    void read_matrix(const Rows& matrix, int64_t first, int n_steps, T* out) const {
        const int d_state = int(a.d_state);
        for (int t = 0; t < n_steps; t++) {
            const int64_t place = matrix.at(row, first + t) + group * matrix.group_stride;
            for (int n = 0; n < d_state; n += W)
                write_row<T>(out + t * d_state, OWN_DTYPE<T>, n, std::min(W, d_state - n),
                             read_row<T>(matrix.data, matrix.type(), place + n, std::min(W, d_state - n)));
        }
    }

    // Read a tile: delta, delta u and y = D u, whether its exponents are moderate, and for backward also u and delta
    // before the softplus.
    template <bool KEEP>
    void read_rows(Block<T>& k, int64_t first, int n_steps) const {
        V largest{}, largest_rate{};
        for (int n = 0; n < k.d_state; n++) largest_rate = larger_size(largest_rate, load<T>(k.high + n * W));
        const V bias = vector(a.delta_bias, k), D = vector(a.D, k);
        for (int t = 0; t < n_steps; t++) {
            const V u = read_row<T>(a.u.data, a.u.type(), a.u.at(row, first + t) + k.channel, k.count);
            const V raw =
                read_row<T>(a.delta.data, a.delta.type(), a.delta.at(row, first + t) + k.channel, k.count) + bias;
            const V delta = a.softplus ? softplus(raw) : raw;
            largest = larger_size(largest, delta);
            if (KEEP) {
                store<T>(rows(U) + t * W, u);
                store<T>(rows(RAW) + t * W, raw);
            }
            store<T>(k.delta + t * W, delta);
            store<T>(k.drive + t * W, delta * u);
            store<T>(k.y + t * W, D * u);
        }
        k.inside = true;
        for (int i = 0; i < W; i++) k.inside &= largest[i] * largest_rate[i] < LARGEST_EXPONENT;
    }

    // Make run_states prefetch the rows of the block after block i: the next in the tile, or the first of the next one.
    void fetch_ahead(Block<T>& k, int i, int64_t first, int64_t next_first, const Rows& other) const {
        const bool in_tile = i + 1 < n_blocks;
        const int64_t channel = in_tile ? k.channel + W : begin, step = in_tile ? first : next_first;
        const Rows* const all[] = {&a.u, &a.delta, a.z.data ? &a.z : &a.u, &other};
        for (int j = 0; j < 4; j++) {
            const int64_t size = item_size(all[j]->type());
            k.ahead[j] = static_cast<const char*>(all[j]->data) + (all[j]->at(row, step) + channel) * size;
            k.ahead_stride[j] = all[j]->length_stride * size;
        }
    }

    // A vector (d_inner,) of the working type; zeros for a null pointer.
    V vector(const void* data, const Block<T>& k) const {
        return data ? read_row<T>(data, OWN_DTYPE<T>, k.channel, k.count) : V{};
    }

    // Read (n, lane) from a contiguous (..., d_inner, d_state), from `channel` on. `scatter` is the inverse.
    void gather(const void* matrix, int64_t channel, int count, T* out) const {
        const T* source = static_cast<const T*>(matrix) + channel * a.d_state;
        for (int64_t n = 0; n < a.d_state; n++)
            for (int i = 0; i < W; i++) out[n * W + i] = i < count ? source[i * a.d_state + n] : T(0);
    }
    void scatter(const T* states_of_block, int64_t channel, int count, void* matrix) const {
        T* target = static_cast<T*>(matrix) + channel * a.d_state;
        for (int64_t n = 0; n < a.d_state; n++)
            for (int i = 0; i < count; i++) target[i * a.d_state + n] = states_of_block[n * W + i];
    }

    // Set the state with which a sequence starts.
    void start(const Block<T>& k, int64_t sequence) const {
        if (a.initial_state)
            gather(a.initial_state, sequence * a.d_inner + k.channel, k.count, k.h);
        else
            std::fill_n(k.h, states, T(0));
    }

    // Whether a sequence starts in a chunk; then no state passes through it.
    bool starts_in(int64_t other_chunk) const {
        const int64_t first = other_chunk * a.chunk, last = std::min(first + a.chunk, a.length);
        if (!a.offsets) return first == 0;
        const auto* offsets = static_cast<const int64_t*>(a.offsets);
        const auto* next = std::lower_bound(offsets, offsets + a.n_sequences, first);
        return next < offsets + a.n_sequences && *next < last;
    }

    // The product of a block's decays over the chunk, and the sum of its steps.
    T* decays(int block) const { return decays_.get() + block * (states + W); }
    T* step_sums(int block) const { return decays(block) + states; }

    // Store for the other chunks the state that leaves this one after a start from zero, and its decay over the chunk.
    void hand_over(const Block<T>& k, const T* leaving, int block) const {
        const int64_t channel = (row * n_chunks + chunk) * a.d_inner + k.channel;
        scatter(leaving, channel, k.count, a.chunk_states);
        scatter(decays(block), channel, k.count, a.chunk_decays);
        if (a.chunk_steps) write_row<T>(a.chunk_steps, OWN_DTYPE<T>, channel, k.count, load<T>(step_sums(block)));
    }

    // The state that arrives at this chunk from the chunks `from`, from + direction, and so on.
    void arrive(const Block<T>& k, int64_t from, int direction, T* arriving) const {
        std::vector<T> leaving(states), passing(states);
        for (int64_t other = from; other != chunk; other += direction) {
            const int64_t channel = (row * n_chunks + other) * a.d_inner + k.channel;
            gather(a.chunk_states, channel, k.count, leaving.data());
            gather(a.chunk_decays, channel, k.count, passing.data());
            const bool through = other != from && !starts_in(other);
            for (int64_t j = 0; j < states; j++) arriving[j] = leaving[j] + (through ? passing[j] * arriving[j] : T(0));
        }
    }

    // The states saved before a tile, (d_state, d_inner).
    T* saved(int64_t tile) const { return static_cast<T*>(a.saved) + (tile * a.batch + row) * a.d_state * a.d_inner; }

  private:
    Scratch<T> B_, C_, per_channel_, h_, decays_, rows_;
};

}  // namespace
}  // namespace anymamba::ANYMAMBA_ISA
