// The causal depthwise convolution for one instruction set: forward and backward.
//
// A task is a chunk of steps of one row of the batch; in backward it covers only some of the channels. Inputs before a
// sequence are read from its initial state, or from a row of zeros. Notation: k is the width.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "scratch.h"
#include "sequences.h"
#include "simd.h"
#include "sums.h"
#include "threads.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

// Finds the inputs of a row: in x, in the initial state, or in a row of zeros.
class Inputs {
  public:
    Inputs(const ConvArgs& a, int64_t row) : a(a), row(row), size(item_size(a.x.type())), zeros_(a.d_inner) {}

    // The input at step t of a sequence; before the sequence begins it is in the initial state.
    const char* at(const Piece& p, int64_t t) const {
        if (t >= p.begin) return static_cast<const char*>(a.x.data) + a.x.at(row, t) * size;
        if (!a.initial_state) return reinterpret_cast<const char*>(zeros_.get());
        const int64_t place = p.index * (a.width - 1) + (a.width - 1) + (t - p.begin);
        return static_cast<const char*>(a.initial_state) + place * a.d_inner * size;
    }

  private:
    const ConvArgs& a;
    const int64_t row, size;
    const Scratch<double> zeros_;
};

// bias + sum over taps, for channels [c, c + count). K is the width, or 0 for any width.
template <typename T, int K>
ANYMAMBA_INLINE Vector<T> sum_of_taps(const ConvArgs& a, DType dtype, const char* const* taps, int64_t c, int count) {
    const int width = K ? K : int(a.width);
    auto sum = a.bias ? read_row<T>(a.bias, OWN_DTYPE<T>, c, count) : Vector<T>{};
    for (int i = 0; i < width; i++)
        sum += read_row<T>(a.weight, OWN_DTYPE<T>, i * a.d_inner + c, count) * read_row<T>(taps[i], dtype, c, count);
    return sum;
}

// U steps of channels [c, c + count), written to y from `place` on: each input and weight is read once for all of them.
// The inputs of the next U steps, which follow these in `taps`, are prefetched.
template <typename T, int K, int U>
ANYMAMBA_INLINE void forward_block(const ConvArgs& a, DType dtype, const char* const* taps, int64_t place, int64_t c,
                                   int count) {
    using V = Vector<T>;
    V y[U];
    if constexpr (K == 0) {
        static_assert(U == 1);
        y[0] = sum_of_taps<T, K>(a, dtype, taps, c, count);
    } else {
        V x[K - 1 + U], weight[K];
        const char* y_ahead = static_cast<const char*>(a.y.data) + (place + U * a.y.length_stride) * item_size(dtype);
        const V bias = a.bias ? read_row<T>(a.bias, OWN_DTYPE<T>, c, count) : V{};
#pragma GCC unroll 16
        for (int i = 0; i < K; i++) weight[i] = read_row<T>(a.weight, OWN_DTYPE<T>, i * a.d_inner + c, count);
#pragma GCC unroll 16
        for (int i = 0; i < K - 1 + U; i++) x[i] = read_row<T>(taps[i], dtype, c, count);
#pragma GCC unroll 16
        for (int j = 0; j < U; j++) {
            __builtin_prefetch(taps[K - 1 + U + j] + c * item_size(dtype), 0, 2);
            __builtin_prefetch(y_ahead + (j * a.y.length_stride + c) * item_size(dtype), 1, 2);
        }
#pragma GCC unroll 16
        for (int j = 0; j < U; j++) y[j] = bias;
#pragma GCC unroll 16
        for (int i = 0; i < K; i++)
#pragma GCC unroll 16
            for (int j = 0; j < U; j++) y[j] += weight[i] * x[i + j];
    }
    if (a.silu)
#pragma GCC unroll 16
        for (int j = 0; j < U; j++) y[j] = silu(y[j]);
#pragma GCC unroll 16
    for (int j = 0; j < U; j++) write_row<T>(a.y.data, dtype, place + j * a.y.length_stride + c, count, y[j]);
}

template <typename T, int K, int U, DType X>
void forward_steps(const ConvArgs& a, const char* const* taps, int64_t place) {
    constexpr int W = LANES<T>;
    int64_t c = 0;
    for (; c + W <= a.d_inner; c += W) forward_block<T, K, U>(a, X, taps, place, c, W);
    if (c < a.d_inner) forward_block<T, K, U>(a, X, taps, place, c, int(a.d_inner - c));
}

