// The causal convolution with filters as long as the sequence, by FFTs in shared memory.
//
//     y[t] = sum over s <= t of k[t - s] u[s]
//
// An FFT of N >= 2 length complex numbers has two rows of the batch as its real and imaginary parts: filters are real,
// so the spectrum of the pair times that of the filter is that of the pair of results. For the gradient of the filter,
// conj(U) G of two such pairs has the wanted correlations of both rows in the real part of its inverse; what mixes the
// rows is in the imaginary part.
//
// Numbers are read and written once. A spectrum of a filter lies as threads have it: number i of thread t at i THREADS
// + t.
#include "fft.cuh"

struct Rows {  // a tensor (rows, length, width); the last dimension is dense
    u8* data;
    i64 row, token, dtype;
};
// All fields have 8 bytes; the order is that of cuda.TENSORS and cuda.FIELDS.
struct Parameters {
    Rows u, y;
    Rows g;                // the gradient of the outputs
    const float* filters;  // (width, taps)
    Complex* spectra;      // (width, N), divided by N
    float* parts;          // (n_parts, width, taps): sums over some of the pairs of rows
    i64 rows, length, width, taps, pairs_of_part, n_parts;
    i64 adjoint;  // whether the matrix of the convolution is transposed: for the gradient of the inputs
    i64 aligned;  // whether 8 bytes of neighbouring channels can be read at once
};

// Shared memory: the numbers of an FFT, then 8 bytes for each thread and point, THREADS apart.
DEVICE Complex* numbers() { return reinterpret_cast<Complex*>(shared_memory()); }
DEVICE Complex* kept() { return numbers() + N + THREADS + threadIdx.x; }
DEVICE i64 token(int slot) { return i64(threadIdx.x) + i64(slot) * THREADS; }

// One channel of two rows, whose elements are of TYPE; the second half of the numbers are zeros, so that nothing wraps
// around.
template <int TYPE>
DEVICE void read_pair_of(Complex (&z)[POINTS], const Rows& t, i64 row, i64 channel, const Parameters& p) {
    const i64 first = row * t.row + token(0) * t.token + channel, step = THREADS * t.token;
    const bool two = row + 1 < p.rows;
#pragma unroll
    for (int i = 0; i < POINTS / 2; i++) {
        const bool inside = token(i) < p.length;
        z[i].re = inside ? read_as<float>(t.data, first + i * step, TYPE) : 0.f;
        z[i].im = inside && two ? read_as<float>(t.data, first + i * step + t.row, TYPE) : 0.f;
    }
#pragma unroll
    for (int i = POINTS / 2; i < POINTS; i++) z[i] = {0.f, 0.f};
}
template <int TYPE>
DEVICE void write_pair_of(const Complex (&z)[POINTS], const Rows& t, i64 row, i64 channel, const Parameters& p) {
    const i64 first = row * t.row + token(0) * t.token + channel, step = THREADS * t.token;
    const bool two = row + 1 < p.rows;
#pragma unroll
    for (int i = 0; i < POINTS / 2; i++) {
        if (token(i) >= p.length) continue;
        write_as(t.data, first + i * step, TYPE, z[i].re);
        if (two) write_as(t.data, first + i * step + t.row, TYPE, z[i].im);
    }
}
DEVICE void read_pair(Complex (&z)[POINTS], const Rows& t, i64 row, i64 channel, const Parameters& p) {
    if (t.dtype == FLOAT32) return read_pair_of<FLOAT32>(z, t, row, channel, p);
    if (t.dtype == BFLOAT16) return read_pair_of<BFLOAT16>(z, t, row, channel, p);
    read_pair_of<FLOAT16>(z, t, row, channel, p);
}
DEVICE void write_pair(const Complex (&z)[POINTS], const Rows& t, i64 row, i64 channel, const Parameters& p) {
    if (t.dtype == FLOAT32) return write_pair_of<FLOAT32>(z, t, row, channel, p);
    if (t.dtype == BFLOAT16) return write_pair_of<BFLOAT16>(z, t, row, channel, p);
    write_pair_of<FLOAT16>(z, t, row, channel, p);
}

KERNEL(THREADS, 1) spectra(PARAMETER Parameters p) {
    const i64 channel = blockIdx.x;
    Complex z[POINTS];
#pragma unroll
    for (int i = 0; i < POINTS; i++)
        z[i] = {token(i) < p.taps ? p.filters[channel * p.taps + token(i)] / float(N) : 0.f, 0.f};
    forward_fft(z, numbers());
    Complex* to = p.spectra + channel * N;
#pragma unroll
    for (int i = 0; i < POINTS; i++)
        write_8_bytes(to + token(i), make_uint2(float_as_bits(z[i].re), float_as_bits(z[i].im)));
}

// From the spectrum of two rows to their convolution with the channel's filter.
DEVICE void filter(Complex (&z)[POINTS], i64 channel, const Parameters& p) {
    const Complex* spectrum = p.spectra + channel * N;
#pragma unroll
    for (int i = 0; i < POINTS; i++) {
        const Complex k = spectrum[token(i)];
        z[i] = z[i] * (p.adjoint ? conjugate(k) : k);
    }
    inverse_fft(z, numbers());
}
DEVICE void convolve_in_place(Complex (&z)[POINTS], i64 channel, const Parameters& p) {
    forward_fft(z, numbers());
    filter(z, channel, p);
}

