// The numbers that the general kernels compute with: R is float or double, T is R or a complex number of two.
//
// Needs DOUBLE and COMPLEX, 0 or 1.
#pragma once

#include "device.cuh"

#if DOUBLE
typedef double R;
#else
typedef float R;
#endif

struct ComplexNumber {
    R re, im;
};
#if COMPLEX
typedef ComplexNumber T;
#else
typedef R T;
#endif

// Not the GPU's own exponential: it errs to one side, which showed in dA with constant B and C over 16,384 tokens.
DEVICE R exponential(R x) { return exp(x); }
DEVICE R sigmoid(R x) { return R(1) / (R(1) + exp(-x)); }
DEVICE R softplus(R x) { return x > R(20) ? x : log1p(exp(x > R(0) ? -x : x)) + (x > R(0) ? x : R(0)); }

DEVICE ComplexNumber operator+(ComplexNumber a, ComplexNumber b) { return {a.re + b.re, a.im + b.im}; }
DEVICE ComplexNumber operator*(ComplexNumber a, ComplexNumber b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
DEVICE ComplexNumber operator*(R a, ComplexNumber b) { return {a * b.re, a * b.im}; }
DEVICE ComplexNumber conjugate(ComplexNumber a) { return {a.re, -a.im}; }
DEVICE R conjugate(R a) { return a; }
DEVICE R real_part(ComplexNumber a) { return a.re; }
DEVICE R real_part(R a) { return a; }
DEVICE void split(R* out, R a) { out[0] = a; }
DEVICE void split(R* out, ComplexNumber a) { out[0] = a.re, out[1] = a.im; }
DEVICE R size(R a) { return fabs(a); }
DEVICE R size(ComplexNumber a) { return fabs(a.re) + fabs(a.im); }
#if DOUBLE
CALLED ComplexNumber exponential(ComplexNumber x) {
    R sine, cosine;
    sincos(x.im, &sine, &cosine);
    const R r = exp(x.re);
    return {r * cosine, r * sine};
}
#else
// e^ix of a large x, or one that is not finite.
CALLED ComplexNumber turn_far(R x) {
    R sine, cosine;
    sincosf(x, &sine, &cosine);
    return {cosine, sine};
}
// e^ix. x is brought to [-pi/4, pi/4] by a multiple of pi/2, whose parts below are those of three floats; then sine and
// cosine are polynomials of the least error there, and the multiple says which is which, and their signs.
DEVICE ComplexNumber turn(R x) {
    constexpr R FAR = 3e4f;
    if (!(fabsf(x) < FAR)) return turn_far(x);
    const R quarters = rintf(0.636619772f * x);
    R r = fmaf(quarters, -1.57079625f, x);
    r = fmaf(quarters, -7.54978942e-8f, r);
    r = fmaf(quarters, -5.39030253e-15f, r);
    const R q = r * r;
    R sine = fmaf(fmaf(-1.9515296e-4f, q, 8.3321609e-3f), q, -1.6666655e-1f);
    sine = fmaf(sine * q, r, r);
    R cosine = fmaf(fmaf(2.4433157e-5f, q, -1.3887316e-3f), q, 4.1666646e-2f);
    cosine = fmaf(fmaf(cosine, q, -0.5f), q, 1.f);
    const int of = int(quarters);
    const R re = of & 1 ? sine : cosine, im = of & 1 ? cosine : sine;
    return {(of + 1) & 2 ? -re : re, of & 2 ? -im : im};
}
DEVICE ComplexNumber exponential(ComplexNumber x) {
    const R r = exponential(x.re);
    const ComplexNumber turned = turn(x.im);
    return {r * turned.re, r * turned.im};
}
#endif
DEVICE R quotient(R a, R b) { return a / b; }
DEVICE ComplexNumber quotient(ComplexNumber a, ComplexNumber b) {
    const R n = R(1) / (b.re * b.re + b.im * b.im);
    return n * (a * conjugate(b));
}
DEVICE R plus(R a, R b) { return a + b; }
DEVICE ComplexNumber plus(ComplexNumber a, R b) { return {a.re + b, a.im}; }
DEVICE R number(R x, R) { return x; }
DEVICE ComplexNumber number(R x, ComplexNumber) { return {x, R(0)}; }
DEVICE T number(R x) { return number(x, T()); }

constexpr int TERMS = DOUBLE ? 16 : 9;  // of the series below, for |x| < 1/2

// (e^x - 1) / x and its limit 1 at 0, given e^x: near zero by its power series, sum x^k / (k + 1)!.
CALLED T expm1_ratio(T x, T exponential_of_x) {
    if (size(x) >= R(0.5)) return quotient(plus(exponential_of_x, R(-1)), x);
    T sum = number(R(0));
    for (int k = TERMS; k > 0; k--) sum = R(1) / R(k + 1) * (plus(sum, R(1)) * x);
    return plus(sum, R(1));
}
// Its derivative, (e^x - ratio) / x, and 1/2 at 0: the series is sum x^k (k + 1) / (k + 2)!.
CALLED T expm1_ratio_slope(T x, T exponential_of_x, T ratio) {
    if (size(x) >= R(0.5)) return quotient(exponential_of_x + R(-1) * ratio, x);
    R factorial = R(2);
    T sum = number(R(0.5)), power = number(R(1));
    for (int k = 1; k <= TERMS; k++) {
        power = power * x, factorial *= R(k + 2);
        sum = sum + R(k + 1) / factorial * power;
    }
    return sum;
}

// A number of a tensor; `dtype` is that of its parts where it is complex.
DEVICE T read_number(const void* data, i64 index, int dtype) {
#if COMPLEX
    return {read_as<R>(data, 2 * index, dtype), read_as<R>(data, 2 * index + 1, dtype)};
#else
    return read_as<R>(data, index, dtype);
#endif
}
DEVICE void write_number(void* data, i64 index, int dtype, T value) {
#if COMPLEX
    write_as<R>(data, 2 * index, dtype, value.re), write_as<R>(data, 2 * index + 1, dtype, value.im);
#else
    write_as<R>(data, index, dtype, value);
#endif
}

// Sums over the lanes of a warp of several numbers, in an order of its own: the i-th goes to the lanes from
// i * lanes / count on.
template <int count, int lanes = 32>
DEVICE R sums_of_warp(const R (&values)[count], int lane) {
    if constexpr (count == 1) {
        R sum = values[0];
#pragma unroll
        for (int m = lanes / 2; m > 0; m /= 2) sum += shuffle_xor(sum, m);
        return sum;
    } else {
        constexpr int half = count / 2;
        const bool upper = lane & (lanes / 2);
        R kept[half];
#pragma unroll
        for (int i = 0; i < half; i++) {
            const R given = upper ? values[i] : values[i + half];
            kept[i] = (upper ? values[i + half] : values[i]) + shuffle_xor(given, lanes / 2);
        }
        return sums_of_warp<half, lanes / 2>(kept, lane);
    }
}
