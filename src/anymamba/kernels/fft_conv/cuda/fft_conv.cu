// The causal convolution with filters as long as the sequence, by FFTs in shared memory.
//
//     y[t] = sum over s <= t of k[t - s] u[s]
//
// An FFT of N >= 2 length complex numbers has two rows of the batch as its real and imaginary parts: filters are real, so
// the spectrum of the pair times that of the filter is that of the pair of results. For the gradient of the filter,
// conj(U) G of two such pairs has the wanted correlations of both rows in the real part of its inverse; what mixes the
// rows is in the imaginary part.
//
// Numbers are read and written once. A spectrum of a filter lies as threads have it: number i of thread t at i THREADS + t.
#include "fft.cuh"

struct Rows {  // a tensor (rows, length, width); the last dimension is dense
    u8* data;
    i64 row, token, dtype;
};
// All fields have 8 bytes; the order is that of cuda.TENSORS and cuda.FIELDS.
struct Parameters {
    Rows u, y;
    Rows g;            // the gradient of the outputs
    const float* filters;  // (width, taps)
    Complex* spectra;      // (width, N), divided by N
    float* parts;          // (n_parts, width, taps): sums over some of the pairs of rows
    i64 rows, length, width, taps, pairs_of_part, n_parts;
    i64 adjoint;  // whether the matrix of the convolution is transposed: for the gradient of the inputs
    i64 aligned;  // whether 8 bytes of neighbouring channels can be read at once
};

DEVICE Complex* numbers() { return reinterpret_cast<Complex*>(shared_memory()); }
DEVICE i64 token(int slot) { return i64(threadIdx.x) + i64(slot) * THREADS; }

// A row's number, or 0 beyond its end.
DEVICE float number_at(const Rows& t, i64 row, i64 at, i64 channel, const Parameters& p) {
    const bool inside = at < p.length && row < p.rows;
    return inside ? read_as<float>(t.data, row * t.row + at * t.token + channel, int(t.dtype)) : 0.f;
}

// One channel of two rows; the second half of the numbers are zeros, so that nothing wraps around.
DEVICE void read_pair(Complex (&z)[POINTS], const Rows& t, i64 row, i64 channel, const Parameters& p) {
#pragma unroll
    for (int i = 0; i < POINTS / 2; i++)
        z[i] = {number_at(t, row, token(i), channel, p), number_at(t, row + 1, token(i), channel, p)};
#pragma unroll
    for (int i = POINTS / 2; i < POINTS; i++) z[i] = {0.f, 0.f};
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
    for (int i = 0; i < POINTS; i++) to[token(i)] = z[i];
}

DEVICE void convolve_in_place(Complex (&z)[POINTS], i64 channel, const Parameters& p) {
    const Complex* spectrum = p.spectra + channel * N;
    forward_fft(z, numbers());
#pragma unroll
    for (int i = 0; i < POINTS; i++) {
        const Complex k = spectrum[token(i)];
        z[i] = z[i] * (p.adjoint ? conjugate(k) : k);
    }
    inverse_fft(z, numbers());
}

// ------------------------------------------------------------------------------------------------ channels in groups
// Two rows of neighbouring channels stay in registers as they lie in memory, 8 bytes a row and token. The results
// of a channel take the place of its inputs.

constexpr int HALF = POINTS / 2;

template <int TYPE>
struct Group {
    static constexpr int CHANNELS = TYPE == FLOAT32 ? 2 : 4;
    u32 words[2][HALF][2];  // of rows and tokens

