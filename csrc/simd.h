// Vectors of T as wide as the instruction set allows, by compiler extensions, and the functions that the kernels need.
//
// Everything is in the namespace of one instruction set (ANYMAMBA_ISA), so that one program can contain several.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "args.h"

#if defined(__AVX512F__)
#define ANYMAMBA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define ANYMAMBA_VECTOR_BYTES 32
#else
#define ANYMAMBA_VECTOR_BYTES 16
#endif

#define ANYMAMBA_INLINE inline __attribute__((always_inline))
// Code that must give the same bits wherever it is called from. The compiler chooses for every copy of an expression
// like a * b + c whether it rounds once or twice.
#if defined(__clang__)
#define ANYMAMBA_ONE_COPY __attribute__((noinline))
#else
#define ANYMAMBA_ONE_COPY __attribute__((noinline, noclone))
#endif

namespace anymamba::ANYMAMBA_ISA {

typedef float vfloat __attribute__((vector_size(ANYMAMBA_VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(ANYMAMBA_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(ANYMAMBA_VECTOR_BYTES)));

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
    using type = vfloat;
};
template <>
struct VectorOf<double> {
    using type = vdouble;
};

template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
constexpr int LANES = ANYMAMBA_VECTOR_BYTES / sizeof(T);

template <typename T>
ANYMAMBA_INLINE Vector<T> load(const T* p) {
    Vector<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <typename T>
ANYMAMBA_INLINE void store(T* p, Vector<T> v) {
    std::memcpy(p, &v, sizeof v);
}

template <typename T>
ANYMAMBA_INLINE Vector<T> broadcast(T value) {
    return value - Vector<T>{};
}

template <typename T, int N>
struct Narrow {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};

// The sum of N adjacent elements, by halving.
template <typename T, int N>
ANYMAMBA_INLINE T sum_of_lanes(const T* p) {
    if constexpr (N == 1) {
        return *p;
    } else {
        typename Narrow<T, N / 2>::type low, high;
        std::memcpy(&low, p, sizeof low);
        std::memcpy(&high, p + N / 2, sizeof high);
        low += high;
        T half[N / 2];
        std::memcpy(half, &low, sizeof low);
        return sum_of_lanes<T, N / 2>(half);
    }
}

// ---------------------------------------------------------------------------------------------- multiply-add, lookup

// a b - c without rounding a b first: if c is close to a b, that rounding error would dominate the result.
ANYMAMBA_INLINE vfloat multiply_subtract(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vfloat)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vfloat)vfmaq_f32(-(float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else  // the exact product in two parts, after Dekker (1971)
    const vfloat a_high = (vfloat)((vint)a & ~0xfff), b_high = (vfloat)((vint)b & ~0xfff);
    const vfloat a_low = a - a_high, b_low = b - b_high, product = a * b;
    const vfloat lost = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low;
    return (product - c) + lost;
#endif
}

// The minimum and the maximum of a bound and x; NaN if x is NaN.
ANYMAMBA_INLINE vfloat at_most(float bound, vfloat x) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(bound), (__m512)x);
#elif defined(__AVX2__)
    return (vfloat)_mm256_min_ps(_mm256_set1_ps(bound), (__m256)x);
#else
    return x > bound ? broadcast(bound) : x;
#endif
}
ANYMAMBA_INLINE vfloat at_least(float bound, vfloat x) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_maskz_max_ps(0xffff, _mm512_set1_ps(bound), (__m512)x);
#elif defined(__AVX2__)
    return (vfloat)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x);
#else
    return x < bound ? broadcast(bound) : x;
#endif
}

// Powers of two are 2^(i / TABLE_SIZE), from a table that fills one register, times a short polynomial.
#if defined(__AVX512F__)
constexpr int TABLE_BITS = 4;
#elif defined(__AVX2__)
constexpr int TABLE_BITS = 3;
#else
constexpr int TABLE_BITS = 0;
#endif
constexpr int TABLE_SIZE = 1 << TABLE_BITS;
constexpr float LARGEST_EXPONENT = 126.0f * TABLE_SIZE;  // below it, powers and their inverses are normal numbers

struct PowerTable {
    alignas(64) int32_t bits[LANES<float>];
    PowerTable() {
        for (int i = 0; i < LANES<float>; i++) {
            const int entry = i % TABLE_SIZE;
            const float power = static_cast<float>(std::exp2(static_cast<double>(entry) / TABLE_SIZE));
            std::memcpy(&bits[i], &power, 4);
            bits[i] -= entry << (23 - TABLE_BITS);  // so that adding n at the exponent gives the whole power
        }
    }
};
inline const PowerTable POWER_TABLE;

