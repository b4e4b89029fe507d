// Weights as they lie in memory or in a mapped GGUF file, and the products that read them in this form.
#pragma once

#include <cstdint>

namespace anymamba {

// The values are shared with kernels/packed_linear/formats.py.
enum class Format : int {
    float32 = 0,
    bfloat16 = 1,
    float16 = 2,
    q8_0 = 3,  // from here on GGUF's blocks: 32 columns, K-quants 256
    q4_0 = 4,
    q4_k = 5,
    q5_k = 6,
    q6_k = 7,
};

// A matrix (n_out, n_in) whose rows are row_bytes apart.
struct Packed {
    const void* data = nullptr;
    int format = 0;
    int64_t n_out = 0, n_in = 0, row_bytes = 0;
    Format type() const { return static_cast<Format>(format); }
};

// Block formats multiply whole numbers: 32 activations as int8 with a scale, and the numbers that products add to make
// up for the zero points of the weights. One cache line.
struct alignas(64) ActivationBlock {
    int8_t q[32];
    float scale;          // x = scale q; NaN if an activation is infinite or NaN
    float scaled_sum;     // scale times the sum of q
    int32_t minus_8;      // -8 times the sum of q
    int32_t minus_128;    // -128 times the sum of q
    int32_t minus_32[2];  // -32 times the sum of the first and of the last 16
    int32_t unused[2];
};
static_assert(sizeof(ActivationBlock) == 64);

// The form of the activations that a format multiplies with. Formats of one form share packed activations.
enum class ActivationForm : int { float32 = 0, bfloat16 = 1, blocks = 2 };

inline ActivationForm activation_form(Format format) {
    if (format == Format::float32 || format == Format::float16) return ActivationForm::float32;
    return format == Format::bfloat16 ? ActivationForm::bfloat16 : ActivationForm::blocks;
}

// Bytes of one packed row: a multiple of 64, the last elements zeros. Packed activations are aligned to 64 bytes.
inline int64_t activation_row_bytes(Format format, int64_t n_in) {
    const ActivationForm form = activation_form(format);
    if (form == ActivationForm::blocks) return (n_in + 31) / 32 * int64_t(sizeof(ActivationBlock));
    return (n_in * (form == ActivationForm::float32 ? 4 : 2) + 63) / 64 * 64;
}
inline int64_t activation_bytes(Format format, int64_t rows, int64_t n_in) {
    return rows * activation_row_bytes(format, n_in);
}

// y (rows, n_out) = x W^T + bias, contiguous except for the rows of x.
struct PackedLinearArgs {
    Packed weight;
    const float* x = nullptr;
    int64_t x_stride = 0, rows = 0;
    const float* bias = nullptr;
    float* y = nullptr;
    int n_threads = 1;
};

// The functions of each instruction set (kernels.h). The sum of an output has one order for any number of rows and any
// range of outputs: a row gives the same bits alone, in a batch and in a prompt. `pack_activations` and `product` run
// on the calling thread.
#define ANYMAMBA_DECLARE_PRODUCTS                                                                                   \
    /* Activations x[r * stride + i] in the form of a format, in activation_bytes aligned to 64. */                 \
    void pack_activations(Format format, const float* x, int64_t stride, int64_t rows, int64_t n_in, void* out);    \
    /* y[r * y_stride + o] for o in [begin, end), from packed activations of any number of rows. */                 \
    void product(const Packed& w, const void* activations, int64_t rows, float* y, int64_t y_stride, int64_t begin, \
                 int64_t end);                                                                                      \
    void packed_linear(const PackedLinearArgs& a);                                                                  \
    /* Reads memory as fast as it can be read: the limit of products with one row. */                               \
    void read_memory(const void* data, int64_t size, int n_threads);

#define ANYMAMBA_DECLARE_CONVERSIONS                                                                   \
    /* A row of the weights as n_in floats. */                                                         \
    void unpack_row(const Packed& w, int64_t row, float* out);                                         \
    /* The whole matrix (n_out, n_in), contiguous, from a format and to one; there is none to Q5_K. */ \
    void unpack_weights(const Packed& from, float* to, int n_threads);                                 \
    void pack_weights(const Packed& to, const float* from, int n_threads);

// Whether products use the instructions for products of bytes (VNNI, together with those for bfloat16; NEON's) where an
// instruction set has them beside plain ones.
bool has_dot_products();
inline bool use_dot_products = has_dot_products();

}  // namespace anymamba
