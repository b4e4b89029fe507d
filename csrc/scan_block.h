// The recurrence of one block of channels in one tile of time, forwards and backwards: the inner loops of the scan.
// See scan.cpp for the notation.
#pragma once

#include "simd.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

// One block in one tile.
template <typename T>
struct Block {
    int64_t channel;  // the first channel
    int count;        // number of channels; the lanes after them are padding
    int d_state;
    bool zoh, selective_B, selective_C;
    bool inside;                       // whether all exponents delta A of the tile are moderate
    const T *B, *C;                    // selective: (step, n)
    const T *constant_B, *constant_C;  // (n, lane)
    const T *high, *low, *rate;        // A in the form for exp_product, and A itself (n, lane)
    T *delta, *drive, *y;              // rows; drive is delta u
    T* h;                              // (n, lane)
    const char* ahead[4];              // rows of the next block, to prefetch
    int64_t ahead_stride[4];           // in bytes, from step to step
    // backward
    T *decay, *before;        // exp(delta A) and the state before the step (step, n, lane)
    T *dh, *dA;               // (n, lane)
    T *dy, *ddelta, *ddrive;  // rows
    T *dB, *dC;               // sums over blocks: (step, n, lane) if selective, else (n, lane)

    // The same block from state n on.
    Block from(int n) const {
        constexpr int W = LANES<T>;
        Block k = *this;
        k.B += n, k.C += n;
        for (auto* matrix : {&k.constant_B, &k.constant_C, &k.high, &k.low, &k.rate})
            if (*matrix) *matrix += n * W;
        for (auto* matrix : {&k.h, &k.decay, &k.before, &k.dh, &k.dA, &k.dB, &k.dC})
            if (*matrix) *matrix += n * W;
        return k;
    }
};

// ---------------------------------------------------------------------------------------------- the recurrence

// Runs the first NB states of k over steps [first, last). GENERAL: zero-order hold, or constant B or C. KEEP: store
// decays and states for backward. INSIDE: no exponent of the tile is too large for exp_product_inside. OUTPUT: compute
// y.
template <typename T, int NB, bool GENERAL, bool KEEP, bool INSIDE, bool OUTPUT>
__attribute__((noinline)) void run_states(const Block<T>& k, int first, int last) {
    constexpr int W = LANES<T>;
    using V = Vector<T>;
    const Powers<T> powers;
    const T *const high = k.high, *const low = k.low, *const deltas = k.delta, *const drives = k.drive;
    T *const ys = k.y, *const kept_decay = k.decay, *const kept_before = k.before;
    const int64_t d_state = k.d_state;
    V h[NB];
#pragma GCC unroll 16
    for (int n = 0; n < NB; n++) h[n] = load<T>(k.h + n * W);
    for (int64_t t = first; t < last; t++) {
        const V delta = load<T>(deltas + t * W), drive = load<T>(drives + t * W);
        const T *const b = k.B + t * d_state, *const c = k.C + t * d_state;
        V y[2] = {};  // D u is added at the end: a large D u would round every addition
        for (int i = 0; i < 4; i++) __builtin_prefetch(k.ahead[i] + t * k.ahead_stride[i]);
#pragma GCC unroll 16
        for (int n = 0; n < NB; n++) {
            const V rate = load<T>(high + n * W), rest = load<T>(low + n * W);
            const V decay =
                INSIDE ? exp_product_inside(delta, rate, rest, powers) : exp_product(delta, rate, rest, powers);
            if (KEEP) {
                store<T>(kept_decay + (t * d_state + n) * W, decay);
                store<T>(kept_before + (t * d_state + n) * W, h[n]);
            }
            if (GENERAL) {
                V input = drive * (k.selective_B ? broadcast(b[n]) : load<T>(k.constant_B + n * W));
                if (k.zoh) input *= expm1_ratio(delta, rate, rest);
                h[n] = decay * h[n] + input;
                if (OUTPUT) y[n % 2] += h[n] * (k.selective_C ? broadcast(c[n]) : load<T>(k.constant_C + n * W));
            } else {
                h[n] = decay * h[n] + drive * b[n];
                if (OUTPUT) y[n % 2] += h[n] * c[n];
            }
        }
        if (OUTPUT) store<T>(ys + t * W, load<T>(ys + t * W) + (y[0] + y[1]));
    }
#pragma GCC unroll 16
    for (int n = 0; n < NB; n++) store<T>(k.h + n * W, h[n]);
}