template <typename T, int K, int U>
void forward_steps(const ConvArgs& a, const char* const* taps, int64_t place) {
    switch (a.x.type()) {  // makes the dtype a compile-time constant in the loop
        case DType::float32: return forward_steps<T, K, U, DType::float32>(a, taps, place);
        case DType::float64: return forward_steps<T, K, U, DType::float64>(a, taps, place);
        case DType::bfloat16: return forward_steps<T, K, U, DType::bfloat16>(a, taps, place);
        default: return forward_steps<T, K, U, DType::float16>(a, taps, place);
    }
}

template <typename T, int K>
void forward_chunk(const ConvArgs& a, int64_t row, int64_t first, int64_t last) {
    constexpr int U = K ? ANYMAMBA_VECTOR_BYTES / 16 : 1;  // as many steps as fit in registers
    const Inputs inputs(a, row);
    const int64_t size = item_size(a.x.type()), n_states = a.width - 1;
    std::vector<const char*> taps(n_states + 2 * U);
    for (const Piece& p : pieces_of(a, row, first, last)) {
        int64_t t = p.first;
        const auto steps = [&](auto n) {
            for (; t + n() <= p.last; t += n()) {
                for (int64_t i = 0; i < n_states + 2 * n(); i++)
                    taps[i] = inputs.at(p, std::min(t - n_states + i, a.length - 1));
                forward_steps<T, K, n()>(a, taps.data(), a.y.at(row, t));
            }
        };
        steps(std::integral_constant<int, U>());
        steps(std::integral_constant<int, 1>());
        if (!p.ends()) continue;
        auto* state = static_cast<char*>(a.last_state) + p.index * n_states * a.d_inner * size;
        for (int64_t i = 0; i < n_states; i++)
            std::memcpy(state + i * a.d_inner * size, inputs.at(p, p.end - n_states + i), a.d_inner * size);
    }
}

// ---------------------------------------------------------------------------------------------- backward

constexpr int TILE = 32;

// Channels [c, c + count) of a chunk: gradients of x and the initial state, and this task's share of the gradients of
// weight and bias.
template <typename T, int K>
class BackwardBlock {
    static constexpr int W = LANES<T>;
    using V = Vector<T>;

  public:
    BackwardBlock(const ConvArgs& a, const Inputs& inputs, int64_t row, int64_t c, int count)
        : a(a),
          inputs(inputs),
          row(row),
          c(c),
          count(count),
          width(K ? K : int(a.width)),
          taps_(a.width),
          weight_(a.width * W),
          dtaps_((TILE + a.width) * W),
          sums_(1, a.width + 1) {
        for (int i = 0; i < width; i++)
            store<T>(weight_.get() + i * W, read_row<T>(a.weight, OWN_DTYPE<T>, i * a.d_inner + c, count));
    }

    void work(const Piece& p) {
        for (int64_t first = p.first; first < p.last; first += TILE) {
            const int64_t last = std::min(first + TILE, p.last), halo = std::min(last + width - 1, p.end);
            for (int64_t t = first; t < halo; t++) taps_back(p, t, first, t < last);
            for (int64_t t = first; t < last; t++) write(t, gradient(p, t, first));
            if (first == p.begin) initial(p);
            sums_.close_tile(0);
        }
    }

    void finish(T* dweight, T* dbias) const {
        for (int i = 0; i < width; i++)
            write_row<T>(dweight, OWN_DTYPE<T>, i * a.d_inner + c, count, sums_.total(0, i));
        write_row<T>(dbias, OWN_DTYPE<T>, c, count, sums_.total(0, width));
    }

  private:
    const ConvArgs& a;
    const Inputs& inputs;
    const int64_t row, c;
    const int count, width;
    std::vector<const char*> taps_;
    const Scratch<T> weight_, dtaps_;  // dtaps: gradients of the sums of taps, from the tile's first step on
    const Sums<T> sums_;               // sums over time: dweight and dbias