// The table in a register, so that a loop loads it once; empty for double.
template <typename T>
struct Powers {};
template <>
struct Powers<float> {
    vint table;
    ANYMAMBA_INLINE Powers() { std::memcpy(&table, POWER_TABLE.bits, sizeof table); }
    // 2^(n / TABLE_SIZE), where n is in the lowest bits of each lane.
    ANYMAMBA_INLINE vfloat of(vint n) const {
#if defined(__AVX512F__)
        const vint entry = (vint)_mm512_maskz_permutexvar_epi32(0xffff, (__m512i)n, (__m512i)table);
#elif defined(__AVX2__)
        const vint entry = (vint)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)n);
#else
        const vint entry = table;
#endif
        return (vfloat)(entry + (n << (23 - TABLE_BITS)));
    }
};

// ---------------------------------------------------------------------------------------------- exp and softplus

// The polynomial q with 2^(f / TABLE_SIZE) = 1 + f q(f) for |f| <= 1/2, highest power first. The last coefficient is
// ln 2 / TABLE_SIZE, correctly rounded; the others are the minimax fit for it. An error of the last coefficient would
// change the rate of slow decays, whose f is near 0, and would add up over a sequence. A larger table with a shorter
// polynomial would lose more precision by rounding its entries. For a table of one entry:
ANYMAMBA_INLINE vfloat whole_power_polynomial(vfloat f) {
    vfloat q = broadcast(0.00015472158f);
    q = q * f + 0.00133912265f;
    q = q * f + 0.00961802155f;
    q = q * f + 0.0555035919f;
    q = q * f + 0.240226507f;
    q = q * f + 0.693147182f;
    return q;
}
#if defined(__AVX512F__)
ANYMAMBA_INLINE vfloat power_polynomial(vfloat f) {
    vfloat q = broadcast(1.35506498e-05f);
    q = q * f + 0.00093841512f;
    q = q * f + 0.0433216989f;
    return q;
}
#elif defined(__AVX2__)
ANYMAMBA_INLINE vfloat power_polynomial(vfloat f) {
    vfloat q = broadcast(2.3483949e-6f);
    q = q * f + 0.000108414104f;
    q = q * f + 0.00375353917f;
    q = q * f + 0.0866433978f;
    return q;
}
#else
ANYMAMBA_INLINE vfloat power_polynomial(vfloat f) { return whole_power_polynomial(f); }
#endif

// The same with one multiply-add less where that saves time: for gates, whose errors do not add up.
ANYMAMBA_INLINE vfloat short_power_polynomial(vfloat f) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (0.000108415683f * f + 0.00375402486f) * f + 0.0866433978f;
#else
    return power_polynomial(f);
#endif
}

// A rate r is stored as TABLE_SIZE r log2(e) in two parts, so that exp(x r) is accurate to one rounding for any x r.
template <typename T>
struct Rate {
    T high, low;
};

ANYMAMBA_INLINE Rate<float> make_rate(float rate) {
    const double exact = static_cast<double>(rate) * (1.4426950408889634 * TABLE_SIZE);
    const float high = static_cast<float>(exact);
    const float low = std::isfinite(high) ? static_cast<float>(exact - high) : 0.0f;
    return {high, low};
}
ANYMAMBA_INLINE Rate<double> make_rate(double rate) { return {rate, 0.0}; }

// exp(x rate) = power 2^(f / TABLE_SIZE).
struct Exponential {
    vfloat power, f;
    ANYMAMBA_INLINE Exponential(vfloat x, vfloat high, vfloat low, const Powers<float>& powers) {
        const vfloat magic = broadcast(12582912.0f);  // 1.5 2^23: adding it leaves a rounded integer in the lowest bits
        const vfloat rounded = x * high + magic;
        f = x * low + multiply_subtract(x, high, rounded - magic);
        power = powers.of((vint)rounded);
    }
};

// exp(x rate) for |x high| < LARGEST_EXPONENT.
ANYMAMBA_INLINE vfloat exp_product_inside(vfloat x, vfloat high, vfloat low, const Powers<float>& powers) {
    const Exponential e(x, high, low, powers);
    return e.power * (e.f * power_polynomial(e.f)) + e.power;
}