// The gradients of all inputs of the first NB states of k, over steps [first, last) backwards.
template <typename T, int NB, bool GENERAL>
__attribute__((noinline)) void run_states_back(const Block<T>& k, int first, int last) {
    constexpr int W = LANES<T>;
    using V = Vector<T>;
    const T *const rates = k.rate, *const kept_decay = k.decay, *const kept_before = k.before;
    T *const dBs = k.dB, *const dCs = k.dC;
    const int64_t d_state = k.d_state;
    V dh[NB], dA[NB];
#pragma GCC unroll 16
    for (int n = 0; n < NB; n++) {
        dh[n] = load<T>(k.dh + n * W);
        dA[n] = load<T>(k.dA + n * W);
    }
    for (int64_t t = last - 1; t >= first; t--) {
        const V delta = load<T>(k.delta + t * W), drive = load<T>(k.drive + t * W), dy = load<T>(k.dy + t * W);
        const T *const B = k.B + t * d_state, *const C = k.C + t * d_state;
        V ddelta = load<T>(k.ddelta + t * W), ddrive = load<T>(k.ddrive + t * W);
#pragma GCC unroll 16
        for (int n = 0; n < NB; n++) {
            const int64_t kept = (t * d_state + n) * W;
            const V decay = load<T>(kept_decay + kept), before = load<T>(kept_before + kept),
                    A = load<T>(rates + n * W);
            V b = broadcast(B[n]), c = broadcast(C[n]), ratio;
            if (GENERAL) {
                if (!k.selective_B) b = load<T>(k.constant_B + n * W);
                if (!k.selective_C) c = load<T>(k.constant_C + n * W);
                ratio = k.zoh ? expm1_ratio(delta, load<T>(k.high + n * W), load<T>(k.low + n * W)) : broadcast(T(1));
            }
            dh[n] += c * dy;
            const V weight = GENERAL ? b * ratio : b, input = GENERAL ? drive * ratio : drive;
            const V h = decay * before + drive * weight;
            T* const dC = dCs + (!GENERAL || k.selective_C ? kept : n * W);
            T* const dB = dBs + (!GENERAL || k.selective_B ? kept : n * W);
            store<T>(dC, load<T>(dC) + dy * h);
            store<T>(dB, load<T>(dB) + dh[n] * input);
            ddrive += dh[n] * weight;
            V dexponent = dh[n] * decay;  // also the gradient of the state before this step
            const V dbefore = dexponent;
            dexponent *= before;
            if (GENERAL && k.zoh) {
                const V argument = delta * A, dratio = dh[n] * b * drive;
                for (int i = 0; i < W; i++) dexponent[i] += dratio[i] * expm1_ratio_derivative<T>(argument[i]);
            }
            ddelta += dexponent * A;
            dA[n] += dexponent * delta;
            dh[n] = dbefore;
        }
        store<T>(k.ddelta + t * W, ddelta);
        store<T>(k.ddrive + t * W, ddrive);
    }
#pragma GCC unroll 16
    for (int n = 0; n < NB; n++) {
        store<T>(k.dh + n * W, dh[n]);
        store<T>(k.dA + n * W, dA[n]);
    }
}

