// The gradient of an embedding: the sum of the vectors of all tokens that have an id, for each id, in float32.
//
//     sums[id] = sum over the tokens t with ids[t] = id of dy[t]
//
// Tokens come in the order of their ids, and those of an id in their own order. A thread has four numbers of the
// vectors of CHUNK tokens. A run of one id that begins and ends within a chunk is complete. The others have parts:
// `heads` has the sum of a chunk's first run, `tails` that of its last one, if that is another. `join_runs` adds up the
// parts of a run in their order. So the sums depend on nothing but the numbers, and no two threads write the same one.
//
// Launch: a thread for each chunk and vector of WIDTH numbers; ids without tokens keep what `sums` has.
//
// Needs DTYPE.
#include "device.cuh"

constexpr int THREADS = 128, WIDTH = 4, CHUNK = 64;  // cuda.THREADS, WIDTH and CHUNK
constexpr int AT_ONCE = 8, PARTS_AT_ONCE = 16;       // vectors that a thread asks for before it adds any

typedef ElementOf<DTYPE>::Type Element;

struct Matrix {  // (tokens, width); the last dimension is dense
    const Element* data;
    i64 row, dtype;
};
// All fields have 8 bytes; the order is that of cuda.TENSORS and cuda.FIELDS.
struct Parameters {
    Matrix dy;
    const i64* order;      // (tokens), the tokens in the order of their ids
    const int* ids;        // (tokens), in this order
    float *heads, *tails;  // (chunks, width), of whole vectors
    float* sums;           // (vocab, width)
    i64 tokens, width, n_chunks, vectors;
    i64 aligned;  // whether all rows are whole vectors at multiples of their size
};

// A thread's place, and what its chunk has.
struct Place {
    i64 chunk, column;
    i64 first, end;  // its tokens
    bool exists;

    DEVICE explicit Place(const Parameters& p) {
        const i64 index = i64(blockIdx.x) * THREADS + threadIdx.x;
        chunk = index / p.vectors, column = index % p.vectors * WIDTH;
        first = chunk * CHUNK, end = min(p.tokens, first + CHUNK);
        exists = chunk < p.n_chunks;
    }
};

DEVICE void add(float (&sums)[WIDTH], const float (&more)[WIDTH]) {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) sums[i] += more[i];
}

DEVICE void get_vector(float (&out)[WIDTH], const Element* from, const Parameters& p, i64 column) {
    if (p.aligned) {
        read<DTYPE>(out, from);
        return;
    }
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        float one[1] = {0.f};
        if (column + i < p.width) read<DTYPE>(one, from + i);
        out[i] = one[0];
    }
}

// A run's sum to its id. Vectors of `sums` are whole only if the width is a multiple of WIDTH.
DEVICE void put_sum(const Parameters& p, int id, i64 column, const float (&sums)[WIDTH]) {
    float* to = p.sums + id * p.width + column;
    if (p.width % WIDTH == 0) {
        write_whole<FLOAT32>(to, sums);
        return;
    }
#pragma unroll
    for (int i = 0; i < WIDTH; i++)
        if (column + i < p.width) to[i] = sums[i];
}

DEVICE float* part_of(float* parts, const Parameters& p, i64 chunk, i64 column) {
    return parts + chunk * p.vectors * WIDTH + column;
}

KERNEL(THREADS, 8) sum_runs(PARAMETER Parameters p) {
    let_next_start();
    wait_for_previous();
    const Place at(p);
    if (!at.exists) return;
    int id = p.ids[at.first];
    bool is_head = true;
    float sums[WIDTH] = {};
    for (i64 t = at.first; t < at.end; t += AT_ONCE) {
        const int left = int(min(at.end - t, i64(AT_ONCE)));
        float vectors[AT_ONCE][WIDTH];
        int own[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const i64 token = t + min(k, left - 1);
            own[k] = p.ids[token];
            get_vector(vectors[k], p.dy.data + p.order[token] * p.dy.row + at.column, p, at.column);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (k >= left) break;
            if (own[k] != id) {
                if (is_head)
                    write_whole<FLOAT32>(part_of(p.heads, p, at.chunk, at.column), sums);
                else
                    put_sum(p, id, at.column, sums);
                is_head = false, id = own[k];
#pragma unroll
                for (int i = 0; i < WIDTH; i++) sums[i] = 0.f;
            }
            add(sums, vectors[k]);
        }
    }
    write_whole<FLOAT32>(part_of(is_head ? p.heads : p.tails, p, at.chunk, at.column), sums);
}

// Adds the heads of the chunks after `chunk` that belong to a run of this id.
DEVICE void add_heads(float (&sums)[WIDTH], const Parameters& p, int id, i64 chunk, i64 column) {
    bool goes_on = true;
    for (i64 c = chunk + 1; goes_on && c < p.n_chunks; c += PARTS_AT_ONCE) {
        float parts[PARTS_AT_ONCE][WIDTH];
        bool belongs[PARTS_AT_ONCE];
#pragma unroll
        for (int k = 0; k < PARTS_AT_ONCE; k++) {
            const i64 one = min(c + k, p.n_chunks - 1);
            belongs[k] = c + k < p.n_chunks && p.ids[one * CHUNK] == id;
            read<FLOAT32>(parts[k], part_of(p.heads, p, one, column));
        }
#pragma unroll
        for (int k = 0; k < PARTS_AT_ONCE; k++)
            if (belongs[k]) add(sums, parts[k]);
        goes_on = belongs[PARTS_AT_ONCE - 1];
    }
}

// A thread joins the runs that begin in its chunk and have parts.
KERNEL(THREADS, 4) join_runs(PARAMETER Parameters p) {
    wait_for_previous();
    const Place at(p);
    if (!at.exists) return;
    const int first = p.ids[at.first], last = p.ids[at.end - 1];
    if (at.chunk == 0 || p.ids[at.first - 1] != first) {
        float sums[WIDTH];
        read<FLOAT32>(sums, part_of(p.heads, p, at.chunk, at.column));
        if (first == last) add_heads(sums, p, first, at.chunk, at.column);
        put_sum(p, first, at.column, sums);
    }
    if (first != last) {
        float sums[WIDTH];
        read<FLOAT32>(sums, part_of(p.tails, p, at.chunk, at.column));
        add_heads(sums, p, last, at.chunk, at.column);
        put_sum(p, last, at.column, sums);
    }
}
