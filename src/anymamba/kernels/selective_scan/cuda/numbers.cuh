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
DEVICE R size(R a) { return fabs(a); }
DEVICE R size(ComplexNumber a) { return fabs(a.re) + fabs(a.im); }
CALLED ComplexNumber exponential(ComplexNumber x) {
    const R r = exp(x.re);
    return {r * cos(x.im), r * sin(x.im)};
}
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

// Over the lanes of a warp, in an order of its own.
DEVICE R sum_of_warp(R x) {
#pragma unroll
    for (int m = 16; m > 0; m /= 2) x += shuffle_xor(x, m);
    return x;
}
DEVICE ComplexNumber sum_of_warp(ComplexNumber x) { return {sum_of_warp(x.re), sum_of_warp(x.im)}; }
