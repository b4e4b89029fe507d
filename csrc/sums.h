// Sums over many steps. The steps of a tile are added up first, then the tiles by compensated addition (Neumaier,
// 1974). So the rounding error does not grow with the length, as it would in a single running sum.
#pragma once

#include "scratch.h"
#include "simd.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

// Sets of n_vectors sums each.
template <typename T>
class Sums {
    static constexpr int W = LANES<T>;
    using V = Vector<T>;

  public:
    Sums(int64_t n_sets, int64_t n_vectors) : size(n_vectors * W), data_(n_sets * size * 3) {}

    // The sums (vector, lane) of the current tile, to which the caller adds.
    T* tile(int64_t set) const { return part(set, 0); }

    // Move a tile's sums to the totals; the next tile starts from zero.
    void close_tile(int64_t set) const {
        T *const tile = part(set, 0), *const totals = part(set, 1), *const losses = part(set, 2);
        for (int64_t j = 0; j < size; j += W) {
            const V more = load<T>(tile + j), before = load<T>(totals + j);
            const V after = before + more, added = after - before;
            const V loss = (before - (after - added)) + (more - added);
            store<T>(totals + j, after);
            store<T>(losses + j, load<T>(losses + j) + loss);
            store<T>(tile + j, V{});
        }
    }

    V total(int64_t set, int64_t vector) const {
        const V sum = load<T>(part(set, 1) + vector * W), loss = load<T>(part(set, 2) + vector * W);
        return loss - loss == 0 ? sum + loss : sum;  // the loss of an infinite sum is NaN
    }

  private:
    const int64_t size;
    const Scratch<T> data_;

    T* part(int64_t set, int what) const { return data_.get() + (set * 3 + what) * size; }
};

}  // namespace
}  // namespace anymamba::ANYMAMBA_ISA
