// One token of the selective scan for any numbers: the state goes in and the new state comes out.
//
// p.lanes lanes share the states of a channel, neighbouring lanes neighbouring states, so that the state is read and
// written in the order of its memory.
//
// Launch: 128 threads; the host gives a channel as many lanes (a power of two) as it has states for.
#include "general.cuh"

KERNEL(THREADS, 1) step(PARAMETER Parameters p) {
    const int lanes = int(p.lanes), part = threadIdx.x % lanes;
    const i64 index = (i64(blockIdx.x) * THREADS + threadIdx.x) / lanes;
    const bool inside = index < p.batch * p.d_inner;
    Place at;
    at.row = inside ? index / p.d_inner : 0, at.channel = inside ? index % p.d_inner : 0;
    at.group = at.channel / (p.d_inner / p.n_groups);
    const R d = delta_at(p, at, 0, 0), u = element(p.u, at, 0, 0);
    const i64 matrix = at.channel * p.d_state, state = (at.row * p.d_inner + at.channel) * p.d_state;
    const i64 row_B = at.row * p.B.batch + at.group * p.B.group, row_C = at.row * p.C.batch + at.group * p.C.group;
    const T *A = reinterpret_cast<const T*>(p.A) + matrix, *before = reinterpret_cast<const T*>(p.initial_state);
    T* after = reinterpret_cast<T*>(p.last_state) + state;
    R y = R(0);
    for (i64 n = part; inside && n < p.d_state; n += lanes) {
        const T rate = A[n], a = exponential(d * rate);
        const T B = p.B.data ? read_number(p.B.data, row_B + n, int(p.B.dtype))
                             : reinterpret_cast<const T*>(p.constant_B)[matrix + n];
        const T C = p.C.data ? read_number(p.C.data, row_C + n, int(p.C.dtype))
                             : reinterpret_cast<const T*>(p.constant_C)[matrix + n];
        const T h = a * (before ? before[state + n] : number(R(0))) + u * (weight(p, d, rate, a) * B);
        y += PAIR * real_part(C * h);
        after[n] = h;
    }
    for (int m = lanes / 2; m > 0; m /= 2) y += shuffle_xor(y, m);
    if (!inside || part > 0) return;
    if (p.D) y += reinterpret_cast<const R*>(p.D)[at.channel] * u;
    if (p.z.data) {
        const R z = element(p.z, at, 0, 0);
        y *= z * sigmoid(z);
    }
    put_element(p.y, at, 0, 0, y);
}
