// The norm of a sum for one instruction set: forward and backward. A task is a chunk of rows.
//
// A row is added up and rounded to the dtype of the sum once, into memory that stays in the first-level cache.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "scratch.h"
#include "simd.h"
#include "threads.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

// Reads and writes one row after the other. If PLAIN, all rows have the dtype T, which is known when this is compiled.
template <typename T, bool PLAIN>
class Row {
    static constexpr int W = LANES<T>, WAYS = 4;
    using V = Vector<T>;

  public:
    using Number = T;
    explicit Row(const NormArgs& a) : a(a), sums_(whole(a.size)), products_(whole(a.size)) {}

    void forward(int64_t r) {
        add_up(r);
        if (a.residual.data) each([&](int64_t i, int count) { write(a.total, r, i, count, sum(i, count)); });
        const T mean = a.subtract_mean ? total([&](int64_t i, int count) { return sum(i, count); }) / T(a.size) : T(0);
        const T squares = total([&](int64_t i, int count) {
            const V v = first_lanes(sum(i, count) - mean, count);
            return v * v;
        });
        const T scale = T(1) / std::sqrt(squares / T(a.size) + T(a.eps));
        each([&](int64_t i, int count) {
            V y = (sum(i, count) - mean) * scale;
            if (a.weight) y *= vector(a.weight, i, count);
            if (a.bias) y += vector(a.bias, i, count);
            write(a.y, r, i, count, y);
        });
        if (!a.statistics) return;
        statistics(0)[r] = scale;
        if (a.subtract_mean) statistics(1)[r] = mean;
    }

    // With n = (sum - mean) scale and g = dy weight, the gradient of the sum is scale (g - mean(g) - n mean(g n)).
    void backward(int64_t r, T* dweight, T* dbias) {
        add_up(r);
        const T scale = statistics(0)[r], mean = a.subtract_mean ? statistics(1)[r] : T(0);
        const auto normed = [&](int64_t i, int count) { return (sum(i, count) - mean) * scale; };
        const auto gradient = [&](int64_t i, int count) { return load<T>(products_.get() + i); };
        each([&](int64_t i, int count) {
            const V dy = read(a.dy, r, i, count), n = normed(i, count);
            if (dweight) add(dweight, i, count, dy * n);
            if (dbias) add(dbias, i, count, dy);
            store<T>(products_.get() + i, a.weight ? dy * vector(a.weight, i, count) : dy);
        });
        const T along = total([&](int64_t i, int count) { return gradient(i, count) * normed(i, count); }) / T(a.size);
        const T common = a.subtract_mean ? total(gradient) / T(a.size) : T(0);
        each([&](int64_t i, int count) {
            V d = (gradient(i, count) - common - normed(i, count) * along) * scale;
            if (a.dtotal.data) d += read(a.dtotal, r, i, count);
            write(a.dx, r, i, count, d);
            if (a.dresidual.data) write(a.dresidual, r, i, count, d);
        });
    }

  private:
    const NormArgs& a;
    const Scratch<T> sums_, products_;

    static int64_t whole(int64_t size) { return (size + W - 1) / W * W; }
    static DType type(const Rows& rows) { return PLAIN ? OWN_DTYPE<T> : rows.type(); }
    ANYMAMBA_INLINE static V read(const Rows& rows, int64_t r, int64_t i, int count) {
        return read_row<T>(rows.data, type(rows), rows.at(0, r) + i, count);
    }
    ANYMAMBA_INLINE static void write(const Rows& rows, int64_t r, int64_t i, int count, V v) {
        write_row<T>(rows.data, type(rows), rows.at(0, r) + i, count, v);
    }
    ANYMAMBA_INLINE static V vector(const void* data, int64_t i, int count) {
        return read_row<T>(data, OWN_DTYPE<T>, i, count);
    }
    ANYMAMBA_INLINE static void add(T* to, int64_t i, int count, V v) {
        write_row<T>(to, OWN_DTYPE<T>, i, count, vector(to, i, count) + v);
    }
    ANYMAMBA_INLINE static V first_lanes(V v, int count) {
        for (int lane = count; lane < W; lane++) v[lane] = 0;
        return v;
    }
    T* statistics(int which) const { return static_cast<T*>(a.statistics) + which * a.rows; }

    ANYMAMBA_INLINE V sum(int64_t i, int) const { return load<T>(sums_.get() + i); }

    // x + residual, in the dtype of the sum, followed by zeros up to a whole vector.
    void add_up(int64_t r) {
        const auto dtype = PLAIN ? OWN_DTYPE<T> : static_cast<DType>(a.total_dtype);
        each([&](int64_t i, int count) {
            V v = read(a.x, r, i, count);
            if (a.residual.data) v += read(a.residual, r, i, count);
            if (dtype != OWN_DTYPE<T>) {
                alignas(64) char bytes[sizeof(V)];
                write_row<T>(bytes, dtype, 0, count, v);
                v = read_row<T>(bytes, dtype, 0, count);
            }
            store<T>(sums_.get() + i, v);
        });
    }

    template <typename F>
    ANYMAMBA_INLINE void each(const F& f) const {
        int64_t i = 0;
        for (; i + W <= a.size; i += W) f(i, W);
        if (i < a.size) f(i, int(a.size - i));
    }

    // The sum of f over the row, whose order depends only on the size.
    template <typename F>
    ANYMAMBA_INLINE T total(const F& f) const {
        V parts[WAYS] = {};
        int64_t i = 0;
        for (; i + WAYS * W <= a.size; i += WAYS * W)
            for (int k = 0; k < WAYS; k++) parts[k] += f(i + k * W, W);
        for (; i + W <= a.size; i += W) parts[0] += f(i, W);
        if (i < a.size) parts[1] += f(i, int(a.size - i));
        T lanes[W];
        store<T>(lanes, (parts[0] + parts[1]) + (parts[2] + parts[3]));
        return sum_of_lanes<T, W>(lanes);
    }
};

// Calls work(row, first, last, chunk) for each chunk of rows.
template <typename Work>
void for_chunks(const NormArgs& a, const Work& work) {
    const auto run = [&](auto row_of) {
        parallel_for((a.rows + a.chunk - 1) / a.chunk, a.n_threads, [&](int64_t i) {
            typename decltype(row_of)::type row(a);
            work(row, i * a.chunk, std::min(a.rows, (i + 1) * a.chunk), i);
        });
    };
    struct OfDoubles {
        using type = Row<double, false>;
    };
    struct OfFloats {
        using type = Row<float, true>;
    };
    struct OfAny {
        using type = Row<float, false>;
    };
    if (a.is_double) return run(OfDoubles{});
    a.is_plain ? run(OfFloats{}) : run(OfAny{});
}

}  // namespace

void norm_forward(const NormArgs& a) {
    for_chunks(a, [](auto& row, int64_t first, int64_t last, int64_t) {
        for (int64_t r = first; r < last; r++) row.forward(r);
    });
}

void norm_backward(const NormArgs& a) {
    for_chunks(a, [&](auto& row, int64_t first, int64_t last, int64_t part) {
        using T = typename std::remove_reference_t<decltype(row)>::Number;
        const auto of_part = [&](void* parts) { return parts ? static_cast<T*>(parts) + part * a.size : nullptr; };
        for (int64_t r = first; r < last; r++) row.backward(r, of_part(a.dweight_parts), of_part(a.dbias_parts));
    });
}

}  // namespace anymamba::ANYMAMBA_ISA