    // The gradient of the sum of taps at step t. If `own`, this tile also adds it to the gradients of the weights.
    void taps_back(const Piece& p, int64_t t, int64_t first, bool own) {
        for (int i = 0; i < width; i++) taps_[i] = inputs.at(p, t - width + 1 + i);
        V d = read_row<T>(a.dy.data, a.dy.type(), a.dy.at(row, t) + c, count);
        if (a.silu) {
            const V y = sum_of_taps<T, K>(a, a.x.type(), taps_.data(), c, count), gate = sigmoid(y);
            d *= gate * (1 + y * (1 - gate));
        }
        store<T>(dtaps_.get() + (t - first) * W, d);
        if (!own) return;
        T* const sums = sums_.tile(0);
        for (int i = 0; i < width; i++) {
            T* const dw = sums + i * W;
            store<T>(dw, load<T>(dw) + d * read_row<T>(taps_[i], a.x.type(), c, count));
        }
        T* const dbias = sums + width * W;
        store<T>(dbias, load<T>(dbias) + d);
    }

    // d loss / d (input at step s), which may be before the sequence.
    V gradient(const Piece& p, int64_t s, int64_t first) const {
        V d{};
        for (int i = 0; i < width; i++) {
            const int64_t t = s + width - 1 - i;
            if (t >= p.begin && t < p.end)
                d += load<T>(weight_.get() + i * W) * load<T>(dtaps_.get() + (t - first) * W);
        }
        const int64_t state = s - (p.end - width + 1);  // its index in the last state
        if (state >= 0)
            d += read_row<T>(a.dlast_state, OWN_DTYPE<T>, (p.index * (width - 1) + state) * a.d_inner + c, count);
        return d;
    }

    void write(int64_t t, V d) const { write_row<T>(a.dx.data, a.dx.type(), a.dx.at(row, t) + c, count, d); }

    void initial(const Piece& p) const {
        if (!a.dinitial_state) return;
        for (int j = 0; j < width - 1; j++)
            write_row<T>(a.dinitial_state, OWN_DTYPE<T>, (p.index * (width - 1) + j) * a.d_inner + c, count,
                         gradient(p, p.begin - width + 1 + j, p.begin));
    }
};

template <typename T, int K>
void backward_chunk(const ConvArgs& a, int64_t part, int64_t row, int64_t first, int64_t last, int64_t begin,
                    int64_t end) {
    const Inputs inputs(a, row);
    const auto pieces = pieces_of(a, row, first, last);
    T* dweight = static_cast<T*>(a.dweight_parts) + part * a.width * a.d_inner;
    T* dbias = static_cast<T*>(a.dbias_parts) + part * a.d_inner;
    for (int64_t c = begin; c < end; c += LANES<T>) {
        BackwardBlock<T, K> block(a, inputs, row, c, int(std::min<int64_t>(LANES<T>, end - c)));
        for (const Piece& p : pieces) block.work(p);
        block.finish(dweight, dbias);
    }
}

// ---------------------------------------------------------------------------------------------- tasks

template <typename T, int K>
void forward(const ConvArgs& a) {
    const int64_t n_chunks = (a.length + a.chunk - 1) / a.chunk;
    parallel_for(a.batch * n_chunks, a.n_threads, [&](int64_t i) {
        const int64_t first = i % n_chunks * a.chunk;
        forward_chunk<T, K>(a, i / n_chunks, first, std::min(first + a.chunk, a.length));
    });
}

template <typename T, int K>
void backward(const ConvArgs& a) {
    constexpr int64_t RANGE = 128;
    const int64_t n_chunks = (a.length + a.chunk - 1) / a.chunk, n_ranges = (a.d_inner + RANGE - 1) / RANGE;
    parallel_for(a.batch * n_chunks * n_ranges, a.n_threads, [&](int64_t i) {
        const int64_t part = i / n_ranges, begin = i % n_ranges * RANGE, first = part % n_chunks * a.chunk;
        backward_chunk<T, K>(a, part, part / n_chunks, first, std::min(first + a.chunk, a.length), begin,
                             std::min(begin + RANGE, a.d_inner));
    });
}

}  // namespace

void conv_forward(const ConvArgs& a) {
    if (a.is_double) return forward<double, 0>(a);
    a.width == 4 ? forward<float, 4>(a) : forward<float, 0>(a);
}

void conv_backward(const ConvArgs& a) {
    if (a.is_double) return backward<double, 0>(a);
    a.width == 4 ? backward<float, 4>(a) : backward<float, 0>(a);
}

}  // namespace anymamba::ANYMAMBA_ISA