    DEVICE float get(int row, int i, int c) const {
        if constexpr (TYPE == FLOAT32) return bits_as_float(c ? words[row][i][1] : words[row][i][0]);
        const u32 word = c / 2 ? words[row][i][1] : words[row][i][0];
        const u32 bits = c % 2 ? word >> 16 : word & 0xffffu;
        return TYPE == BFLOAT16 ? bits_as_float(bits << 16) : half_as_float(u16(bits));
    }
    DEVICE void put(int row, int i, int c, float x) {
        u32& first = words[row][i][0];
        u32& second = words[row][i][1];
        if constexpr (TYPE == FLOAT32) {
            first = c ? first : float_as_bits(x), second = c ? float_as_bits(x) : second;
        } else {
            const u32 bits = as_word<TYPE>(x, 0.f) & 0xffffu;
            const u32 old = c / 2 ? second : first;
            const u32 now = c % 2 ? (old & 0xffffu) | bits << 16 : (old & 0xffff0000u) | bits;
            first = c / 2 ? first : now, second = c / 2 ? now : second;
        }
    }
};

template <int TYPE>
DEVICE uint2* words_at(const Rows& t, i64 row, i64 at, i64 channel) {
    constexpr i64 BYTES = TYPE == FLOAT32 ? 4 : 2;
    return reinterpret_cast<uint2*>(t.data + (row * t.row + at * t.token + channel) * BYTES);
}

template <int TYPE>
DEVICE void convolve_group(const Parameters& p, i64 row, i64 first) {
    typedef Group<TYPE> G;
    G group;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            const bool inside = token(i) < p.length && row + r < p.rows;
            const uint2 v = inside ? *words_at<TYPE>(p.u, row + r, token(i), first) : make_uint2(0u, 0u);
            group.words[r][i][0] = v.x, group.words[r][i][1] = v.y;
        }
#pragma unroll 1
    for (int c = 0; c < G::CHANNELS; c++) {
        Complex z[POINTS];
#pragma unroll
        for (int i = 0; i < HALF; i++) z[i] = {group.get(0, i, c), group.get(1, i, c)}, z[i + HALF] = {0.f, 0.f};
        convolve_in_place(z, first + c, p);
#pragma unroll
        for (int i = 0; i < HALF; i++) group.put(0, i, c, z[i].re), group.put(1, i, c, z[i].im);
    }
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int i = 0; i < HALF; i++)
            if (token(i) < p.length && row + r < p.rows)
                *words_at<TYPE>(p.y, row + r, token(i), first) = make_uint2(group.words[r][i][0], group.words[r][i][1]);
}

DEVICE void convolve_one(const Parameters& p, i64 row, i64 channel) {
    Complex z[POINTS];
    read_pair(z, p.u, row, channel, p);
    convolve_in_place(z, channel, p);
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        if (token(i) >= p.length) continue;
        const i64 at = row * p.y.row + token(i) * p.y.token + channel;
        write_as(p.y.data, at, int(p.y.dtype), z[i].re);
        if (row + 1 < p.rows) write_as(p.y.data, at + p.y.row, int(p.y.dtype), z[i].im);
    }
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

// The gradient of a channel's filter from some pairs of rows.
KERNEL(THREADS, BLOCKS) correlate(PARAMETER Parameters p) {
    const i64 channel = i64(blockIdx.x) % p.width, part = i64(blockIdx.x) / p.width;
    Complex sums[POINTS];
#pragma unroll
    for (int i = 0; i < POINTS; i++) sums[i] = {0.f, 0.f};
    for (i64 k = 0; k < p.pairs_of_part; k++) {
        const i64 row = 2 * (part * p.pairs_of_part + k);
        if (row >= p.rows) break;
        Complex u[POINTS], g[POINTS];
        read_pair(u, p.u, row, channel, p);
        forward_fft(u, numbers());
        sync_block();
        read_pair(g, p.g, row, channel, p);
        forward_fft(g, numbers());
        sync_block();
#pragma unroll
        for (int i = 0; i < POINTS; i++) sums[i] = sums[i] + conjugate(u[i]) * g[i];
    }
    inverse_fft(sums, numbers());
    float* to = p.parts + (part * p.width + channel) * p.taps;
#pragma unroll
    for (int i = 0; i < POINTS; i++)
        if (token(i) < p.taps) to[token(i)] = sums[i].re / float(N);
}