// exp(x rate) for any x; outside that range it is computed as the square of its root.
ANYMAMBA_INLINE vfloat exp_product(vfloat x, vfloat high, vfloat low, const Powers<float>& powers) {
    const vfloat exponent = x * high, zero{};
    const vint inside = (exponent < LARGEST_EXPONENT) & (exponent > -LARGEST_EXPONENT);
    const vint near = (exponent < 2 * LARGEST_EXPONENT) & (exponent > -2 * LARGEST_EXPONENT);
    const vfloat argument = inside ? x : near ? 0.5f * x : zero;
    const vfloat power = exp_product_inside(argument, near ? high : zero, near ? low : zero, powers);
    const vfloat beyond = exponent < 0.0f ? zero : exponent * broadcast(3e38f);  // infinity or NaN
    return inside ? power : near ? power * power : beyond;
}

template <typename F>
ANYMAMBA_INLINE vdouble by_lane(vdouble x, F function) {
    vdouble result;
    for (int i = 0; i < LANES<double>; i++) result[i] = function(x[i]);
    return result;
}

ANYMAMBA_INLINE vdouble exp_product(vdouble x, vdouble high, vdouble, const Powers<double>&) {
    return by_lane(x * high, [](double v) { return std::exp(v); });
}
ANYMAMBA_INLINE vdouble exp_product_inside(vdouble x, vdouble high, vdouble low, const Powers<double>& powers) {
    return exp_product(x, high, low, powers);
}

// log2(e) TABLE_SIZE in two parts.
constexpr float RATE_HIGH = 1.44269502f * TABLE_SIZE, RATE_LOW = 1.92596303e-8f * TABLE_SIZE;

// exp(x) for x in [-87, 87]; NaN for NaN.
ANYMAMBA_INLINE vfloat exp_inside(vfloat x) {
    return exp_product_inside(x, broadcast(RATE_HIGH), broadcast(RATE_LOW), Powers<float>());
}

// (exp(x rate) - 1) / (x rate) and its limit 1 at 0, without cancellation.
ANYMAMBA_INLINE vfloat expm1_ratio(vfloat x, vfloat high, vfloat low) {
    const vfloat magic = broadcast(12582912.0f);
    const vfloat power_exponent = x * high * (1.0f / TABLE_SIZE);
    const vfloat bounded = at_least(-126.0f, at_most(127.0f, power_exponent));
    const vfloat n = (bounded + magic) - magic;
    vfloat f = (x * low + multiply_subtract(x, high, n * float(TABLE_SIZE))) * (1.0f / TABLE_SIZE);
    f = bounded == power_exponent ? f : vfloat{};
    const vfloat power = (vfloat)((__builtin_convertvector(n, vint) + 127) << 23);
    const vfloat expm1 = (power - 1.0f) + power * (f * whole_power_polynomial(f));
    const vfloat ratio = expm1 / (power_exponent * 0.693147182f);
    const vfloat finite = power_exponent == 0.0f ? broadcast(1.0f) : ratio;
    return power_exponent <= 127.0f ? finite : power_exponent * broadcast(3e38f);  // infinity or NaN
}
ANYMAMBA_INLINE vdouble expm1_ratio(vdouble x, vdouble high, vdouble) {
    return by_lane(x * high, [](double v) { return v == 0 ? 1.0 : std::expm1(v) / v; });
}

// Derivative of expm1_ratio with respect to v = x rate: (exp(v) - ratio) / v, near 0 by its series.
template <typename T>
ANYMAMBA_INLINE T expm1_ratio_derivative(T v) {
    if (std::fabs(v) < T(0.5)) {
        T term = 1, sum = 0;  // sum of (k + 1) v^k / (k + 2)!
        for (int k = 0; k < 16; k++) {
            term /= T(k + 2);
            sum += T(k + 1) * term;
            term *= v;
        }
        return sum;
    }
    const T e = std::exp(v), ratio = std::expm1(v) / v;
    return (e - ratio) / v;
}

