// Products of packed weights for one instruction set: activations in the form that a format needs, and which product.

#include <algorithm>
#include <memory>
#include <new>

#include "kernels.h"
#include "products_blocks.h"
#include "products_floats.h"
#include "products_words.h"
#include "threads.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

ANYMAMBA_INLINE int32_t sum_lanes(vint v) {
    int32_t lanes[LANES<float>];
    std::memcpy(lanes, &v, sizeof v);
    return sum_of_lanes<int32_t, LANES<float>>(lanes);
}

ANYMAMBA_INLINE int32_t largest_lane(vint v) {
#if defined(__AVX512F__)
    const __m512i all = (__m512i)v;
    const __m256i eight = _mm256_max_epi32(_mm512_castsi512_si256(all), _mm512_maskz_extracti64x4_epi64(0xf, all, 1));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
#else
    int32_t lanes[LANES<float>], largest = 0;
    std::memcpy(lanes, &v, sizeof v);
    for (int32_t lane : lanes) largest = std::max(largest, lane);
    return largest;
#endif
}

ANYMAMBA_INLINE void store_bytes(int8_t* to, vint v) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v));
#else
    for (int i = 0; i < LANES<float>; i++) to[i] = int8_t(v[i]);
#endif
}

// 32 activations as whole numbers from -127 to 127, rounded to nearest. Blocks below 2^-100 count as zeros.
void pack_block(const float* from, ActivationBlock& block) {
    constexpr int L = LANES<float>, V = 32 / L;
    vfloat x[V];
    vint largest{};
    for (int i = 0; i < V; i++) {
        x[i] = load<float>(from + L * i);
        const vint size = (vint)x[i] & INT32_MAX;
        largest = size > largest ? size : largest;
    }
    const int32_t bits = largest_lane(largest);
    float size;
    std::memcpy(&size, &bits, 4);
    if (bits >= 0x7f800000 || size < 7.8886090522101181e-31f) {
        block = {};
        if (bits >= 0x7f800000) block.scale = block.scaled_sum = std::nanf("");
        return;
    }
    const vfloat magic = broadcast(12582912.0f);  // adding 1.5 2^23 rounds to a whole number
    const float inverse = 127 / size;
    vint halves[2] = {};
    for (int i = 0; i < V; i++) {
        const vint q = (vint)(x[i] * inverse + magic) - (vint)magic;
        store_bytes(block.q + L * i, q);
        halves[2 * i / V] += q;
    }
    const int32_t first = sum_lanes(halves[0]), last = sum_lanes(halves[1]);
    block.scale = size / 127;
    block.scaled_sum = block.scale * float(first + last);
    block.minus_8 = -8 * (first + last), block.minus_128 = -128 * (first + last);
    block.minus_32[0] = -32 * first, block.minus_32[1] = -32 * last;
}

void pack_blocks(const float* x, int64_t n_in, ActivationBlock* to) {
    int64_t i = 0;
    for (; i + 32 <= n_in; i += 32) pack_block(x + i, *to++);
    if (i == n_in) return;
    float last[32] = {};
    std::memcpy(last, x + i, (n_in - i) * sizeof(float));
    pack_block(last, *to);
}

void pack_bfloat16(const float* x, int64_t n_in, uint16_t* to) {
    int64_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + 32 <= n_in; i += 32) {
        const __m512bh pair = _mm512_cvtne2ps_pbh((__m512)load<float>(x + i + 16), (__m512)load<float>(x + i));
        _mm512_storeu_si512(to + i, (__m512i)pair);
    }
#endif
    for (; i < n_in; i += LANES<float>) {
        const int count = int(std::min<int64_t>(LANES<float>, n_in - i));
        write_floats(to, DType::bfloat16, i, count, read_floats(x, DType::float32, i, count));
    }
}

// Uninitialised memory aligned to a cache line. A thread keeps up to MOST_KEPT bytes for its next call: fresh memory
// costs a page fault for every 4 KiB.
class Activations {
  public:
    explicit Activations(int64_t size) {
        Bytes& bytes = size <= MOST_KEPT ? kept() : own_;
        if (size > bytes.size) bytes = Bytes(size);
        data_ = bytes.data.get();
    }
    char* get() const { return data_; }

