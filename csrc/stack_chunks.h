// The chunks of a step's phases: outputs of a matrix, or channels.
#pragma once

#include <algorithm>
#include <vector>

#include "stack.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

constexpr int64_t LARGEST_CHUNK = 1 << 15, SMALLEST_CHUNK = 1 << 13;  // in bytes of weights

enum Phase { IN_PROJ, X_PROJ, CHANNELS, OUT_PROJ, PHASES };

// Bounds of chunks: small enough for threads to finish close together.
std::vector<int64_t> cut(int64_t size, int64_t bytes_each, int64_t unit, int n_threads) {
    bytes_each = std::max<int64_t>(1, bytes_each);
    const int64_t bytes = std::clamp(size * bytes_each / (8 * n_threads), SMALLEST_CHUNK, LARGEST_CHUNK);
    const int64_t step = std::max(unit, bytes / bytes_each / unit * unit);
    std::vector<int64_t> bounds{0};
    do bounds.push_back(std::min(size, bounds.back() + step));
    while (bounds.back() < size);
    return bounds;
}
std::vector<int64_t> cut(const Packed& matrix, int n_threads) {
    return cut(matrix.n_out, matrix.row_bytes, matrix.n_out < 256 ? 16 : 32, n_threads);
}

void cut_into_chunks(Stack& stack, int n_threads) {
    auto& bounds = stack.chunks.bounds;
    bounds.clear();
    for (const Layer& layer : stack.layers) {
        const int64_t per_channel = 2 * layer.dt_rows + 4 * int64_t(sizeof(float)) * layer.d_state;
        bounds.push_back(cut(layer.in_proj, n_threads));
        bounds.push_back(cut(layer.x_proj, n_threads));
        bounds.push_back(cut(layer.d_inner, per_channel, CHANNEL_BLOCK, n_threads));
        bounds.push_back(cut(layer.out_proj, n_threads));
    }
    bounds.push_back(cut(stack.head, n_threads));
    stack.chunks.n_threads = n_threads;
}

}  // namespace
}  // namespace anymamba::ANYMAMBA_ISA
