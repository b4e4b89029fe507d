// The cross-entropy of each row of logits, and in place of the logits their gradients.
//
//     loss = log(sum_c e^logits[c]) - logits[label],    gradient[c] = e^logits[c] / sum - (c == label)
//
// The label -100 is not counted: its loss and gradients are 0. A label that no column has gives NaN.
//
// Launch: `losses` takes a block of 512 threads a row, which reads it twice: a row of 50,000 logits in bfloat16 is then
// in the cache. Rows of at most 1,024 logits would leave most of these threads idle: `losses_of_few` takes up to 32
// lanes of a warp a row: a power of two, and at most twice as many as 8 logits each need.
#include "device.cuh"

constexpr int THREADS = 512, WARPS = THREADS / 32, THREADS_OF_FEW = 128, WIDTH = 8;
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
    i64 lanes;  // of a warp that share a row, in losses_of_few: a power of two
};

template <int TYPE>
struct Numbers {
    typedef typename ElementOf<TYPE>::Type Element;
    typedef float R;
    DEVICE static void get(R (&out)[WIDTH], const Element* from) { read<TYPE>(out, from); }
    DEVICE static void put(Element* to, const R (&values)[WIDTH]) { write<TYPE>(to, values); }
    DEVICE static R exponential(R x) { return exp2_fast(x * LOG2_E); }
};
template <>
struct Numbers<FLOAT64> {
    typedef double Element;
    typedef double R;
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

// The total of each group of `lanes` neighbouring lanes. All lanes of the warp take part.
template <int TYPE, typename R>
DEVICE Total<R> total_of_lanes(Total<R> own, int lanes) {
#pragma unroll
    for (int m = lanes / 2; m > 0; m /= 2) {
        const Total<R> other = {shuffle_xor(own.most, m), shuffle_xor(own.sum, m)};
        own = joined<TYPE>(own, other);
    }
    return own;
}

// The threads that share a row: a block.
struct Block {
    static constexpr bool OTHERS = false;  // whether threads of the same warp have other rows
    typedef i64 Column;
    static constexpr int LOADS = 4;  // of a thread at once, except in float64
    static constexpr int count = THREADS;
    DEVICE explicit Block(const Parameters&) {}
    DEVICE i64 row() const { return i64(blockIdx.x); }
    DEVICE int number() const { return int(threadIdx.x); }
    template <int TYPE, typename R>
    DEVICE Total<R> total(Total<R> own) const {
        Total<R>* shared = reinterpret_cast<Total<R>*>(shared_memory());
        own = total_of_lanes<TYPE>(own, 32);
        if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
        sync_block();
        own = shared[0];
        for (int w = 1; w < WARPS; w++) own = joined<TYPE>(own, shared[w]);
        return own;
    }
};
// The threads that share a row of few logits: neighbouring lanes of a warp.
struct Lanes {
    static constexpr bool OTHERS = true;
    typedef int Column;
    static constexpr int LOADS = 1;
    const int count;
    DEVICE explicit Lanes(const Parameters& p) : count(int(p.lanes)) {}
    DEVICE i64 row() const { return (i64(blockIdx.x) * THREADS_OF_FEW + threadIdx.x) >> first_bit(u32(count)); }
    DEVICE int number() const { return int(threadIdx.x) & (count - 1); }
    template <int TYPE, typename R>
    DEVICE Total<R> total(Total<R> own) const {
        return total_of_lanes<TYPE>(own, count);
    }
};

template <int TYPE, typename Threads>
DEVICE Total<typename Numbers<TYPE>::R> total_of_row(const Threads& threads, const typename Numbers<TYPE>::Element* row,
                                                     typename Threads::Column vocab) {
    typedef Numbers<TYPE> N;
    typedef typename N::R R;
    typedef typename Threads::Column Column;
    constexpr int AT_ONCE = TYPE == FLOAT64 ? 1 : Threads::LOADS;
    Total<R> own = {-R(infinity()), R(0)};
    for (Column c0 = threads.number() * WIDTH; c0 < vocab; c0 += threads.count * WIDTH * AT_ONCE) {
        R some[AT_ONCE][WIDTH];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const Column c = c0 + k * threads.count * WIDTH;
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
    return threads.template total<TYPE>(own);
}

template <int TYPE, typename Threads>
DEVICE void row_that_is_not_counted(const Parameters& p, const Threads& threads, i64 index,
                                    typename Numbers<TYPE>::Element* row) {
    typedef typename Numbers<TYPE>::R R;
    typedef typename Threads::Column Column;
    if (threads.number() == 0) reinterpret_cast<R*>(p.losses)[index] = R(0);
    if (!p.gradients) return;
    const R zeros[WIDTH] = {};
#pragma unroll 1
    for (Column c = threads.number() * WIDTH; c < Column(p.vocab); c += threads.count * WIDTH)
        Numbers<TYPE>::put(row + c, zeros);
}

template <int TYPE, typename Threads>
DEVICE void row_of_losses(const Parameters& p) {
    typedef Numbers<TYPE> N;
    typedef typename N::R R;
    typedef typename Threads::Column Column;
    const Threads threads(p);
    const i64 index = threads.row();
    const bool inside = !Threads::OTHERS || index < p.rows;
    const i64 label = inside ? p.labels[index] : IGNORED;
    typename N::Element* row = reinterpret_cast<typename N::Element*>(p.logits) + index * p.stride;
    const bool counted = label != IGNORED, exists = label >= 0 && label < p.vocab;
    const Column vocab = Column(p.vocab), column = exists ? Column(label) : Column(-1);
    // A row that is not counted is not read, but all lanes of a warp take part in its shuffles.
    Total<R> total = {};
    if (counted || Threads::OTHERS) total = total_of_row<TYPE>(threads, row, counted ? vocab : Column(0));
    if (!inside) return;
    if (!counted) return row_that_is_not_counted<TYPE>(p, threads, index, row);
    // The thread that later writes the label's gradient reads its logit before.
    if (threads.number() == (exists ? int(column / WIDTH) & (threads.count - 1) : 0)) {
        const R chosen = exists ? read_as<R>(row, column, TYPE) : R(not_a_number());
        reinterpret_cast<R*>(p.losses)[index] = log(total.sum) + (total.most - chosen);
    }
    if (!p.gradients) return;
    const R scale = R(1) / total.sum;
    for (Column c = threads.number() * WIDTH; c < vocab; c += threads.count * WIDTH) {
        R values[WIDTH];
        N::get(values, row + c);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const R share = N::exponential(values[i] - total.most) * scale - (c + i == column ? R(1) : R(0));
            values[i] = exists ? share : R(not_a_number());
        }
        N::put(row + c, values);
    }
}

KERNEL(THREADS, 2) losses(PARAMETER Parameters p) {
    switch (p.dtype) {
        case FLOAT32: return row_of_losses<FLOAT32, Block>(p);
        case FLOAT64: return row_of_losses<FLOAT64, Block>(p);
        case BFLOAT16: return row_of_losses<BFLOAT16, Block>(p);
        default: return row_of_losses<FLOAT16, Block>(p);
    }
}
KERNEL(THREADS_OF_FEW, 12) losses_of_few(PARAMETER Parameters p) {
    switch (p.dtype) {
        case FLOAT32: return row_of_losses<FLOAT32, Lanes>(p);
        case BFLOAT16: return row_of_losses<BFLOAT16, Lanes>(p);
        default: return row_of_losses<FLOAT16, Lanes>(p);
    }
}
// A kernel of its own: in float64 a thread needs three times the registers, so fewer of them run at a time.
KERNEL(THREADS_OF_FEW, 5) losses_of_few_in_float64(PARAMETER Parameters p) { row_of_losses<FLOAT64, Lanes>(p); }
