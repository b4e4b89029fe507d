// Products with a gate, and their gradients: numbers are read and written once.
//
//     y = x f(g)        dx = dy f(g),   dg = dy x f'(g)
//
// for f the identity, silu, the tanh form of gelu, or the sigmoid. x and g may be parts of wider tensors. Without an
// address of g it lies behind x in each row, and its gradient behind that of x.
#include "device.cuh"

constexpr int THREADS = 256, BYTES = 16, COUNT = BYTES / sizeof(ElementOf<DTYPE>::Type);  // elements at once
constexpr int AT_ONCE = 2;                                                                // pieces of a thread
constexpr int IDENTITY = 0, SILU = 1, GELU = 2, SIGMOID = 3;                              // cuda.FUNCTIONS

typedef ElementOf<DTYPE>::Type Element;

struct Rows {  // (rows, width); the last dimension is dense, and everything is aligned to 16 bytes
    Element* data;
    i64 row, dtype;
};
// All fields have 8 bytes; the order is that of cuda.TENSORS and cuda.FIELDS.
struct Parameters {
    Rows x, g, y;
    Rows dy, dx, dg;
    i64 rows, pieces, function;  // pieces of COUNT elements of a row
};

// f at g and its derivative.
struct Gate {
    float value, slope;

    DEVICE Gate(float g, i64 function) : value(g), slope(1.f) {
        if (function == IDENTITY) return;
        constexpr float scale = 1.5957691216057308f, cubic = 0.044715f;                    // 2 sqrt(2 / pi)
        const float near = g < -64.f ? -64.f : g > 64.f ? 64.f : g, square = near * near;  // else the sigmoid is 0 or 1
        const float inner = function == GELU ? scale * near * fmaf(cubic, square, 1.f) : g;
        const float s = sigmoid_fast(inner), turn = s * (1.f - s);
        value = function == SIGMOID ? s : g * s;
        slope = function == SIGMOID ? turn
                : function == SILU  ? fmaf(g, turn, s)
                                    : fmaf(near * scale * fmaf(3.f * cubic, square, 1.f), turn, s);
    }
};

DEVICE Element* piece_of(const Rows& t, const Parameters& p, i64 index) {
    return t.data + i64(u32(index) / u32(p.pieces)) * t.row + i64(u32(index) % u32(p.pieces)) * COUNT;
}

// The second operand, or what lies behind the first one.
DEVICE Rows second_of(const Rows& first, const Rows& second, const Parameters& p) {
    if (second.data) return second;
    return Rows{first.data + p.pieces * COUNT, first.row, first.dtype};
}

KERNEL(THREADS, 4) gate(PARAMETER Parameters p) {
    let_next_start();
    wait_for_previous();
    const i64 first = i64(blockIdx.x) * (THREADS * AT_ONCE) + threadIdx.x, n = p.rows * p.pieces;
    float x[AT_ONCE][COUNT], g[AT_ONCE][COUNT];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
        if (first + i * THREADS >= n) break;
        read<DTYPE>(x[i], piece_of(p.x, p, first + i * THREADS));
        read<DTYPE>(g[i], piece_of(p.g, p, first + i * THREADS));
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
        if (first + i * THREADS >= n) break;
#pragma unroll
        for (int j = 0; j < COUNT; j++) x[i][j] *= Gate(g[i][j], p.function).value;
        write<DTYPE>(piece_of(p.y, p, first + i * THREADS), x[i]);
    }
}

KERNEL(THREADS, 4) gate_gradients(PARAMETER Parameters p) {
    let_next_start();
    wait_for_previous();
    const Rows given = second_of(p.x, p.g, p), made = second_of(p.dx, p.dg, p);
    const i64 first = i64(blockIdx.x) * (THREADS * AT_ONCE) + threadIdx.x, n = p.rows * p.pieces;
    float x[AT_ONCE][COUNT], g[AT_ONCE][COUNT], dy[AT_ONCE][COUNT];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
        if (first + i * THREADS >= n) break;
        read<DTYPE>(x[i], piece_of(p.x, p, first + i * THREADS));
        read<DTYPE>(g[i], piece_of(given, p, first + i * THREADS));
        read<DTYPE>(dy[i], piece_of(p.dy, p, first + i * THREADS));
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
        if (first + i * THREADS >= n) break;
#pragma unroll
        for (int j = 0; j < COUNT; j++) {
            const Gate f(g[i][j], p.function);
            g[i][j] = dy[i][j] * x[i][j] * f.slope;
            x[i][j] = dy[i][j] * f.value;
        }
        write<DTYPE>(piece_of(p.dx, p, first + i * THREADS), x[i]);
        write<DTYPE>(piece_of(made, p, first + i * THREADS), g[i]);
    }
}