// log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)); the second term is a polynomial in the exponential. 0 at -inf.
ANYMAMBA_INLINE vfloat softplus(vfloat x) {
    const vfloat minus_size = (vfloat)((vint)x | INT32_MIN);
    const vfloat e = minus_size < -87.0f ? vfloat{} : exp_inside(minus_size);
    vfloat p = broadcast(0.00512610214f);  // of log(1 + e) / e for 0 <= e <= 1, near-minimax
    p = p * e + -0.0290740647f;
    p = p * e + 0.0775160867f;
    p = p * e + -0.136022476f;
    p = p * e + 0.190768807f;
    p = p * e + -0.24835399f;
    p = p * e + 0.333181217f;
    p = p * e + -0.49999445f;
    p = p * e + 0.999999966f;
    return e * p + at_least(0.0f, x);
}
ANYMAMBA_INLINE vdouble softplus(vdouble x) {
    return by_lane(x, [](double v) { return v > 20 ? v : std::log1p(std::exp(v)); });
}

// 1 / x for x in [1, 2^126].
ANYMAMBA_INLINE vfloat reciprocal(vfloat x) {
#if defined(__AVX512F__)
    const vfloat guess = (vfloat)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);  // improved by one Newton step
    return guess + guess * (1.0f - x * guess);
#else
    return 1.0f / x;
#endif
}

// 1 / (1 + exp(-x)); 0 below -87.
ANYMAMBA_INLINE vfloat sigmoid(vfloat x) {
    const vfloat result = reciprocal(1.0f + exp_inside(at_least(-87.0f, -x)));
    return x < -87.0f ? vfloat{} : result;
}
ANYMAMBA_INLINE vdouble sigmoid(vdouble x) {
    return by_lane(x, [](double v) { return 1 / (1 + std::exp(-v)); });
}

// x / (1 + exp(-x)), by one division instead of a reciprocal with its corrections. For x <= -88.7228, exp(-x) is
// infinity and the result is 0, except for -inf.
ANYMAMBA_INLINE vfloat silu(vfloat x) {
    const vfloat bounded = at_least(-88.7228394f, at_most(87.0f, x));
    const Exponential e(bounded, broadcast(-RATE_HIGH), broadcast(-RATE_LOW), Powers<float>());
    return x / (e.power * (e.f * short_power_polynomial(e.f) + 1.0f) + 1.0f);
}
ANYMAMBA_INLINE vdouble silu(vdouble x) { return x * sigmoid(x); }

// The largest magnitude of each lane so far; NaN counts as the largest.
ANYMAMBA_INLINE vfloat larger_size(vfloat so_far, vfloat x) {
    const vint size = (vint)x & INT32_MAX, known = (vint)so_far;
    return (vfloat)(size > known ? size : known);
}
ANYMAMBA_INLINE vdouble larger_size(vdouble so_far, vdouble) { return so_far; }  // not needed for double

// ---------------------------------------------------------------------------------------------- rows of any dtype

typedef uint16_t vhalf __attribute__((vector_size(ANYMAMBA_VECTOR_BYTES / 2)));  // bits of 16-bit floats, one per lane
typedef uint32_t vbits __attribute__((vector_size(ANYMAMBA_VECTOR_BYTES)));

// Compilers can express these two conversions, but do not use the single instruction for them.
ANYMAMBA_INLINE vbits widen(vhalf bits) {
#if defined(__AVX512F__)
    return (vbits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits);
#elif defined(__AVX2__)
    return (vbits)_mm256_cvtepu16_epi32((__m128i)bits);
#else
    return __builtin_convertvector(bits, vbits);
#endif
}
ANYMAMBA_INLINE vhalf narrow(vbits bits) {
#if defined(__AVX512F__)
    return (vhalf)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits);
#else
    return __builtin_convertvector(bits, vhalf);
#endif
}

ANYMAMBA_INLINE vfloat from_bfloat16(vhalf bits) { return (vfloat)(widen(bits) << 16); }

ANYMAMBA_INLINE vhalf to_bfloat16(vfloat value) {  // to nearest, ties to even; NaN stays NaN
    const vbits bits = (vbits)value;
    const vbits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return narrow(value == value ? rounded : (bits >> 16) | 0x40);
}

#if defined(__AVX512F__)
ANYMAMBA_INLINE vfloat from_float16(vhalf bits) { return (vfloat)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits); }
ANYMAMBA_INLINE vhalf to_float16(vfloat value) {
    return (vhalf)_mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__) && defined(__AVX2__)
