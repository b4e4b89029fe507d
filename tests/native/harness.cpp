// Drives the kernels of every instruction set of this machine over awkward shapes, with buffers of exactly the size
// that the arguments promise, for the sanitizers (make sanitize); forward is compared with plain loops in double.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "kernels.h"

using anymamba::ConvArgs;
using anymamba::DType;
using anymamba::Format;
using anymamba::NormArgs;
using anymamba::Packed;
using anymamba::PackedLinearArgs;
using anymamba::Rows;
using anymamba::ScanArgs;

namespace {

std::mt19937 generator(0);

int pick(int first, int last) { return std::uniform_int_distribution<int>(first, last)(generator); }
double normal() { return std::normal_distribution<double>()(generator); }

// A tensor of one dtype on the heap, with the values that it holds.
struct Tensor {
    DType dtype = DType::float32;
    std::vector<char> bytes;

    Tensor() = default;
    Tensor(DType dtype, int64_t size) : dtype(dtype), bytes(size * item()) {}

    int item() const { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
    int64_t size() const { return bytes.size() / item(); }
    void* data() { return bytes.empty() ? nullptr : bytes.data(); }

    double get(int64_t i) const {
        if (dtype == DType::float64) return reinterpret_cast<const double*>(bytes.data())[i];
        if (dtype == DType::float32) return reinterpret_cast<const float*>(bytes.data())[i];
        const uint16_t half = reinterpret_cast<const uint16_t*>(bytes.data())[i];
        if (dtype == DType::float16) {
            const int exponent = half >> 10 & 31, mantissa = half & 1023;
            const double size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
            return half >> 15 ? -size : size;
        }
        const uint32_t wide = uint32_t(half) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    void set(int64_t i, double value) {
        if (dtype == DType::float64) reinterpret_cast<double*>(bytes.data())[i] = value;
        if (dtype == DType::float32) reinterpret_cast<float*>(bytes.data())[i] = float(value);
        if (dtype == DType::bfloat16) {
            const float narrow = float(value);
            uint32_t wide;
            std::memcpy(&wide, &narrow, 4);
            reinterpret_cast<uint16_t*>(bytes.data())[i] = uint16_t(wide >> 16);
        }
        if (dtype == DType::float16) {  // whole 256ths between -4 and 4 are exact in a float16
            const int whole = int(std::clamp(value, -4.0, 4.0) * 256);
            int exponent = 0;
            const double fraction = std::frexp(std::abs(whole) / 256.0, &exponent);
            const int bits = whole == 0 ? 0 : ((exponent + 14) << 10) | (int(fraction * 2048) & 1023);
            reinterpret_cast<uint16_t*>(bytes.data())[i] = uint16_t(bits | (whole < 0 ? 0x8000 : 0));
        }
    }
};

Tensor filled(DType dtype, int64_t size, double scale = 1, bool negative = false) {
    Tensor t(dtype, size);
    for (int64_t i = 0; i < size; i++) t.set(i, negative ? -std::abs(normal()) * scale : normal() * scale);
    return t;
}

Rows rows(Tensor& t, int64_t length, int64_t width, int64_t groups = 0, int64_t state = 0) {
    return {t.data(), int(t.dtype), length * width, width, groups ? state : 0};
}

double softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }
double silu(double x) { return x / (1 + std::exp(-x)); }

int failures = 0;

void compare(const char* what, const char* isa, double got, double want, double tolerance) {
    if (std::abs(got - want) <= tolerance * (1 + std::abs(want))) return;
    if (failures++ < 20) std::printf("%s on %s: %g, not %g\n", what, isa, got, want);
}

std::vector<int64_t> random_offsets(int64_t length) {
    std::vector<int64_t> offsets{0, length};
    for (int i = pick(0, 4); i > 0; i--) offsets.push_back(pick(0, int(length)));
    std::sort(offsets.begin(), offsets.end());
    return offsets;
}

struct Kernels {
    const char* name;
    void (*scan_forward)(const ScanArgs&);
    void (*scan_backward)(const ScanArgs&);
    void (*scan_summary)(const ScanArgs&, bool);
    void (*conv_forward)(const ConvArgs&);
    void (*conv_backward)(const ConvArgs&);
    void (*norm_forward)(const NormArgs&);
    void (*norm_backward)(const NormArgs&);
    void (*packed_linear)(const PackedLinearArgs&);
    void (*unpack_row)(const Packed&, int64_t, float*);
    void (*pack_weights)(const Packed&, const float*, int);
    void (*stack_step)(anymamba::Stack&, const anymamba::StackStep&);
    void (*stack_replay)(const anymamba::Stack&, const anymamba::StackReplay&);
};

const DType DTYPES[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

void scan(const Kernels& kernels) {
    const DType own = pick(0, 4) ? DType::float32 : DType::float64;
    const auto any = [] { return DTYPES[pick(0, 3)]; };
    const auto narrow = [&] {
        const DType dtype = any();
        return own == DType::float32 && dtype == DType::float64 ? DType::float32 : dtype;
    };
    const int64_t groups = pick(1, 2), d = groups * pick(1, 40), n = pick(0, 1) ? 16 : pick(1, 19), l = pick(1, 150);
    const bool packed = pick(0, 1), has_z = pick(0, 1), zoh = pick(0, 1), with_softplus = pick(0, 1);
    const int64_t b = packed ? 1 : pick(1, 3);
    const bool selective_B = pick(0, 3), selective_C = pick(0, 3), with_state = pick(0, 1);
    Tensor u = filled(narrow(), b * l * d), delta = filled(narrow(), b * l * d, 0.5), z = filled(narrow(), b * l * d);
    if (!with_softplus)
        for (int64_t i = 0; i < delta.size(); i++) delta.set(i, std::abs(delta.get(i)));
    Tensor A = filled(own, d * n, 1, true), D = filled(own, d), bias = filled(own, d, 0.1), y(u.dtype, b * l * d);
    Tensor B = filled(selective_B ? any() : own, selective_B ? b * l * groups * n : d * n);
    Tensor C = filled(selective_C ? any() : own, selective_C ? b * l * groups * n : d * n);
    const auto offsets = random_offsets(l);
    const int64_t sequences = packed ? offsets.size() - 1 : b;
    Tensor initial = filled(own, sequences * d * n), last = initial;

    ScanArgs a;
    a.is_double = own == DType::float64, a.softplus = with_softplus, a.zoh = zoh;
    a.selective_B = selective_B, a.selective_C = selective_C;
    a.batch = b, a.length = l, a.d_inner = d, a.d_state = n, a.n_groups = groups;
    a.tile = 8, a.range = 16, a.chunk = pick(0, 1) ? 24 : (l + 7) / 8 * 8, a.n_threads = 3;
    a.u = rows(u, l, d), a.delta = rows(delta, l, d), a.y = rows(y, l, d);
    if (has_z) a.z = rows(z, l, d);
    if (selective_B)
        a.B = rows(B, l, groups * n, groups, n);
    else
        a.constant_B = B.data();
    if (selective_C)
        a.C = rows(C, l, groups * n, groups, n);
    else
        a.constant_C = C.data();
    a.A = A.data(), a.D = D.data(), a.delta_bias = bias.data();
    a.initial_state = with_state ? initial.data() : nullptr, a.last_state = last.data();
    const int64_t tiles = (l + a.tile - 1) / a.tile, chunks = (l + a.chunk - 1) / a.chunk;
    Tensor saved(own, tiles * b * n * d), states(own, b * chunks * d * n), decays = states;
    a.saved = saved.data(), a.chunk_states = states.data(), a.chunk_decays = decays.data();
    if (packed) a.offsets = const_cast<int64_t*>(offsets.data()), a.n_sequences = sequences;
    kernels.scan_forward(a);

    const double tolerance = y.dtype == DType::bfloat16 ? 1e-2 : y.dtype == DType::float16 ? 2e-3 : 2e-4;
    for (int64_t row = 0; row < b; row++)
        for (int64_t c = 0; c < d; c++) {
            const int64_t g = c / (d / groups);
            std::vector<double> h(n);
            for (int64_t t = 0, s = packed ? -1 : row; t < l; t++) {
                bool starts = t == 0;
                if (packed)
                    while (s + 1 < sequences && offsets[s + 1] <= t) s++, starts = true;
                const int64_t at = (row * l + t) * d + c, matrix = ((row * l + t) * groups + g) * n;
                const double raw = delta.get(at) + bias.get(c), step = with_softplus ? softplus(raw) : raw;
                double sum = 0;
                for (int64_t i = 0; i < n; i++) {
                    if (starts) h[i] = with_state ? initial.get((s * d + c) * n + i) : 0;
                    const double rate = step * A.get(c * n + i), ratio = zoh && rate != 0 ? std::expm1(rate) / rate : 1;
                    h[i] =
                        std::exp(rate) * h[i] + step * u.get(at) * ratio * B.get(selective_B ? matrix + i : c * n + i);
                    sum += h[i] * C.get(selective_C ? matrix + i : c * n + i);
                }
                sum += D.get(c) * u.get(at);
                compare("scan", kernels.name, y.get(at), has_z ? sum * silu(z.get(at)) : sum, tolerance * std::sqrt(n));
            }
        }

    const int64_t n_ranges = groups * ((d / groups + a.range - 1) / a.range);
    Tensor dy = filled(y.dtype, b * l * d), du(u.dtype, u.size()), ddelta(delta.dtype, delta.size()),
           dz(z.dtype, z.size());
    Tensor dlast = filled(own, last.size()), dinitial = dlast, dA(own, b * chunks * d * n);
    Tensor dB(own, selective_B ? b * n_ranges * l * n : b * chunks * d * n);
    Tensor dC(own, selective_C ? b * n_ranges * l * n : b * chunks * d * n), dD(own, b * chunks * d), dbias = dD;
    a.dy = rows(dy, l, d), a.du = rows(du, l, d), a.ddelta = rows(ddelta, l, d);
    if (has_z) a.dz = rows(dz, l, d);
    a.dlast_state = dlast.data(), a.dinitial_state = with_state ? dinitial.data() : nullptr;
    a.dA_parts = dA.data(), a.dB_parts = dB.data(), a.dC_parts = dC.data(), a.dD_parts = dD.data();
    a.dbias_parts = dbias.data();
    kernels.scan_backward(a);

    Tensor steps(own, b * chunks * d);
    a.chunk_steps = steps.data(), a.y = Rows(), a.last_state = nullptr;
    kernels.scan_summary(a, false);
    double total = 0, wanted = 0;
    for (int64_t i = 0; i < steps.size(); i++) total += steps.get(i);
    for (int64_t i = 0; i < delta.size(); i++) {
        const double raw = delta.get(i) + bias.get(i % d);
        wanted += with_softplus ? softplus(raw) : raw;
    }
    compare("sum of steps", kernels.name, total, wanted, 2e-4 * std::sqrt(double(delta.size())));
    kernels.scan_summary(a, true);
}

void conv(const Kernels& kernels) {
    const DType own = pick(0, 4) ? DType::float32 : DType::float64;
    DType dtype = DTYPES[pick(0, 3)];
    if (own == DType::float32 && dtype == DType::float64) dtype = DType::float32;
    const int64_t d = pick(1, 70), l = pick(1, 100), k = pick(0, 1) ? 4 : pick(1, 7);
    const bool packed = pick(0, 1), with_silu = pick(0, 1), with_state = pick(0, 1);
    const int64_t b = packed ? 1 : pick(1, 3);
    const auto offsets = random_offsets(l);
    const int64_t sequences = packed ? offsets.size() - 1 : b;
    Tensor x = filled(dtype, b * l * d), y(dtype, b * l * d), weight = filled(own, k * d), bias = filled(own, d);
    Tensor initial = filled(dtype, sequences * (k - 1) * d), last = initial;

    ConvArgs a;
    a.is_double = own == DType::float64, a.silu = with_silu, a.batch = b, a.length = l, a.d_inner = d, a.width = k;
    a.chunk = pick(1, 40), a.n_threads = 3;
    a.x = rows(x, l, d), a.y = rows(y, l, d), a.weight = weight.data(), a.bias = bias.data();
    a.initial_state = with_state ? initial.data() : nullptr, a.last_state = last.data();
    if (packed) a.offsets = const_cast<int64_t*>(offsets.data()), a.n_sequences = sequences;
    kernels.conv_forward(a);

    const double tolerance = dtype == DType::bfloat16 ? 1e-2 : dtype == DType::float16 ? 2e-3 : 1e-5;
    for (int64_t row = 0; row < b; row++)
        for (int64_t t = 0, s = packed ? -1 : row, begin = 0; t < l; t++) {
            if (packed)
                while (s + 1 < sequences && offsets[s + 1] <= t) s++, begin = t;
            for (int64_t c = 0; c < d; c++) {
                double sum = bias.get(c);
                for (int64_t i = 0; i < k; i++) {
                    const int64_t from = t - k + 1 + i, state = (s * (k - 1) + k - 1 + from - begin) * d + c;
                    const double input = from >= begin ? x.get((row * l + from) * d + c)
                                         : with_state  ? initial.get(state)
                                                       : 0;
                    sum += weight.get(i * d + c) * input;
                }
                compare("conv", kernels.name, y.get((row * l + t) * d + c), with_silu ? silu(sum) : sum, tolerance);
            }
        }

    const int64_t parts = b * ((l + a.chunk - 1) / a.chunk);
    Tensor dy = filled(dtype, y.size()), dx(dtype, x.size()), dlast = filled(own, last.size()), dinitial = dlast;
    Tensor dweight(own, parts * k * d), dbias(own, parts * d);
    a.dy = rows(dy, l, d), a.dx = rows(dx, l, d), a.dlast_state = dlast.data();
    a.dinitial_state = with_state ? dinitial.data() : nullptr;
    a.dweight_parts = dweight.data(), a.dbias_parts = dbias.data();
    kernels.conv_backward(a);
}

// The norm of a sum, and the gradient of the sum for dy = dtotal = 1, by their formulas in double.
void norm(const Kernels& kernels) {
    const DType own = pick(0, 4) ? DType::float32 : DType::float64;
    const auto any = [&] { return own == DType::float64 ? own : pick(0, 1) ? own : DTYPES[pick(2, 3)]; };
    const int64_t n_rows = pick(1, 40), size = pick(1, 90), chunk = pick(1, 20), parts = (n_rows + chunk - 1) / chunk;
    const bool subtract_mean = pick(0, 1), with_residual = pick(0, 1), with_weight = pick(0, 1);
    const DType of_x = any();
    Tensor x = filled(of_x, n_rows * size), residual = filled(own, n_rows * size), total(own, n_rows * size);
    Tensor weight = filled(own, size), bias = filled(own, size), y(any(), n_rows * size), statistics(own, 2 * n_rows);

    NormArgs a;
    a.is_double = own == DType::float64, a.subtract_mean = subtract_mean;
    a.rows = n_rows, a.size = size, a.chunk = chunk, a.eps = 1e-5, a.n_threads = 3;
    a.total_dtype = int(with_residual ? own : of_x);
    a.x = rows(x, n_rows, size), a.y = rows(y, n_rows, size), a.statistics = statistics.data();
    if (with_residual) a.residual = rows(residual, n_rows, size), a.total = rows(total, n_rows, size);
    if (with_weight) a.weight = weight.data(), a.bias = bias.data();
    a.is_plain = of_x == DType::float32 && y.dtype == DType::float32;
    kernels.norm_forward(a);

    Tensor dx(of_x, x.size()), dresidual(own, x.size());
    Tensor ones(own, x.size()), dweight(own, parts * size), dbias(own, parts * size);
    for (int64_t i = 0; i < ones.size(); i++) ones.set(i, 1);
    a.dy = a.dtotal = rows(ones, n_rows, size), a.dx = rows(dx, n_rows, size);
    if (with_residual) a.dresidual = rows(dresidual, n_rows, size);
    if (!with_residual) a.dtotal = Rows();
    a.dweight_parts = dweight.data(), a.dbias_parts = dbias.data();
    kernels.norm_backward(a);

    const auto tolerance = [](DType d) { return d == DType::bfloat16 ? 2e-2 : d == DType::float16 ? 4e-3 : 2e-4; };
    double of_bias = 0;
    for (int64_t i = 0; i < dbias.size(); i++) of_bias += dbias.get(i);
    compare("bias of a norm", kernels.name, of_bias, double(n_rows * size), 1e-4);
    for (int64_t r = 0; r < n_rows; r++) {
        std::vector<double> v(size), g(size);
        double mean = 0, squares = 0, common = 0, along = 0;
        for (int64_t i = 0; i < size; i++) {
            v[i] = x.get(r * size + i) + (with_residual ? residual.get(r * size + i) : 0);
            mean += subtract_mean ? v[i] / size : 0;
        }
        for (int64_t i = 0; i < size; i++) squares += (v[i] - mean) * (v[i] - mean) / size;
        const double scale = 1 / std::sqrt(squares + 1e-5);
        for (int64_t i = 0; i < size; i++) {
            g[i] = with_weight ? weight.get(i) : 1;
            common += subtract_mean ? g[i] / size : 0;
            along += g[i] * (v[i] - mean) * scale / size;
        }
        for (int64_t i = 0; i < size; i++) {
            const double n = (v[i] - mean) * scale, b = with_weight ? bias.get(i) : 0;
            compare("norm", kernels.name, y.get(r * size + i), n * g[i] + b, tolerance(y.dtype));
            const double d = scale * (g[i] - common - n * along);
            const double wide = tolerance(of_x) * (1 + scale);
            compare("gradient of a norm", kernels.name, dx.get(r * size + i), d + (with_residual ? 1 : 0), wide);
        }
    }
}

// A product in every format, against the sums of the unpacked weights and the activations in double.
void products(const Kernels& kernels) {
    const int number = pick(0, 7);
    const auto format = static_cast<Format>(number);
    const int64_t columns[] = {1, 1, 1, 32, 32, 256, 256, 256}, bytes[] = {4, 2, 2, 34, 18, 144, 176, 210};
    const bool in_blocks = columns[number] > 1;
    const int64_t n_in = columns[number] * pick(1, in_blocks ? 4 : 150), n_out = pick(1, 40);
    const int64_t rows = pick(0, 9) ? pick(1, 20) : pick(144, 200);  // many are cut into blocks
    const Tensor x = filled(DType::float32, rows * n_in), bias = filled(DType::float32, n_out);
    const Tensor matrix = filled(DType::float32, n_out * n_in);
    const int64_t row_bytes = n_in / columns[number] * bytes[number];
    std::vector<uint8_t> data(n_out * row_bytes);
    const Packed w{data.data(), number, n_out, n_in, row_bytes};
    if (format != Format::q5_k) {
        kernels.pack_weights(w, reinterpret_cast<const float*>(matrix.bytes.data()), 3);
    } else {
        for (uint8_t& byte : data) byte = uint8_t(pick(0, 255));
        for (int64_t i = 0; i < int64_t(data.size()); i += 176) data[i + 1] = data[i + 3] = 0x10;  // small scales
    }
    Tensor y(DType::float32, rows * n_out);
    const auto floats = [](const Tensor& t) { return reinterpret_cast<const float*>(t.bytes.data()); };
    kernels.packed_linear({w, floats(x), n_in, rows, floats(bias), static_cast<float*>(y.data()), 3});

    std::vector<float> row(n_in);
    for (int64_t o = 0; o < n_out; o++) {
        kernels.unpack_row(w, o, row.data());
        for (int64_t r = 0; r < rows; r++) {
            double sum = bias.get(o), size = 0;
            for (int64_t i = 0; i < n_in; i++) {
                sum += double(row[i]) * x.get(r * n_in + i);
                size += double(row[i]) * row[i];
            }
            const double rounding = in_blocks ? 0.02 : format == Format::bfloat16 ? 0.01 : 1e-5;  // of an activation
            compare("product", kernels.name, y.get(r * n_out + o), sum, 5 * rounding * (0.1 + std::sqrt(size)));
        }
    }
}

// A whole model, whose weights live as long as this.
struct Model {
    std::vector<Tensor> kept;
    anymamba::Stack stack;

    float* vector(int64_t size, double scale = 1) {
        kept.push_back(filled(DType::float32, size, scale));
        return static_cast<float*>(kept.back().data());
    }
    Packed matrix(int64_t n_out, int64_t n_in) { return {vector(n_out * n_in, 0.3), 0, n_out, n_in, 4 * n_in}; }
    anymamba::Norm norm(int64_t size, bool present = true) {
        const bool has_bias = pick(0, 1);
        return {present, has_bias, 1e-5f, pick(0, 3) ? vector(size) : nullptr, has_bias ? vector(size) : nullptr};
    }

    Model() {
        const int64_t d = stack.d_model = pick(1, 70), vocabulary = pick(1, 600);
        stack.embedding = matrix(vocabulary, d), stack.head = matrix(vocabulary, d), stack.norm = norm(d);
        for (int i = pick(0, 3); i > 0; i--) add(d);
    }

    void add(int64_t d) {
        anymamba::Layer layer;
        const int64_t D = layer.d_inner = pick(1, 150), N = layer.d_state = pick(1, 35);
        layer.d_conv = pick(1, 5), layer.zoh = pick(0, 1);
        layer.dt_rows = pick(0, 3) ? pick(1, 9) : 0, layer.B_rows = pick(0, 3) ? N : 0;
        layer.C_rows = pick(0, 3) ? N : 0;
        layer.norm = norm(d), layer.output_norm = norm(D, pick(0, 1));
        layer.dt_norm = norm(layer.dt_rows, pick(0, 1)), layer.B_norm = norm(layer.B_rows, pick(0, 1));
        layer.C_norm = norm(layer.C_rows, pick(0, 1));
        layer.in_proj = matrix(2 * D, d), layer.out_proj = matrix(d, D);
        const int64_t projected = layer.dt_rows + layer.B_rows + layer.C_rows;
        if (projected) layer.x_proj = matrix(projected, D);
        if (layer.dt_rows && pick(0, 1)) layer.dt_proj = matrix(D, layer.dt_rows);
        if (!layer.dt_proj.data && layer.dt_rows) layer.dt_blocks = vector((D + 31) / 32 * 32 * layer.dt_rows, 0.3);
        if (pick(0, 1)) layer.in_bias = vector(2 * D), layer.out_bias = vector(d), layer.conv_bias = vector(D);
        layer.conv_weight = vector(layer.d_conv * D), layer.D = vector(D), layer.delta_bias = vector(D);
        layer.A = vector(D * N);
        for (int64_t j = 0; j < D * N; j++) {
            layer.A[j] = -std::abs(layer.A[j]);
            layer.largest_A = std::max(layer.largest_A, -layer.A[j]);
        }
        layer.B = layer.B_rows ? nullptr : vector(D * N), layer.C = layer.C_rows ? nullptr : vector(D * N);
        stack.layers.push_back(layer);
    }
};

// Steps of a model give the same bits on one thread and on three, into new memory and over the old state.
void steps(const Kernels& kernels) {
    Model model;
    const int64_t rows = pick(1, 9) < 9 ? pick(1, 5) : pick(250, 260), n_logits = model.stack.head.n_out;
    std::vector<int64_t> ids(rows);
    for (int64_t& id : ids) id = pick(0, int(n_logits) - 1);
    std::vector<Tensor> before, after;
    for (const anymamba::Layer& layer : model.stack.layers) {
        before.push_back(filled(DType::float32, rows * (layer.d_conv - 1) * layer.d_inner));
        before.push_back(filled(DType::float32, rows * layer.d_inner * layer.d_state));
    }
    after = before;
    const auto run = [&](std::vector<Tensor>& from, std::vector<Tensor>& to, int threads, Tensor& logits) {
        std::vector<anymamba::LayerState> states;
        for (size_t i = 0; i < from.size(); i += 2)
            states.push_back({static_cast<float*>(from[i].data()), static_cast<float*>(from[i + 1].data()),
                              static_cast<float*>(to[i].data()), static_cast<float*>(to[i + 1].data())});
        kernels.stack_step(model.stack,
                           {ids.data(), rows, 1, threads, states.data(), static_cast<float*>(logits.data())});
    };
    Tensor one(DType::float32, rows * n_logits), three = one;
    run(before, after, 1, one);
    run(before, before, 3, three);
    failures += one.bytes != three.bytes;
    for (size_t i = 0; i < before.size(); i++) failures += before[i].bytes != after[i].bytes;
}

// A text read at once gives the bits of single steps, and so does the state that a replay brings back.
void reads(const Kernels& kernels) {
    Model model;
    const int64_t length = pick(1, 9) < 9 ? pick(1, 5) : pick(250, 260), n_logits = model.stack.head.n_out;
    const int64_t count = pick(0, int(length));
    std::vector<int64_t> ids(length);
    for (int64_t& id : ids) id = pick(0, int(n_logits) - 1);
    std::vector<Tensor> before, stepped, read, replayed, kept;
    for (const anymamba::Layer& layer : model.stack.layers) {
        before.push_back(filled(DType::float32, (layer.d_conv - 1) * layer.d_inner));
        before.push_back(filled(DType::float32, layer.d_inner * layer.d_state));
        kept.push_back(filled(DType::float32, length * anymamba::KeptInputs::size(layer)));
    }
    stepped = read = replayed = before;
    const auto floats = [](Tensor& tensor) { return static_cast<float*>(tensor.data()); };
    const auto states = [&](std::vector<Tensor>& from, std::vector<Tensor>& to, bool keep) {
        std::vector<anymamba::LayerState> found;
        for (size_t i = 0; i < from.size(); i += 2)
            found.push_back({floats(from[i]), floats(from[i + 1]), floats(to[i]), floats(to[i + 1]),
                             keep ? floats(kept[i / 2]) : nullptr});
        return found;
    };
    Tensor whole(DType::float32, length * n_logits), single = whole, one(DType::float32, n_logits);
    const auto reading = states(before, read, true);
    kernels.stack_step(model.stack, {ids.data(), length, length, 3, reading.data(), floats(whole), length});
    const auto replaying = states(before, replayed, true);
    kernels.stack_replay(model.stack, {&count, 1, length, 3, replaying.data()});
    std::vector<Tensor> wanted = before;
    const auto stepping = states(stepped, stepped, false);
    for (int64_t t = 0; t < length; t++) {
        kernels.stack_step(model.stack, {&ids[t], 1, 1, 1, stepping.data(), floats(one)});
        std::copy_n(floats(one), n_logits, floats(single) + t * n_logits);
        if (t + 1 == count) wanted = stepped;
    }
    failures += whole.bytes != single.bytes;
    for (size_t i = 0; i < before.size(); i++)
        failures += (read[i].bytes != stepped[i].bytes) + (replayed[i].bytes != wanted[i].bytes);
}

#define KERNELS(ISA)               \
    {#ISA,                         \
     anymamba::ISA::scan_forward,  \
     anymamba::ISA::scan_backward, \
     anymamba::ISA::scan_summary,  \
     anymamba::ISA::conv_forward,  \
     anymamba::ISA::conv_backward, \
     anymamba::ISA::norm_forward,  \
     anymamba::ISA::norm_backward, \
     anymamba::ISA::packed_linear, \
     anymamba::ISA::unpack_row,    \
     anymamba::ISA::pack_weights,  \
     anymamba::ISA::stack_step,    \
     anymamba::ISA::stack_replay}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 200;
    std::vector<Kernels> all{KERNELS(baseline)};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.push_back(KERNELS(x86_64_v3));
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) all.push_back(KERNELS(x86_64_v4));
#endif
    for (const Kernels& kernels : all)
        for (int i = 0; i < rounds; i++) {
            scan(kernels), conv(kernels), norm(kernels), products(kernels), steps(kernels), reads(kernels);
            anymamba::use_dot_products = i % 2 && anymamba::has_dot_products();
        }
    std::printf("%zu instruction sets, %d rounds each, %d wrong values\n", all.size(), rounds, failures);
    return failures != 0;
}
