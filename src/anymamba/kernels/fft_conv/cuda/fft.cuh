// A complex FFT of N numbers by one block, 16 numbers a thread, in shared memory.
//
// Forward: decimation in frequency. Each pass splits blocks of n numbers into R of n / R: number j + q n / R of a
// block, q = 0 .. R - 1, becomes the number j of block r by a DFT over q, times e^(-2 pi i j r / n). The result lies in
// the order of reversed digits. Backward undoes the passes in the other order, without the factor 1 / N. So a thread
// reads and writes the same places in a pass, and one synchronisation a pass is enough. Products of two spectra need no
// order.
#pragma once

#include "device.cuh"

constexpr int POINTS = 16, N = 1 << LOG_N, THREADS = N / POINTS;
constexpr int BLOCKS = 512 / THREADS;  // of a multiprocessor: what registers are limited for

struct Complex {
    float re, im;
};
DEVICE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
DEVICE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
DEVICE Complex operator*(Complex a, Complex b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
DEVICE Complex conjugate(Complex a) { return {a.re, -a.im}; }
DEVICE Complex swapped(Complex a) { return {a.im, a.re}; }

// ------------------------------------------------------------------------------------------------ in registers

DEVICE void dft2(Complex& a, Complex& b) {
    const Complex sum = a + b;
    b = a - b;
    a = sum;
}
DEVICE void dft4(Complex& a, Complex& b, Complex& c, Complex& d) {
    const Complex p = a + c, m = a - c, s = b + d, t = b - d, turned = {t.im, -t.re};
    a = p + s, b = m + turned, c = p - s, d = m - turned;
}

constexpr float COS_1 = 0.923879532511286756f, SIN_1 = 0.382683432365089772f, ROOT = 0.707106781186547524f;

// a e^(-2 pi i k / 16), for k known to the compiler.
DEVICE Complex turned(Complex a, int k) {
    switch (k) {
        case 0: return a;
        case 1: return a * Complex{COS_1, -SIN_1};
        case 2: return a * Complex{ROOT, -ROOT};
        case 3: return a * Complex{SIN_1, -COS_1};
        case 4: return {a.im, -a.re};
        case 6: return a * Complex{-ROOT, -ROOT};
        default: return a * Complex{-COS_1, SIN_1};  // 9
    }
}

// In place, R of the numbers from z on; in and out in their natural order.
template <int R>
DEVICE void dft(Complex* z) {
    if constexpr (R == 2) dft2(z[0], z[1]);
    if constexpr (R == 4) dft4(z[0], z[1], z[2], z[3]);
    if constexpr (R == 8) {
        Complex out[8];
#pragma unroll
        for (int i = 0; i < 2; i++) dft4(z[i], z[i + 2], z[i + 4], z[i + 6]);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            Complex a = z[2 * k], b = turned(z[2 * k + 1], 2 * k);
            dft2(a, b);
            out[k] = a, out[k + 4] = b;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) z[i] = out[i];
    }
    if constexpr (R == 16) {
        Complex out[16];
#pragma unroll
        for (int i = 0; i < 4; i++) dft4(z[i], z[i + 4], z[i + 8], z[i + 12]);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            Complex a = z[4 * k], b = turned(z[4 * k + 1], k), c = turned(z[4 * k + 2], 2 * k),
                    d = turned(z[4 * k + 3], 3 * k);
            dft4(a, b, c, d);
            out[k] = a, out[k + 4] = b, out[k + 8] = c, out[k + 12] = d;
        }
#pragma unroll
        for (int i = 0; i < 16; i++) z[i] = out[i];
    }
}
template <int R>
DEVICE void inverse_dft(Complex* z) {
#pragma unroll
    for (int i = 0; i < R; i++) z[i] = swapped(z[i]);
    dft<R>(z);
#pragma unroll
    for (int i = 0; i < R; i++) z[i] = swapped(z[i]);
}

// Of pi times x, to two units in the last place.
DEVICE void sine_and_cosine_of_pi(float x, float& sine, float& cosine) {
#ifdef ANYMAMBA_EMULATED
    sine = float(__builtin_sin(x * 3.14159265358979323846)), cosine = float(__builtin_cos(x * 3.14159265358979323846));
#else
    sincospif(x, &sine, &cosine);
#endif
}

