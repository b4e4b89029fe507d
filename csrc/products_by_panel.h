// Products by panels of outputs: the weights of a panel are unpacked once, an output in each lane, and multiplied by
// all rows. Sums stay in lanes, so none is added up across a vector, and each has one order, that of the columns.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "packed.h"
#include "products_panel.h"
#include "simd.h"

namespace anymamba::ANYMAMBA_ISA {

constexpr int64_t PANEL_ROWS = 256;        // whose sums are kept at once
constexpr bool WIDE = LANES<float> == 16;  // and twice as many registers

// a b + c, rounded once where the instruction set can, wherever the compiler would contract or not.
ANYMAMBA_INLINE vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

ANYMAMBA_INLINE vint broadcast_int(const void* p) {
    int32_t value;
    std::memcpy(&value, p, 4);
#if defined(__AVX512F__)
    return (vint)_mm512_set1_epi32(value);
#else
    return value - vint{};
#endif
}

// Where the sums of a few rows and of one or more panels are, in floats.
struct Sums {
    float* first;
    int64_t row_stride, panel_stride;
    ANYMAMBA_INLINE float* at(int64_t row, int panel) const { return first + row * row_stride + panel * panel_stride; }
};

// What is added to sums: a chunk of the columns of some panels and rows.
struct PanelChunk {
    int64_t chunk, row;
    Sums from, to;
};

// A product of at most PANEL_ROWS rows. The matrix has at least OUTPUTS rows. The columns are cut into chunks, whose
// unpacked weights stay in the first-level cache. `Kind` says how weights are unpacked and multiplied:
//     Panel                                      the unpacked weights of a chunk of a panel
//     MOST_PANELS, most_rows(panels)             how much is multiplied at once
//     FEW_ROWS                                   up to so many take one panel
//     DIRECT_ROWS                                1 or 8: so many rows are multiplied by weights as they are unpacked
//     CHUNK_BYTES, n_chunks()                    of a row
//     unpack(rows, chunk, next, panel)           `next` is memory to prefetch, or null
//     add<P, R>(panels, PanelChunk)              adds the products of R rows
//     row(r)                                     the activations of a row
//     add_directly<R>(rows, chunk, next, x, y)   the same for one panel and rows x, without keeping the weights
template <typename Kind>
class PanelProduct {
  public:
    PanelProduct(const Kind& kind, const Packed& w, int64_t rows, float* y, int64_t y_stride)
        : kind(kind),
          w(w),
          rows(rows),
          y(y),
          y_stride(y_stride),
          panels_ahead(1 + PREFETCH_DISTANCE / (OUTPUTS * w.row_bytes)) {}

    void outputs(int64_t o, int64_t end) {
        if (rows == 1) return direct<1>(o, end);
        if constexpr (Kind::DIRECT_ROWS == 8) {
            if (rows == 2) return direct<2>(o, end);
            if (rows <= 4) return direct<4>(o, end);
            if (rows <= 8) return direct<8>(o, end);
        }
        if constexpr (Kind::MOST_PANELS == 2)
            for (; rows > Kind::FEW_ROWS && o + 2 * OUTPUTS <= end; o += 2 * OUTPUTS) some_outputs<2>(o, end);
        for (; o < end; o += OUTPUTS) some_outputs<1>(o, end);
    }

  private:
    const Kind& kind;
    const Packed& w;
    const int64_t rows;
    float* const y;
    const int64_t y_stride, panels_ahead;
    typename Kind::Panel panels[Kind::MOST_PANELS];
    alignas(64) float sums[Kind::MOST_PANELS][PANEL_ROWS][OUTPUTS];

    // Panels at the end overlap: a lane is stored once.
    int64_t first_output(int64_t o) const { return std::min(o, w.n_out - OUTPUTS); }

    const uint8_t* data(int64_t o, int64_t offset) const {
        return static_cast<const uint8_t*>(w.data) + o * w.row_bytes + offset;
    }
    PanelRows rows_at(int64_t o, int64_t chunk) const {
        return PanelRows(data(first_output(o), chunk * Kind::CHUNK_BYTES), w.row_bytes);
    }

    // Where memory is prefetched while a chunk is read. It may be beyond the caller's outputs: some thread takes those
    // after them next.
    template <int P>
    const uint8_t* ahead(int64_t o, int64_t chunk) const {
        const int64_t later = first_output(o) + P * OUTPUTS * panels_ahead;
        return later + OUTPUTS <= w.n_out ? data(later, chunk * Kind::CHUNK_BYTES * OUTPUTS) : nullptr;
    }

