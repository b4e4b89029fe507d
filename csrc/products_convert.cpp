// Weights from floats to a format and back, for one instruction set.
//
// Q8_0 and Q4_0 give the bits of GGUF's own quantisers, so this file is compiled without contraction to multiply-adds.
// The K-quants try about twenty roundings for each group of columns that has its own scale. For each rounding, the
// scale (and the minimum) are fitted by least squares; those with the least error are taken.

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "products_decode.h"
#include "threads.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

constexpr float MAGIC = 12582912.0f;  // adding and subtracting 1.5 2^23 rounds to a whole number
constexpr int L = LANES<float>;

// Whole numbers in [low, high] nearest to v.
ANYMAMBA_INLINE vfloat rounded(vfloat v, float low, float high) {
    return at_least(low, at_most(high, (v + MAGIC) - MAGIC));
}
ANYMAMBA_INLINE int rounded(float v, int low, int high) {
    return int(std::nearbyint(std::clamp(v, float(low), float(high))));
}

ANYMAMBA_INLINE double total(vfloat v) {
    float lanes[L];
    store(lanes, v);
    return sum_of_lanes<float, L>(lanes);
}

float inverse_or_zero(float d) {
    const float inverse = 1 / d;
    return std::isfinite(inverse) ? inverse : 0;
}

void encode_q8_0(const float* x, uint8_t* p) {
    float largest = 0;
    for (int i = 0; i < 32; i++) largest = std::max(largest, std::fabs(x[i]));
    const float scale = largest / 127, inverse = inverse_or_zero(scale);
    write_half(p, scale);
    for (int i = 0; i < 32; i++) {  // halves are rounded away from zero
        const float value = x[i] * inverse, size = std::fabs(value);
        const int whole = int(size), q = whole + (size - float(whole) >= 0.5f);
        p[2 + i] = uint8_t(int8_t(value < 0 ? -q : q));
    }
}

void encode_q4_0(const float* x, uint8_t* p) {
    float furthest = 0;
    for (int i = 0; i < 32; i++)
        if (std::fabs(x[i]) > std::fabs(furthest)) furthest = x[i];
    const float scale = furthest / -8, inverse = inverse_or_zero(scale);
    write_half(p, scale);
    const auto q = [&](float v) { return std::min(15, int(v * inverse + 8.5f)); };
    for (int i = 0; i < 16; i++) p[2 + i] = uint8_t(q(x[i]) | q(x[16 + i]) << 4);
}

// x is about scale q - minimum, with q from 0 to 15.
struct Line {
    float scale, minimum;
};

Line fit_line(const float* x) {
    constexpr int V = 32 / L;
    float low = 0, high = x[0];
    vfloat v[V], sum{}, squares{};
    for (int i = 0; i < 32; i++) low = std::min(low, x[i]), high = std::max(high, x[i]);
    for (int i = 0; i < V; i++) v[i] = load<float>(x + L * i), sum += v[i], squares += v[i] * v[i];
    if (!(high > low)) return {0, -low};
    const double x1 = total(sum), x2 = total(squares);
    Line best{(high - low) / 15, -low};
    double least = INFINITY;
    for (int t = -10; t <= 12; t++) {
        const float inverse = (15 + 0.1f * float(t)) / (high - low);
        vfloat q1v{}, q2v{}, xqv{};
        for (int i = 0; i < V; i++) {
            const vfloat q = rounded((v[i] - low) * inverse, 0, 15);
            q1v += q, q2v += q * q, xqv += q * v[i];
        }
        const double q1 = total(q1v), q2 = total(q2v), xq = total(xqv), divisor = 32 * q2 - q1 * q1;
        if (divisor <= 0) continue;
        double scale = (32 * xq - x1 * q1) / divisor, offset = (q2 * x1 - q1 * xq) / divisor;
        if (offset > 0) offset = 0, scale = xq / q2;
        const double error = scale * (scale * q2 + 2 * offset * q1 - 2 * xq) + offset * (32 * offset - 2 * x1) + x2;
        if (scale > 0 && error < least) least = error, best = {float(scale), float(-offset)};
    }
    return best;
}

void encode_q4_k(const float* x, uint8_t* p) {
    Line lines[8];
    float largest_scale = 0, largest_minimum = 0;
    for (int b = 0; b < 8; b++) {
        lines[b] = fit_line(x + 32 * b);
        largest_scale = std::max(largest_scale, lines[b].scale);
        largest_minimum = std::max(largest_minimum, lines[b].minimum);
    }
    write_half(p, largest_scale / 63), write_half(p + 2, largest_minimum / 63);
    const float scale = read_half(p), minimum = read_half(p + 2);
    int scales[8], minima[8];
    for (int b = 0; b < 8; b++) {
        scales[b] = rounded(lines[b].scale * inverse_or_zero(scale), 0, 63);
        minima[b] = rounded(lines[b].minimum * inverse_or_zero(minimum), 0, 63);
    }
    write_scales(scales, minima, p + 4);
    std::memset(p + 16, 0, 128);
    for (int b = 0; b < 8; b++) {
        const float inverse = inverse_or_zero(scale * float(scales[b])), m = minimum * float(minima[b]);
        for (int i = 0; i < 32; i++) {
            const int q = rounded((x[32 * b + i] + m) * inverse, 0, 15);
            p[16 + 32 * (b / 2) + i] |= uint8_t(q << (4 * (b % 2)));
        }
    }
}

