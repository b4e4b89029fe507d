// Products of floats with few columns, by panels of outputs: adding up vectors would take longer than multiplying.
//
// A word is what a lane holds of one output: a float32, a float16 as float32, or two adjacent bfloat16.
#pragma once

#include <algorithm>

#include "products_by_panel.h"
#include "products_floats.h"

namespace anymamba::ANYMAMBA_ISA {

constexpr int PANEL_WORDS = 128;
constexpr int64_t FEW_COLUMNS = 64;

// F is Float32, Float16 or BFloat16. `x` are the activations of the first row.
template <typename F>
struct WordPanels {
    struct Panel {
        vint words[PANEL_WORDS];
    };
    static constexpr bool WIDENED = sizeof(typename F::Weight) < sizeof(typename F::Activation);
    static constexpr int STEP_WORDS = WIDENED ? 8 : 4;  // in 16 bytes
    static constexpr int CHUNK_BYTES = PANEL_WORDS / STEP_WORDS * 16;
    static constexpr int MOST_PANELS = WIDE ? 2 : 1, FEW_ROWS = 1, DIRECT_ROWS = WIDE ? 8 : 1;
    static constexpr int most_rows(int) { return WIDE ? 12 : 8; }

    const char* x;
    int64_t x_bytes, row_bytes;  // of a row of activations, and of weights that are used

    const char* row(int64_t r) const { return x + r * x_bytes; }
    int64_t n_chunks() const { return (row_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES; }
    int64_t used_bytes(int64_t chunk) const { return std::min<int64_t>(CHUNK_BYTES, row_bytes - chunk * CHUNK_BYTES); }
    int n_words(int64_t chunk) const { return int((used_bytes(chunk) + 15) / 16) * STEP_WORDS; }

    // The words of 16 bytes of each row.
    ANYMAMBA_INLINE static void load_words(const PanelRows& rows, int64_t offset, vint* to) {
        if constexpr (WIDENED) {
            vint pairs[4];
            transpose16(rows, offset, pairs);
            for (int i = 0; i < 4; i++) {
                to[2 * i] = (vint)from_float16(narrow((vbits)pairs[i] & 0xffff));
                to[2 * i + 1] = (vint)from_float16(narrow((vbits)pairs[i] >> 16));
            }
        } else {
            transpose16(rows, offset, to);
        }
    }

    // Calls use(i, words) for words i to i + STEP_WORDS - 1.
    template <typename Use>
    ANYMAMBA_INLINE void for_words(const PanelRows& rows, int64_t chunk, const uint8_t* next, Use use) const {
        const int64_t size = used_bytes(chunk);
        Ahead ahead{next};
        vint words[STEP_WORDS];
        int64_t offset = 0;
        for (; offset + 16 <= size; offset += 16) {
            ahead.prefetch(16 * OUTPUTS);
            load_words(rows, offset, words);
            use(int(offset / 16) * STEP_WORDS, words);
        }
        if (offset == size) return;
        uint8_t last[OUTPUTS][16] = {};  // followed by zeros
        for (int i = 0; i < OUTPUTS; i++) std::memcpy(last[i], rows.row(i) + offset, size - offset);
        load_words(PanelRows(last[0], 16), 0, words);
        use(int(offset / 16) * STEP_WORDS, words);
    }

    void unpack(const PanelRows& rows, int64_t chunk, const uint8_t* next, Panel& panel) const {
        for_words(rows, chunk, next, [&](int i, const vint* words) ANYMAMBA_INLINE_LAMBDA {
            for (int k = 0; k < STEP_WORDS; k++) panel.words[i + k] = words[k];
        });
    }

    template <int P, int R>
    ANYMAMBA_INLINE void add(const Panel* panels, const PanelChunk& c) const {
        const char* const from = row(c.row) + c.chunk * PANEL_WORDS * 4;
        add_to_sums<P, R>(c, [&](vfloat(&y)[P][R]) ANYMAMBA_INLINE_LAMBDA {
            for (int i = 0, n = n_words(c.chunk); i < n; i++) {
                vint w[P];
#pragma GCC unroll 2
                for (int p = 0; p < P; p++) w[p] = panels[p].words[i];
#pragma GCC unroll 12
                for (int r = 0; r < R; r++) {
                    const vint word = broadcast_int(from + r * x_bytes + 4 * i);
#pragma GCC unroll 2
                    for (int p = 0; p < P; p++) y[p][r] = F::multiply_add_words(y[p][r], w[p], word);
                }
            }
        });
    }

    template <int R>
    ANYMAMBA_INLINE void add_directly(const PanelRows& rows, int64_t chunk, const uint8_t* next,
                                      const char* const (&x)[R], vfloat (&y)[1][R]) const {
        for_words(rows, chunk, next, [&](int i, const vint* words) ANYMAMBA_INLINE_LAMBDA {
#pragma GCC unroll 8
            for (int k = 0; k < STEP_WORDS; k++)
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    const vint word = broadcast_int(x[r] + 4 * (chunk * PANEL_WORDS + i + k));
                    y[0][r] = F::multiply_add_words(y[0][r], words[k], word);
                }
        });
    }
};

template <typename F>
void word_product(const Packed& w, const void* activations, int64_t rows, float* y, int64_t y_stride, int64_t begin,
                  int64_t end) {
    const int64_t x_bytes = activation_row_bytes(w.type(), w.n_in), used = w.n_in * int64_t(sizeof(typename F::Weight));
    const auto* x = static_cast<const char*>(activations);
    const auto kind_at = [&](int64_t r) { return WordPanels<F>{x + r * x_bytes, x_bytes, used}; };
    with_whole_panel(w, used,
                     [&](const Packed& whole) { multiply_by_panels(whole, kind_at, rows, y, y_stride, begin, end); });
}

}  // namespace anymamba::ANYMAMBA_ISA