// z[r] *= w^r for w = e^(-2 pi i j / n), or its conjugate: one factor for each bit of r, so that few are alive at a
// time.
template <int R, bool CONJUGATE>
DEVICE void turn_all(Complex* z, int j, int n) {
    Complex w;
    sine_and_cosine_of_pi((CONJUGATE ? 2.f : -2.f) * float(j) / float(n), w.im, w.re);
#pragma unroll
    for (int bit = 1; bit < R; bit *= 2, w = w * w)
#pragma unroll
        for (int r = bit; r < R; r++)
            if (r & bit) z[r] = z[r] * w;
}

// ------------------------------------------------------------------------------------------------ passes

template <int SIZE>  // of the blocks that a pass splits
constexpr int RADIX = SIZE >= 16 ? 16 : SIZE;

// The place in shared memory: threads that are 16 numbers apart use different banks.
DEVICE int place(int i) { return i + i / 16; }

// The number that slot i (0 .. POINTS - 1) of a thread has in the pass that splits blocks of SIZE.
template <int SIZE>
DEVICE int number(int slot) {
    constexpr int R = RADIX<SIZE>, STRIDE = SIZE / R;
    const int butterfly = int(threadIdx.x) + slot / R * THREADS;
    return butterfly / STRIDE * SIZE + butterfly % STRIDE + slot % R * STRIDE;
}
template <int SIZE>
DEVICE void load(Complex (&z)[POINTS], const Complex* shared) {
#pragma unroll
    for (int i = 0; i < POINTS; i++) z[i] = shared[place(number<SIZE>(i))];
}
template <int SIZE>
DEVICE void store(Complex* shared, const Complex (&z)[POINTS]) {
#pragma unroll
    for (int i = 0; i < POINTS; i++) shared[place(number<SIZE>(i))] = z[i];
}

template <int SIZE>
DEVICE void pass(Complex (&z)[POINTS]) {
    constexpr int R = RADIX<SIZE>, STRIDE = SIZE / R;
#pragma unroll
    for (int i = 0; i < POINTS; i += R) {
        dft<R>(z + i);
        if constexpr (STRIDE > 1) turn_all<R, false>(z + i, (int(threadIdx.x) + i / R * THREADS) % STRIDE, SIZE);
    }
}
template <int SIZE>
DEVICE void inverse_pass(Complex (&z)[POINTS]) {
    constexpr int R = RADIX<SIZE>, STRIDE = SIZE / R;
#pragma unroll
    for (int i = 0; i < POINTS; i += R) {
        if constexpr (STRIDE > 1) turn_all<R, true>(z + i, (int(threadIdx.x) + i / R * THREADS) % STRIDE, SIZE);
        inverse_dft<R>(z + i);
    }
}

// The rest of the passes after that of blocks of SIZE * 16; all but the first exchange numbers by shared memory.
template <int SIZE>
DEVICE void forward_from(Complex (&z)[POINTS], Complex* shared) {
    pass<SIZE>(z);
    if constexpr (SIZE > 16) {
        store<SIZE>(shared, z);
        sync_block();
        load<SIZE / 16>(z, shared);
        forward_from<SIZE / 16>(z, shared);
    }
}
template <int SIZE>
DEVICE void backward_to(Complex (&z)[POINTS], Complex* shared) {
    if constexpr (SIZE > 16) {
        backward_to<SIZE / 16>(z, shared);
        store<SIZE / 16>(shared, z);
        sync_block();
        load<SIZE>(z, shared);
    }
    inverse_pass<SIZE>(z);
}

// From the numbers threadIdx.x + i THREADS of a sequence to 16 numbers of its spectrum, in an order of their own. A
// thread may start with the next sequence after the inverse of this one: it has read what it will write.
DEVICE void forward_fft(Complex (&z)[POINTS], Complex* shared) { forward_from<N>(z, shared); }
// Back again, times N.
DEVICE void inverse_fft(Complex (&z)[POINTS], Complex* shared) { backward_to<N>(z, shared); }