// x is about scale q, with q from -32 to 31, for 16 columns.
float fit_scale(const float* x) {
    constexpr int V = 16 / L;
    float furthest = 0;
    vfloat v[V];
    for (int i = 0; i < 16; i++)
        if (std::fabs(x[i]) > std::fabs(furthest)) furthest = x[i];
    for (int i = 0; i < V; i++) v[i] = load<float>(x + L * i);
    if (inverse_or_zero(furthest) == 0) return 0;
    double best = 0, most = 0;
    for (int t = -10; t <= 10; t++) {
        const float inverse = -(32 + 0.1f * float(t)) / furthest;
        vfloat q2v{}, xqv{};
        for (int i = 0; i < V; i++) {
            const vfloat q = rounded(v[i] * inverse, -32, 31);
            q2v += q * q, xqv += q * v[i];
        }
        const double q2 = total(q2v), xq = total(xqv);
        if (q2 > 0 && xq * xq > most * q2) most = xq * xq / q2, best = xq / q2;
    }
    return float(best);
}

void encode_q6_k(const float* x, uint8_t* p) {
    float fitted[16], furthest = 0;
    for (int i = 0; i < 16; i++) {
        fitted[i] = fit_scale(x + 16 * i);
        if (std::fabs(fitted[i]) > std::fabs(furthest)) furthest = fitted[i];
    }
    write_half(p + 208, furthest / -128);
    const float scale = read_half(p + 208), inverse = inverse_or_zero(scale);
    std::memset(p, 0, 192);
    for (int b = 0; b < 8; b++) {
        uint8_t *low = p + 64 * (b / 4) + 32 * (b % 2), *high = p + 128 + 32 * (b / 4);
        for (int half = 0; half < 2; half++) {
            const int s = rounded(fitted[2 * b + half] * inverse, -128, 127);
            p[192 + 2 * b + half] = uint8_t(int8_t(s));
            const float each = inverse_or_zero(scale * float(s));
            for (int i = 16 * half; i < 16 * half + 16; i++) {
                const int q = rounded(x[32 * b + i] * each, -32, 31) + 32;
                low[i] |= uint8_t((q & 15) << (b % 4 / 2 * 4));
                high[i] |= uint8_t(q >> 4 << (b % 4 * 2));
            }
        }
    }
}

void encode_block(Format format, const float* x, uint8_t* p) {
    if (format == Format::q8_0) encode_q8_0(x, p);
    if (format == Format::q4_0) encode_q4_0(x, p);
    if (format == Format::q4_k) encode_q4_k(x, p);
    if (format == Format::q6_k) encode_q6_k(x, p);
}

DType dtype_of(Format format) {
    return format == Format::float32 ? DType::float32 : format == Format::bfloat16 ? DType::bfloat16 : DType::float16;
}

void convert_floats(const void* from, DType from_dtype, void* to, DType to_dtype, int64_t n) {
    for (int64_t i = 0; i < n; i += L) {
        const int count = int(std::min<int64_t>(L, n - i));
        write_floats(to, to_dtype, i, count, read_floats(from, from_dtype, i, count));
    }
}

}  // namespace

void unpack_row(const Packed& w, int64_t row, float* out) {
    const auto* p = static_cast<const uint8_t*>(w.data) + row * w.row_bytes;
    const BlockSize size = block_size(w.type());
    if (size.columns == 1) return convert_floats(p, dtype_of(w.type()), out, DType::float32, w.n_in);
    for (int64_t i = 0; i < w.n_in; i += size.columns, p += size.bytes) decode_block(w.type(), p, out + i);
}

void unpack_weights(const Packed& from, float* to, int n_threads) {
    constexpr int64_t SOME = 16;
    parallel_for((from.n_out + SOME - 1) / SOME, n_threads, [&](int64_t i) {
        const int64_t end = std::min(from.n_out, (i + 1) * SOME);
        for (int64_t o = i * SOME; o < end; o++) unpack_row(from, o, to + o * from.n_in);
    });
}

void pack_weights(const Packed& to, const float* from, int n_threads) {
    const BlockSize size = block_size(to.type());
    parallel_for(to.n_out, n_threads, [&](int64_t o) {
        auto* p = static_cast<uint8_t*>(const_cast<void*>(to.data)) + o * to.row_bytes;
        const float* x = from + o * to.n_in;
        if (size.columns == 1) return convert_floats(x, DType::float32, p, dtype_of(to.type()), to.n_in);
        for (int64_t i = 0; i < to.n_in; i += size.columns, p += size.bytes) encode_block(to.type(), x + i, p);
    });
}

}  // namespace anymamba::ANYMAMBA_ISA
