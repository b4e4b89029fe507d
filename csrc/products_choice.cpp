// The products of an instruction set that are compiled twice: plain, and with instructions for products of bytes.

#include "kernels.h"

namespace anymamba::ANYMAMBA_ISA {

void pack_activations(Format format, const float* x, int64_t stride, int64_t rows, int64_t n_in, void* out) {
    ANYMAMBA_PLAIN::pack_activations(format, x, stride, rows, n_in, out);
}

void product(const Packed& w, const void* activations, int64_t rows, float* y, int64_t y_stride, int64_t begin,
             int64_t end) {
    const auto chosen = use_dot_products ? ANYMAMBA_DOT::product : ANYMAMBA_PLAIN::product;
    chosen(w, activations, rows, y, y_stride, begin, end);
}

void packed_linear(const PackedLinearArgs& a) {
    use_dot_products ? ANYMAMBA_DOT::packed_linear(a) : ANYMAMBA_PLAIN::packed_linear(a);
}

void read_memory(const void* data, int64_t size, int n_threads) { ANYMAMBA_PLAIN::read_memory(data, size, n_threads); }

}  // namespace anymamba::ANYMAMBA_ISA
