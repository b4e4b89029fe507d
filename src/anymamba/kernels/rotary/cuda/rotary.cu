// Rotary positions of queries and keys that lie side by side with the values, and the way back for their gradients.
//
//     [a, b] -> [a cos - b sin, b cos + a sin]        for a in the first half of a head's channels and b in the second
//
// Forward, heads of `packed` (queries, then keys; values stay) are rotated into q and k. Backward, q, k and v have
// gradients, which go to `packed`: q and k are turned back, v is copied. Each number is read and written once.
#include "device.cuh"

constexpr int THREADS = 256, BYTES = 16, COUNT = BYTES / sizeof(ElementOf<DTYPE>::Type);  // elements at once

typedef ElementOf<DTYPE>::Type Element;

struct Heads {  // (batch, length, heads, channels); the last dimension is dense, and everything is aligned to 16 bytes
    Element* data;
    i64 row, time, head, dtype;
};
// All fields have 8 bytes; the order is that of cuda.TENSORS and cuda.FIELDS.
struct Parameters {
    Heads packed, q, k, v;
    const float *cosines, *sines;  // (positions, length, channels / 2)
    i64 rows, length, channels;
    i64 n_queries, n_keys;  // heads
    i64 apart;              // positions between two rows: 0 if all rows share them, else the length
    i64 backward;
};

DEVICE Element* at(const Heads& t, i64 row, i64 time, i64 head) {
    return t.data + row * t.row + time * t.time + head * t.head;
}

KERNEL(THREADS, 4) rotate(PARAMETER Parameters p) {
    let_next_start();
    wait_for_previous();
    const i64 index = i64(blockIdx.x) * THREADS + threadIdx.x;
    const u32 half = u32(p.channels) / 2, pieces = half / COUNT, n_rotated = u32(p.n_queries + p.n_keys);
    const u32 n_heads = p.backward ? u32(n_rotated + p.n_keys) : n_rotated;
    const u32 piece = u32(index) % pieces * COUNT, head = u32(index) / pieces % n_heads;
    const u32 token = u32(index) / pieces / n_heads, time = token % u32(p.length), row = token / u32(p.length);
    if (row >= p.rows) return;
    Element* packed = at(p.packed, row, time, head) + piece;
    Element* own = (head < p.n_queries ? at(p.q, row, time, head)
                    : head < n_rotated ? at(p.k, row, time, head - p.n_queries)
                                       : at(p.v, row, time, head - n_rotated)) +
                   piece;
    const Element* from = p.backward ? own : packed;
    Element* to = p.backward ? packed : own;
    float a[COUNT], b[COUNT];
    read<DTYPE>(a, from);
    read<DTYPE>(b, from + half);
    if (head < n_rotated) {
        const i64 angle = (i64(row) * p.apart + time) * half + piece;
        float cosine[COUNT], sine[COUNT];
        read<FLOAT32>(cosine, p.cosines + angle);
        read<FLOAT32>(sine, p.sines + angle);
        const float sign = p.backward ? -1.f : 1.f;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const float s = sign * sine[i], first = a[i], second = b[i];
            a[i] = first * cosine[i] - second * s, b[i] = second * cosine[i] + first * s;
        }
    }
    write<DTYPE>(to, a);
    write<DTYPE>(to + half, b);
}
