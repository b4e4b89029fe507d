// The cross-entropy of each row of logits, and in place of the logits their gradients.
//
//     loss = log(sum_c e^logits[c]) - logits[label],    gradient[c] = e^logits[c] / sum - (c == label)
//
// The label -100 is not counted: its loss and gradients are 0. A label that no column has gives NaN.
//
// Launch: a block of 512 threads a row, which reads it twice: a row of 50,000 logits in bfloat16 is then in the cache.
#include "device.cuh"

constexpr int THREADS = 512, WARPS = THREADS / 32, WIDTH = 8;
constexpr i64 IGNORED = -100;

DEVICE float infinity() { return bits_as_float(0x7f800000u); }
DEVICE float not_a_number() { return bits_as_float(0x7fc00000u); }

// All fields have 8 bytes; the order is that of cuda.TENSORS and cuda.FIELDS.
struct Parameters {
    u8* logits;  // (rows, vocab); the stride is a multiple of WIDTH, the last one is 1
    i64 stride, dtype;
    const i64* labels;
    u8* losses;  // (rows), float64 where the logits are, else float32
    i64 rows, vocab, gradients;
};

template <int TYPE>
struct Numbers {
    typedef typename ElementOf<TYPE>::Type Element;
    typedef float R;
    static constexpr int AT_ONCE = 4;  // loads of a thread
    DEVICE static void get(R (&out)[WIDTH], const Element* from) { read<TYPE>(out, from); }
    DEVICE static void put(Element* to, const R (&values)[WIDTH]) { write<TYPE>(to, values); }
    DEVICE static R exponential(R x) { return exp2_fast(x * LOG2_E); }
};
template <>
struct Numbers<FLOAT64> {
    typedef double Element;
    typedef double R;
    static constexpr int AT_ONCE = 1;
    DEVICE static void get(R (&out)[WIDTH], const Element* from) {
        for (int i = 0; i < WIDTH; i++) out[i] = from[i];
    }
    DEVICE static void put(Element* to, const R (&values)[WIDTH]) {
        for (int i = 0; i < WIDTH; i++) to[i] = values[i];
    }
    DEVICE static R exponential(R x) { return exp(x); }
};

// sum e^(logits - most), so that nothing overflows.
template <typename R>
struct Total {
    R most, sum;
};
template <int TYPE, typename R>
DEVICE Total<R> joined(Total<R> a, Total<R> b) {
    typedef Numbers<TYPE> N;
    const R most = a.most > b.most ? a.most : b.most;
    if (most == -R(infinity())) return {most, a.sum + b.sum};
    return {most, a.sum * N::exponential(a.most - most) + b.sum * N::exponential(b.most - most)};
}

template <int TYPE>
DEVICE Total<typename Numbers<TYPE>::R> total_of_row(const typename Numbers<TYPE>::Element* row, i64 vocab) {
    typedef Numbers<TYPE> N;
    typedef typename N::R R;
    constexpr int AT_ONCE = N::AT_ONCE;
    Total<R> own = {-R(infinity()), R(0)};
    for (i64 c0 = i64(threadIdx.x) * WIDTH; c0 < vocab; c0 += THREADS * WIDTH * AT_ONCE) {
        R some[AT_ONCE][WIDTH];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const i64 c = c0 + k * THREADS * WIDTH;
            if (c < vocab) N::get(some[k], row + c);
#pragma unroll
            for (int i = 0; i < WIDTH; i++) some[k][i] = c + i < vocab ? some[k][i] : -R(infinity());
        }
        R most = own.most;
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
            for (int i = 0; i < WIDTH; i++) most = some[k][i] > most ? some[k][i] : most;
        const R base = most == -R(infinity()) ? R(0) : most;  // nothing but -inf so far
        own.sum *= N::exponential(own.most - base);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
            for (int i = 0; i < WIDTH; i++) own.sum += N::exponential(some[k][i] - base);
        own.most = most;
    }
    Total<R>* shared = reinterpret_cast<Total<R>*>(shared_memory());
#pragma unroll
    for (int m = 16; m > 0; m /= 2) {
        const Total<R> other = {shuffle_xor(own.most, m), shuffle_xor(own.sum, m)};
        own = joined<TYPE>(own, other);
    }
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
    sync_block();
    own = shared[0];
    for (int w = 1; w < WARPS; w++) own = joined<TYPE>(own, shared[w]);
    return own;
}

template <int TYPE>
DEVICE void row_of_losses(const Parameters& p) {
    typedef Numbers<TYPE> N;
    typedef typename N::R R;
    const i64 index = i64(blockIdx.x), label = p.labels[index];
    typename N::Element* row = reinterpret_cast<typename N::Element*>(p.logits) + index * p.stride;
    const bool counted = label != IGNORED, exists = label >= 0 && label < p.vocab;
    const Total<R> total = total_of_row<TYPE>(row, p.vocab);
    const R scale = R(1) / total.sum;
    if (threadIdx.x == 0) {
        const R chosen = exists ? read_as<R>(row, label, TYPE) : R(not_a_number());
        reinterpret_cast<R*>(p.losses)[index] = counted ? log(total.sum) + (total.most - chosen) : R(0);
    }
    if (!p.gradients) return;
    sync_block();  // the label's logit has been read
    for (i64 c = i64(threadIdx.x) * WIDTH; c < p.vocab; c += THREADS * WIDTH) {
        R values[WIDTH];
        N::get(values, row + c);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const R share = N::exponential(values[i] - total.most) * scale - (c + i == label ? R(1) : R(0));
            values[i] = !counted ? R(0) : exists ? share : R(not_a_number());
        }
        N::put(row + c, values);
    }
}

KERNEL(THREADS, 2) losses(PARAMETER Parameters p) {
    switch (p.dtype) {
        case FLOAT32: return row_of_losses<FLOAT32>(p);
        case FLOAT64: return row_of_losses<FLOAT64>(p);
        case BFLOAT16: return row_of_losses<BFLOAT16>(p);
        default: return row_of_losses<FLOAT16>(p);
    }
}