  private:
    static constexpr int64_t MOST_KEPT = 1 << 24;
    struct Free {
        void operator()(char* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    struct Bytes {
        std::unique_ptr<char, Free> data;
        int64_t size = 0;
        Bytes() = default;
        explicit Bytes(int64_t size)
            : data(static_cast<char*>(::operator new(size, std::align_val_t{64}))), size(size) {}
    };
    static Bytes& kept() {
        thread_local Bytes bytes;
        return bytes;
    }
    Bytes own_;
    char* data_;
};

template <typename F>
void any_float_product(const Packed& w, const void* activations, int64_t rows, float* y, int64_t y_stride,
                       int64_t begin, int64_t end) {
    if (w.n_in <= FEW_COLUMNS)
        word_product<F>(w, activations, rows, y, y_stride, begin, end);
    else
        float_product<F>(w, activations, rows, y, y_stride, begin, end);
}

}  // namespace

void pack_activations(Format format, const float* x, int64_t stride, int64_t rows, int64_t n_in, void* out) {
    const int64_t row_bytes = activation_row_bytes(format, n_in);
    const ActivationForm form = activation_form(format);
    for (int64_t r = 0; r < rows; r++) {
        char* to = static_cast<char*>(out) + r * row_bytes;
        if (form == ActivationForm::blocks) {
            pack_blocks(x + r * stride, n_in, reinterpret_cast<ActivationBlock*>(to));
            continue;
        }
        const int64_t used = n_in * (form == ActivationForm::float32 ? 4 : 2);
        std::memset(to + used, 0, row_bytes - used);
        if (form == ActivationForm::float32)
            std::memcpy(to, x + r * stride, used);
        else
            pack_bfloat16(x + r * stride, n_in, reinterpret_cast<uint16_t*>(to));
    }
}

void product(const Packed& w, const void* activations, int64_t rows, float* y, int64_t y_stride, int64_t begin,
             int64_t end) {
    switch (w.type()) {
        case Format::float32: return any_float_product<Float32>(w, activations, rows, y, y_stride, begin, end);
        case Format::bfloat16: return any_float_product<BFloat16>(w, activations, rows, y, y_stride, begin, end);
        case Format::float16: return any_float_product<Float16>(w, activations, rows, y, y_stride, begin, end);
        case Format::q8_0: return block_product<Format::q8_0>(w, activations, rows, y, y_stride, begin, end);
        case Format::q4_0: return block_product<Format::q4_0>(w, activations, rows, y, y_stride, begin, end);
        case Format::q4_k: return block_product<Format::q4_k>(w, activations, rows, y, y_stride, begin, end);
        case Format::q5_k: return block_product<Format::q5_k>(w, activations, rows, y, y_stride, begin, end);
        case Format::q6_k: return block_product<Format::q6_k>(w, activations, rows, y, y_stride, begin, end);
    }
}

namespace {

// Outputs [begin, end) of `rows` rows from `first` on, from their packed activations.
void some_outputs(const PackedLinearArgs& a, const void* activations, int64_t first, int64_t rows, int64_t begin,
                  int64_t end) {
    const Packed& w = a.weight;
    float* const y = a.y + first * w.n_out;
    product(w, activations, rows, y, w.n_out, begin, end);
    if (a.bias)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t o = begin; o < end; o++) y[r * w.n_out + o] += a.bias[o];
}

// Each task packs a block of rows, which stays in the second-level cache, and multiplies it by the whole matrix.
void by_rows(const PackedLinearArgs& a, int64_t block) {
    const int64_t row_bytes = activation_row_bytes(a.weight.type(), a.weight.n_in);
    parallel_for((a.rows + block - 1) / block, a.n_threads, [&](int64_t i) {
        const int64_t first = i * block, n = std::min(block, a.rows - first);
        const Activations activations(n * row_bytes);
        pack_activations(a.weight.type(), a.x + first * a.x_stride, a.x_stride, n, a.weight.n_in, activations.get());
        some_outputs(a, activations.get(), first, n, 0, a.weight.n_out);
    });
}

// All rows are packed; then each task reads some of the weights, once, and multiplies all rows by them.
void by_outputs(const PackedLinearArgs& a) {
    constexpr int64_t SOME_ROWS = 16, MOST_BYTES = 1 << 17;
    const Packed& w = a.weight;
    const int64_t row_bytes = activation_row_bytes(w.type(), w.n_in);
    const Activations activations(a.rows * row_bytes);
    parallel_for((a.rows + SOME_ROWS - 1) / SOME_ROWS, a.n_threads, [&](int64_t i) {
        const int64_t begin = i * SOME_ROWS, n = std::min(SOME_ROWS, a.rows - begin);
        char* to = activations.get() + begin * row_bytes;
        pack_activations(w.type(), a.x + begin * a.x_stride, a.x_stride, n, w.n_in, to);
    });
    int64_t span = std::min(w.n_out / (4 * a.n_threads), MOST_BYTES / w.row_bytes);
    span = std::max<int64_t>(32, (span + 31) / 32 * 32);  // whole pairs of panels
    parallel_for((w.n_out + span - 1) / span, a.n_threads, [&](int64_t i) {
        const int64_t begin = i * span;
        some_outputs(a, activations.get(), 0, a.rows, begin, std::min(w.n_out, begin + span));
    });
}

}  // namespace

void packed_linear(const PackedLinearArgs& a) {
    const Packed& w = a.weight;
    constexpr int64_t FEWEST = 48, MOST = 128;  // rows of a block: fewer would not pay for reading the matrix
    constexpr int64_t CACHED = 1 << 23;         // bytes of a matrix that other levels of the cache hold
    const int64_t rounds = (a.rows + MOST * a.n_threads - 1) / (MOST * a.n_threads), n_blocks = rounds * a.n_threads;
    const bool many = a.rows >= FEWEST * a.n_threads, is_cached = w.n_out * w.row_bytes <= CACHED;
    many && is_cached && w.n_in > FEW_COLUMNS ? by_rows(a, (a.rows + n_blocks - 1) / n_blocks) : by_outputs(a);
}

void read_memory(const void* data, int64_t size, int n_threads) {
    constexpr int64_t SPAN = 1 << 18, VECTORS = 8;
    const auto* bytes = static_cast<const char*>(data);
    parallel_for(size / SPAN, n_threads, [&](int64_t i) {
        vint sums[VECTORS] = {};
        for (const char* p = bytes + i * SPAN; p < bytes + (i + 1) * SPAN; p += VECTORS * sizeof(vint))
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sums[v] |= load_some<vint>(p + v * sizeof(vint), sizeof(vint));
        for (int v = 1; v < VECTORS; v++) sums[0] |= sums[v];
        asm volatile("" : : "m"(sums[0]));  // the sums are used, so the compiler keeps the loads
    });
}

}  // namespace anymamba::ANYMAMBA_ISA