// Only the gradient of the states, backwards: a chunk passes it to the previous chunk.
template <typename T>
void run_dstate(const Block<T>& k, int first, int last) {
    constexpr int W = LANES<T>;
    using V = Vector<T>;
    const Powers<T> powers;
    for (int n = 0; n < k.d_state; n++) {
        const V high = load<T>(k.high + n * W), low = load<T>(k.low + n * W);
        V dh = load<T>(k.dh + n * W);
        for (int64_t t = last - 1; t >= first; t--) {
            const V C = k.selective_C ? broadcast(k.C[t * k.d_state + n]) : load<T>(k.constant_C + n * W);
            const V delta = load<T>(k.delta + t * W);
            const V decay =
                k.inside ? exp_product_inside(delta, high, low, powers) : exp_product(delta, high, low, powers);
            dh = (dh + C * load<T>(k.dy + t * W)) * decay;
        }
        store<T>(k.dh + n * W, dh);
    }
}

// decays *= exp(A times the sum of delta over steps [first, last)); the sum (lane) is added to sums.
template <typename T>
void run_decay(const Block<T>& k, T* decays, T* sums, int first, int last) {
    constexpr int W = LANES<T>;
    Vector<T> sum{};
    for (int64_t t = first; t < last; t++) sum += load<T>(k.delta + t * W);
    store<T>(sums, load<T>(sums) + sum);
    const Powers<T> powers;
    for (int n = 0; n < k.d_state; n++)
        store<T>(decays + n * W,
                 load<T>(decays + n * W) * exp_product(sum, load<T>(k.high + n * W), load<T>(k.low + n * W), powers));
}

template <typename T, bool KEEP, bool INSIDE, bool OUTPUT>
void run_tile(const Block<T>& k, int first, int last) {
    constexpr int MOST = sizeof(T) == 4 ? REGISTERS / 2 : 4;
    int n = 0;
    if (k.zoh || !k.selective_B || !k.selective_C) {
        for (; n + 4 <= k.d_state; n += 4) run_states<T, 4, true, KEEP, INSIDE, OUTPUT>(k.from(n), first, last);
        for (; n < k.d_state; n++) run_states<T, 1, true, KEEP, INSIDE, OUTPUT>(k.from(n), first, last);
        return;
    }
    for (; n + MOST <= k.d_state; n += MOST) run_states<T, MOST, false, KEEP, INSIDE, OUTPUT>(k.from(n), first, last);
    if constexpr (MOST > 8)
        for (; n + 8 <= k.d_state; n += 8) run_states<T, 8, false, KEEP, INSIDE, OUTPUT>(k.from(n), first, last);
    for (; n + 4 <= k.d_state; n += 4) run_states<T, 4, false, KEEP, INSIDE, OUTPUT>(k.from(n), first, last);
    for (; n < k.d_state; n++) run_states<T, 1, false, KEEP, INSIDE, OUTPUT>(k.from(n), first, last);
}

template <typename T, bool KEEP, bool OUTPUT = true>
void run(const Block<T>& k, int first, int last) {
    k.inside ? run_tile<T, KEEP, true, OUTPUT>(k, first, last) : run_tile<T, KEEP, false, OUTPUT>(k, first, last);
}

template <typename T>
void run_back(const Block<T>& k, int first, int last) {
    constexpr int MOST = sizeof(T) == 4 ? REGISTERS / 4 : 4;
    int n = 0;
    if (k.zoh || !k.selective_B || !k.selective_C) {
        for (; n + 4 <= k.d_state; n += 4) run_states_back<T, 4, true>(k.from(n), first, last);
        for (; n < k.d_state; n++) run_states_back<T, 1, true>(k.from(n), first, last);
        return;
    }
    for (; n + MOST <= k.d_state; n += MOST) run_states_back<T, MOST, false>(k.from(n), first, last);
    for (; n + 4 <= k.d_state; n += 4) run_states_back<T, 4, false>(k.from(n), first, last);
    for (; n < k.d_state; n++) run_states_back<T, 1, false>(k.from(n), first, last);
}

}  // namespace
}  // namespace anymamba::ANYMAMBA_ISA