ANYMAMBA_INLINE vfloat from_float16(vhalf bits) { return (vfloat)_mm256_cvtph_ps((__m128i)bits); }
ANYMAMBA_INLINE vhalf to_float16(vfloat value) {
    return (vhalf)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
}
#else
ANYMAMBA_INLINE vfloat from_float16(vhalf bits) {
    const vbits wide = widen(bits), sign = (wide & 0x8000) << 16, magnitude = wide & 0x7fff;
    const vfloat subnormal = __builtin_convertvector((vint)magnitude, vfloat) * 5.9604644775390625e-8f;
    const vbits normal = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : (magnitude << 13) + 0x38000000;
    return (vfloat)(sign | (magnitude < 0x400 ? (vbits)subnormal : normal));
}

ANYMAMBA_INLINE vhalf to_float16(vfloat value) {
    const vbits bits = (vbits)value & 0x7fffffff, sign = ((vbits)value >> 16) & 0x8000;
    const vbits normal = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
    const vbits subnormal = (vbits)((vfloat)bits + 0.5f) - 0x3f000000;  // the addition rounds
    vbits result = bits < 0x38800000 ? subnormal : normal;
    result = bits >= 0x477ff000 ? vbits{} + 0x7c00 : result;  // rounds to infinity
    result = bits > 0x7f800000 ? vbits{} + 0x7e00 : result;   // NaN
    return narrow(sign | result);
}
#endif

template <typename T>
constexpr DType OWN_DTYPE = sizeof(T) == 4 ? DType::float32 : DType::float64;

ANYMAMBA_INLINE int64_t item_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

template <typename V, typename E>
ANYMAMBA_INLINE V load_some(const E* source, int count) {  // followed by zeros
    V v{};
    std::memcpy(&v, source, count * sizeof(E));
    return v;
}

template <typename E, typename V>
ANYMAMBA_INLINE void store_some(E* target, V v, int count) {
    std::memcpy(target, &v, count * sizeof(E));
}

// `count` adjacent elements of a float tensor from `index` on, followed by zeros up to a whole vector.
ANYMAMBA_INLINE vfloat read_floats(const void* data, DType dtype, int64_t index, int count) {
    const bool whole = count == LANES<float>;
    if (dtype == DType::float32) {
        const float* source = static_cast<const float*>(data) + index;
        return whole ? load<float>(source) : load_some<vfloat>(source, count);
    }
    if (dtype == DType::float64) {
        vfloat v{};
        for (int i = 0; i < count; i++) v[i] = static_cast<float>(static_cast<const double*>(data)[index + i]);
        return v;
    }
    const uint16_t* source = static_cast<const uint16_t*>(data) + index;
    const vhalf bits = load_some<vhalf>(source, whole ? LANES<float> : count);
    return dtype == DType::bfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

ANYMAMBA_INLINE void write_floats(void* data, DType dtype, int64_t index, int count, vfloat row) {
    if (dtype == DType::float32) {
        float* target = static_cast<float*>(data) + index;
        count == LANES<float> ? store<float>(target, row) : store_some(target, row, count);
    } else if (dtype == DType::float64) {
        for (int i = 0; i < count; i++) static_cast<double*>(data)[index + i] = row[i];
    } else {
        const vhalf bits = dtype == DType::bfloat16 ? to_bfloat16(row) : to_float16(row);
        uint16_t* target = static_cast<uint16_t*>(data) + index;
        if (count == LANES<float>)
            std::memcpy(target, &bits, sizeof bits);
        else
            store_some(target, bits, count);
    }
}

template <typename T>
ANYMAMBA_INLINE Vector<T> read_row(const void* data, DType dtype, int64_t index, int count) {
    if constexpr (sizeof(T) == 4) {
        return read_floats(data, dtype, index, count);
    } else {
        if (dtype == DType::float64) return load_some<vdouble>(static_cast<const double*>(data) + index, count);
        const vfloat floats = read_floats(data, dtype, index, count);
        vdouble v;
        for (int i = 0; i < LANES<double>; i++) v[i] = floats[i];
        return v;
    }
}

template <typename T>
ANYMAMBA_INLINE void write_row(void* data, DType dtype, int64_t index, int count, Vector<T> row) {
    if constexpr (sizeof(T) == 4) {
        write_floats(data, dtype, index, count, row);
    } else {
        if (dtype == DType::float64) {
            std::memcpy(static_cast<double*>(data) + index, &row, count * sizeof(double));
            return;
        }
        vfloat floats{};
        for (int i = 0; i < count; i++) floats[i] = static_cast<float>(row[i]);
        write_floats(data, dtype, index, count, floats);
    }
}

}  // namespace anymamba::ANYMAMBA_ISA
