// Finds the sequences in a range of a row: one per row, or several packed along its length.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace anymamba {

// Steps [first, last) of sequence `index`, which covers [begin, end).
struct Piece {
    int64_t index, begin, end, first, last;
    bool starts() const { return first == begin; }
    bool ends() const { return last == end; }
};

// The sequences, or parts of them, in steps [first, last) of a row. Empty sequences are left out.
template <typename Args>
std::vector<Piece> pieces_of(const Args& a, int64_t row, int64_t first, int64_t last) {
    if (!a.offsets) return {{row, 0, a.length, first, last}};
    const auto* offsets = static_cast<const int64_t*>(a.offsets);
    std::vector<Piece> found;
    int64_t s = std::upper_bound(offsets, offsets + a.n_sequences + 1, first) - offsets - 1;
    for (; s < a.n_sequences && offsets[s] < last; s++) {
        const int64_t begin = offsets[s], end = offsets[s + 1];
        if (end > std::max(begin, first)) found.push_back({s, begin, end, std::max(begin, first), std::min(end, last)});
    }
    return found;
}

}  // namespace anymamba