// ------------------------------------------------------------------------------------------------ channels in groups
// Two rows of neighbouring channels lie in shared memory as in the tensor, 8 bytes a row and token. The results of a
// channel take the place of its inputs. A thread reads only what it has copied itself.

constexpr int HALF = POINTS / 2;

template <int TYPE>
struct Group {
    static constexpr int CHANNELS = TYPE == FLOAT32 ? 2 : 4, BYTES = 8 / CHANNELS;

    DEVICE static uint2* at(int row, int i) { return reinterpret_cast<uint2*>(kept()) + (row * HALF + i) * THREADS; }
    DEVICE static float get(int row, int i, int c) { return read_as<float>(at(row, i), c, TYPE); }
    DEVICE static void put(int row, int i, int c, float x) { write_as(at(row, i), c, TYPE, x); }
    DEVICE static uint2* in(const Rows& t, i64 row, i64 token, i64 channel) {
        return reinterpret_cast<uint2*>(t.data + (row * t.row + token * t.token + channel) * BYTES);
    }
};

template <int TYPE>
DEVICE void convolve_group(const Parameters& p, i64 row, i64 first) {
    typedef Group<TYPE> G;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            if (token(i) < p.length && row + r < p.rows) {
                copy_8_bytes(G::at(r, i), G::in(p.u, row + r, token(i), first));
            } else {
                *G::at(r, i) = make_uint2(0u, 0u);
            }
        }
    end_of_copies();
    wait_for_copies<0>();
#pragma unroll 1
    for (int c = 0; c < G::CHANNELS; c++) {
        Complex z[POINTS];
#pragma unroll
        for (int i = 0; i < HALF; i++) z[i] = {G::get(0, i, c), G::get(1, i, c)}, z[i + HALF] = {0.f, 0.f};
        convolve_in_place(z, first + c, p);
#pragma unroll
        for (int i = 0; i < HALF; i++) G::put(0, i, c, z[i].re), G::put(1, i, c, z[i].im);
    }
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int i = 0; i < HALF; i++)
            if (token(i) < p.length && row + r < p.rows) *G::in(p.y, row + r, token(i), first) = *G::at(r, i);
}

DEVICE void convolve_one(const Parameters& p, i64 row, i64 channel) {
    Complex z[POINTS];
    read_pair(z, p.u, row, channel, p);
    convolve_in_place(z, channel, p);
    write_pair(z, p.y, row, channel, p);
}

// A block has a group of channels of two rows, or one channel of them. Blocks of neighbouring channels are neighbours.
KERNEL(THREADS, BLOCKS) convolve(PARAMETER Parameters p) {
    const i64 channels = p.aligned ? (p.u.dtype == FLOAT32 ? 2 : 4) : 1, groups = p.width / channels;
    const i64 row = i64(blockIdx.x) / groups * 2, first = i64(blockIdx.x) % groups * channels;
    if (!p.aligned) return convolve_one(p, row, first);
    if (p.u.dtype == FLOAT32) return convolve_group<FLOAT32>(p, row, first);
    if (p.u.dtype == BFLOAT16) return convolve_group<BFLOAT16>(p, row, first);
    convolve_group<FLOAT16>(p, row, first);
}

// The gradient of a channel's filter from some pairs of rows and, if y is there, that of their inputs, for which the
// spectrum of g is at hand.
KERNEL(THREADS, BLOCKS) correlate(PARAMETER Parameters p) {
    const i64 channel = i64(blockIdx.x) % p.width, part = i64(blockIdx.x) / p.width;
    Complex* sums = kept();
#pragma unroll
    for (int i = 0; i < POINTS; i++) sums[i * THREADS] = {0.f, 0.f};
#pragma unroll 1
    for (i64 k = 0; k < p.pairs_of_part; k++) {
        const i64 row = 2 * (part * p.pairs_of_part + k);
        if (row >= p.rows) break;
        Complex u[POINTS], g[POINTS];
        read_pair(u, p.u, row, channel, p);
        forward_fft(u, numbers());
        sync_block();
        read_pair(g, p.g, row, channel, p);
        forward_fft(g, numbers());
#pragma unroll
        for (int i = 0; i < POINTS; i++) sums[i * THREADS] = sums[i * THREADS] + conjugate(u[i]) * g[i];
        if (p.y.data) {
            filter(g, channel, p);
            write_pair(g, p.y, row, channel, p);
        }
        sync_block();
    }
    Complex z[POINTS];
#pragma unroll
    for (int i = 0; i < POINTS; i++) z[i] = sums[i * THREADS];
    inverse_fft(z, numbers());
    float* to = p.parts + (part * p.width + channel) * p.taps;
#pragma unroll
    for (int i = 0; i < POINTS; i++)
        if (token(i) < p.taps) to[token(i)] = z[i].re / float(N);
}