    // At most R rows: it computes the last one several times and stores it once.
    template <int R>
    void direct(int64_t o, int64_t end) {
        const char* x[R];
        for (int r = 0; r < R; r++) x[r] = kind.row(std::min<int64_t>(r, rows - 1));
        for (; o < end; o += OUTPUTS) {
            vfloat found[1][R] = {};
            for (int64_t chunk = 0; chunk < kind.n_chunks(); chunk++)
                kind.template add_directly<R>(rows_at(o, chunk), chunk, ahead<1>(o, chunk), x, found);
            for (int r = 0; r < R; r++) store(sums[0][r], found[0][r]);
            store_sums(o, end, sums[0]);
        }
    }

    template <int P>
    void some_outputs(int64_t o, int64_t end) {
        const Sums kept{&sums[0][0][0], OUTPUTS, PANEL_ROWS * OUTPUTS};
        const bool fit = o + P * OUTPUTS <= std::min(end, w.n_out);
        for (int64_t chunk = 0; chunk < kind.n_chunks(); chunk++) {
            for (int p = 0; p < P; p++)
                kind.unpack(rows_at(o + p * OUTPUTS, chunk), chunk, ahead<P>(o + p * OUTPUTS, chunk), panels[p]);
            // The last sums go where they belong: written between products, not all at once, they cost no time.
            const bool last = chunk + 1 == kind.n_chunks();
            all_rows<P>(chunk, kept, last && fit ? Sums{y + o, y_stride, OUTPUTS} : kept);
        }
        if (!fit)
            for (int p = 0; p < P; p++) store_sums(o + p * OUTPUTS, end, sums[p]);
    }

    template <int P>
    void all_rows(int64_t chunk, const Sums& from, const Sums& to) const {
        constexpr int MOST = Kind::most_rows(P);
        PanelChunk c{chunk, 0, from, to};
        for (; c.row + MOST <= rows; c.row += MOST) kind.template add<P, MOST>(panels, c);
        if constexpr (MOST > 8)
            if (c.row + 8 <= rows) kind.template add<P, 8>(panels, c), c.row += 8;
        if constexpr (MOST > 4)
            if (c.row + 4 <= rows) kind.template add<P, 4>(panels, c), c.row += 4;
        if (c.row + 2 <= rows) kind.template add<P, 2>(panels, c), c.row += 2;
        if (c.row < rows) kind.template add<P, 1>(panels, c);
    }

    void store_sums(int64_t o, int64_t end, const float (*of_rows)[OUTPUTS]) const {
        const int64_t skipped = o - first_output(o), count = std::min<int64_t>(OUTPUTS, end - o);
        for (int64_t r = 0; r < rows; r++)
            std::memcpy(y + r * y_stride + o, of_rows[r] + skipped, count * sizeof(float));
    }
};

// The loads and stores of sums around `add`: step(y) adds to them.
template <int P, int R, typename Step>
ANYMAMBA_INLINE void add_to_sums(const PanelChunk& c, Step step) {
    vfloat y[P][R];
#pragma GCC unroll 2
    for (int p = 0; p < P; p++)
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) y[p][r] = c.chunk == 0 ? vfloat{} : load<float>(c.from.at(c.row + r, p));
    step(y);
#pragma GCC unroll 2
    for (int p = 0; p < P; p++)
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) store(c.to.at(c.row + r, p), y[p][r]);
}

// Calls f(matrix) with the matrix or, if it has too few rows for a panel, with a copy that has enough. Of the further
// rows nothing is stored. `used` are the bytes of a row.
template <typename F>
void with_whole_panel(const Packed& w, int64_t used, F f) {
    if (w.n_out >= OUTPUTS) return f(w);
    Packed whole = w;
    std::vector<uint8_t> copy(OUTPUTS * w.row_bytes);
    std::memcpy(copy.data(), w.data, (w.n_out - 1) * w.row_bytes + used);
    whole.data = copy.data(), whole.n_out = OUTPUTS;
    f(whole);
}

// Multiplies all rows, PANEL_ROWS at once. kind_at(r) is the kind for the rows from r.
template <typename KindAt>
void multiply_by_panels(const Packed& w, const KindAt& kind_at, int64_t rows, float* y, int64_t y_stride, int64_t begin,
                        int64_t end) {
    for (int64_t r = 0; r < rows; r += PANEL_ROWS) {
        const auto kind = kind_at(r);
        PanelProduct<decltype(kind_at(r))>(kind, w, std::min(PANEL_ROWS, rows - r), y + r * y_stride, y_stride)
            .outputs(begin, end);
    }
}

}  // namespace anymamba::ANYMAMBA_ISA
