// What CUDA C++ has no word for: approximate functions, asynchronous copies, barriers between warps, short floats.
//
// Kernels use these names only, so that the tests can run them without a GPU: there ANYMAMBA_EMULATED is defined and a
// header of the tests gives the same names other bodies.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// For compute-sanitizer: racecheck does not follow what a warp's synchronisation orders, so every lane arrives at a
// barrier, and synccheck wants every phase of a barrier to be waited for.
#ifdef ANYMAMBA_CHECKED
constexpr bool CHECKED = true;
#else
constexpr bool CHECKED = false;
#endif

#ifdef ANYMAMBA_EMULATED
#include "emulated.h"
#else

#define DEVICE __device__ __forceinline__
#define CALLED __device__ __noinline__  // large and rare: inlined it would only cost compilation
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#if __CUDA_ARCH__ >= 900
constexpr bool CLUSTERS = true;
#define CLUSTERED_KERNEL(cluster, threads, blocks) \
    extern "C" __global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(threads, blocks)
#else
constexpr bool CLUSTERS = false;
#define CLUSTERED_KERNEL(cluster, threads, blocks) KERNEL(threads, blocks)
#endif
#define PARAMETER const __grid_constant__

DEVICE u8* shared_memory() {
    extern __shared__ __align__(128) u8 memory_of_block[];
    return memory_of_block;
}

// ------------------------------------------------------------------------------------------------ functions
// At most two units in the last place; denormals are flushed to zero.

DEVICE float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
DEVICE float reciprocal_fast(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// ------------------------------------------------------------------------------------------------ warps

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
// `threads` threads of a block, whole warps, wait for each other; each such group has a number from 1 to 15.
DEVICE void sync_part(int number, int threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
// `cluster` neighbouring blocks of a CLUSTERED_KERNEL run at the same time where there are CLUSTERS; elsewhere each
// block is alone. They can wait for each other, and read each other's shared memory: what this block has at `own`.
#if __CUDA_ARCH__ >= 900
DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}
// Before the end: the memory of a block that has ended cannot be read. What this block has read must have been used.
DEVICE void leave_cluster() { asm volatile("barrier.cluster.arrive.relaxed; barrier.cluster.wait;" ::: "memory"); }
#else
DEVICE void sync_cluster() { sync_block(); }
DEVICE void leave_cluster() {}
#endif
template <typename T>
DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
template <typename T>
DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
DEVICE int first_bit(u32 bits) { return __ffs(int(bits)) - 1; }  // -1 where there is none
DEVICE int last_bit(u32 bits) { return 31 - __clz(int(bits)); }
DEVICE u32 ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }

// p + a * b, of numbers that are not negative: one instruction, if the compiler may not widen a.
DEVICE const u8* advance(const u8* p, int a, int b) {
    const u8* r;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(r) : "r"(a), "r"(b), "l"(p));
    return r;
}

// Have the compiler keep a value: where registers are short it would compute it again each time.
DEVICE void keep(const u8*& p) { asm volatile("" : "+l"(p)); }
DEVICE void keep(int& x) { asm volatile("" : "+r"(x)); }

// 8 or 16 bytes to global memory at once; of the same assignment the compiler may make two or four.
DEVICE void write_8_bytes(void* global, uint2 v) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(global), "r"(v.x), "r"(v.y) : "memory");
}
DEVICE void write_16_bytes(float* global, float4 v) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}

DEVICE u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }
#if __CUDA_ARCH__ >= 900
DEVICE uint2 read_of_block(const uint2* own, int block) {
    uint2 v;
    asm volatile("{.reg .u32 a; mapa.shared::cluster.u32 a, %2, %3; ld.shared::cluster.v2.u32 {%0, %1}, [a];}"
                 : "=r"(v.x), "=r"(v.y)
                 : "r"(shared_address(own)), "r"(block)
                 : "memory");
    return v;
}
#else
DEVICE uint2 read_of_block(const uint2* own, int) { return *own; }
#endif

// A barrier in shared memory that one warp passes on and another waits for; its phases alternate in parity.
typedef u64 Barrier;
constexpr int ARRIVALS = CHECKED ? 32 : 1;
DEVICE void start_barrier(Barrier* b) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "n"(ARRIVALS) : "memory");
}
DEVICE void arrive(Barrier* b) {
    asm volatile("{.reg .b64 s; mbarrier.arrive.shared.b64 s, [%0];}" ::"r"(shared_address(b)) : "memory");
}
DEVICE void wait(const Barrier* b, u32 parity) {
#if __CUDA_ARCH__ >= 900
#define ANYMAMBA_TRY "mbarrier.try_wait.parity.shared.b64"
#else
#define ANYMAMBA_TRY "mbarrier.test_wait.parity.shared.b64"
#endif
    asm volatile("{.reg .pred p; AGAIN: " ANYMAMBA_TRY
                 " p, [%0], %1; @p bra.uni DONE; bra.uni AGAIN; DONE:}" ::"r"(shared_address(b)),
                 "r"(parity)
                 : "memory");
#undef ANYMAMBA_TRY
}

// ------------------------------------------------------------------------------------------------ kernels that overlap
// A kernel that is launched early starts while the previous one runs. Until it has waited it may only touch what no
// kernel before it writes, such as weights.

DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may start now, if it is launched early.
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Four floats that an earlier kernel wrote. They are not put into the multiprocessor's cache, so it never holds older
// ones.
DEVICE float4 read_fresh(const float* global) {
    float4 v;
    asm volatile("ld.global.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(global)
                 : "memory");
    return v;
}
DEVICE float read_one_fresh(const float* global) {
    float v;
    asm volatile("ld.global.L1::no_allocate.f32 %0, [%1];" : "=f"(v) : "l"(global) : "memory");
    return v;
}
// The same, of what is read and written once a step and is more than the GPU's cache holds: it leaves that cache first,
// and what else is there stays.
DEVICE u64 leaves_first() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
DEVICE float4 read_streamed(const float* global) {
    float4 v;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(global), "l"(leaves_first())
                 : "memory");
    return v;
}
DEVICE void write_streamed(float* global, float4 v) {
    asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(global), "f"(v.x), "f"(v.y),
                 "f"(v.z), "f"(v.w), "l"(leaves_first())
                 : "memory");
}
// What an earlier kernel wrote, past the cache of the multiprocessor as well; the compiler may move it up to the wait.
template <typename T>
DEVICE T read_ahead(const T* global) {
    return __ldcg(global);
}
// 16 bytes of weights, which are read once: they do not stay in the multiprocessor's cache.
DEVICE uint4 read_once(const void* global) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global));
    return v;
}

// ------------------------------------------------------------------------------------------------ copies
// From global to shared memory; zeros where `ok` is false, and nothing is read then.

DEVICE void copy_16_bytes(void* shared, const void* global, bool ok) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(ok ? 16 : 0)
                 : "memory");
}
DEVICE void copy_16_bytes(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
DEVICE void copy_8_bytes(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
DEVICE void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All copies but those of the last N groups have arrived, for the thread that asked for them.
template <int N>
DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
DEVICE void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// ------------------------------------------------------------------------------------------------ short floats

DEVICE float bits_as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 float_as_bits(float x) { return __float_as_uint(x); }
DEVICE float half_as_float(u16 bits) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
    return r;
}
DEVICE u16 float_as_half(float x) {
    u16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
}
// Two bfloat16 or float16 in one word, the first in its low half.
DEVICE u32 floats_as_bfloats(float first, float second) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
    return r;
}
DEVICE u32 floats_as_halves(float first, float second) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
    return r;
}
// a + b, of two bfloat16 each.
DEVICE u32 add_bfloats(u32 a, u32 b) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3f803f80u), "r"(b));
    return r;
}
// Four bytes of the eight in a and b (0 to 3 and 4 to 7), one for each hexadecimal digit of `select`, lowest first.
DEVICE u32 permute_bytes(u32 a, u32 b, u32 select) { return __byte_perm(a, b, select); }
// The low word of high:low, shifted right by 0 to 31 bits.
DEVICE u32 shift_words(u32 low, u32 high, u32 bits) { return __funnelshift_r(low, high, bits); }

// ------------------------------------------------------------------------------------------------ matrices

// sums += a b of bfloat16 matrices, 16 x 16 by 16 x 8, by the 32 lanes of a warp. With g = lane / 4 and t = lane % 4:
// sums are (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1); each word of a and b is two neighbours along their
// common dimension: a has (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), and b has (2t, g), (2t + 8, g).
DEVICE void multiply_tiles(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane 8 i + r gives the address of row r of matrix i, of 16
// bytes. Of matrix i a lane gets (g, 2t) and (g, 2t + 1), or, transposed, (2t, g) and (2t + 1, g).
DEVICE void load_tiles(u32 (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void load_tiles_transposed(u32 (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// Of two matrices; the upper 16 lanes' addresses are not used.
DEVICE void load_tiles_transposed(u32 (&words)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(shared_address(row))
                 : "memory");
}

#endif  // ANYMAMBA_EMULATED

// Waits if `is_known`, which is always true: so what it depends on is computed before. The compiler would wait first,
// and divide when the memory is idle.
DEVICE void wait_for_previous(bool is_known) {
    if (is_known) wait_for_previous();
}

// What the lanes of a warp have written is there.
DEVICE void pass_on(Barrier* b, int lane) {
    sync_warp();
    if (CHECKED || lane == 0) arrive(b);
}

// ------------------------------------------------------------------------------------------------ elements
// Of tensors: the numbers of nvrtc.DTYPES.

constexpr int FLOAT32 = 0, FLOAT64 = 1, BFLOAT16 = 2, FLOAT16 = 3;

template <int TYPE>
struct ElementOf {
    typedef u16 Type;
};
template <>
struct ElementOf<FLOAT32> {
    typedef float Type;
};

// `count` neighbouring elements (1, 2 or a multiple of 4) as floats, from and to memory that is aligned to their size.
template <int TYPE, int count>
DEVICE void read(float (&out)[count], const typename ElementOf<TYPE>::Type* in) {
    static_assert(count <= 2 || count % 4 == 0, "");
    if constexpr (TYPE == FLOAT32 && count % 4 == 0) {
#pragma unroll
        for (int i = 0; i < count; i += 4) {
            const float4 v = *reinterpret_cast<const float4*>(in + i);
            out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
        }
    } else if constexpr (TYPE == FLOAT32 && count == 2) {
        const float2 v = *reinterpret_cast<const float2*>(in);
        out[0] = v.x, out[1] = v.y;
    } else if constexpr (TYPE == FLOAT32) {
        out[0] = in[0];
    } else if constexpr (count == 1) {
        out[0] = TYPE == BFLOAT16 ? bits_as_float(u32(in[0]) << 16) : half_as_float(in[0]);
    } else {
        u32 words[count / 2];
        if constexpr (count == 2) {
            words[0] = *reinterpret_cast<const u32*>(in);
        } else {
#pragma unroll
            for (int i = 0; i < count / 4; i++) {
                const uint2 v = reinterpret_cast<const uint2*>(in)[i];
                words[2 * i] = v.x, words[2 * i + 1] = v.y;
            }
        }
#pragma unroll
        for (int i = 0; i < count / 2; i++) {
            if constexpr (TYPE == BFLOAT16) {
                out[2 * i] = bits_as_float(words[i] << 16), out[2 * i + 1] = bits_as_float(words[i] & 0xffff0000u);
            } else {
                out[2 * i] = half_as_float(u16(words[i])), out[2 * i + 1] = half_as_float(u16(words[i] >> 16));
            }
        }
    }
}

template <int TYPE>
DEVICE u32 as_word(float first, float second) {
    return TYPE == BFLOAT16 ? floats_as_bfloats(first, second) : floats_as_halves(first, second);
}

template <int TYPE, int count>
DEVICE void write(typename ElementOf<TYPE>::Type* out, const float (&in)[count]) {
    static_assert(count <= 2 || count % 4 == 0, "");
    if constexpr (TYPE == FLOAT32 && count % 4 == 0) {
#pragma unroll
        for (int i = 0; i < count; i += 4)
            *reinterpret_cast<float4*>(out + i) = make_float4(in[i], in[i + 1], in[i + 2], in[i + 3]);
    } else if constexpr (TYPE == FLOAT32 && count == 2) {
        *reinterpret_cast<float2*>(out) = make_float2(in[0], in[1]);
    } else if constexpr (TYPE == FLOAT32) {
        out[0] = in[0];
    } else if constexpr (count == 1) {
        out[0] = u16(as_word<TYPE>(in[0], in[0]));
    } else if constexpr (count == 2) {
        *reinterpret_cast<u32*>(out) = as_word<TYPE>(in[0], in[1]);
    } else {
#pragma unroll
        for (int i = 0; i < count; i += 4)
            *reinterpret_cast<uint2*>(out + i) =
                make_uint2(as_word<TYPE>(in[i], in[i + 1]), as_word<TYPE>(in[i + 2], in[i + 3]));
    }
}

// The same to global memory, where the compiler may make stores of four bytes of those above.
template <int TYPE, int count>
DEVICE void write_whole(typename ElementOf<TYPE>::Type* global, const float (&in)[count]) {
    static_assert(count % 4 == 0, "");
#pragma unroll
    for (int i = 0; i < count; i += 4) {
        if constexpr (TYPE == FLOAT32)
            write_16_bytes(global + i, make_float4(in[i], in[i + 1], in[i + 2], in[i + 3]));
        else
            write_8_bytes(global + i, make_uint2(as_word<TYPE>(in[i], in[i + 1]), as_word<TYPE>(in[i + 2], in[i + 3])));
    }
}

// The same for an element alone whose type is known at run time.
template <typename R>
DEVICE R read_as(const void* data, i64 index, int dtype) {
    switch (dtype) {
        case FLOAT32: return R(static_cast<const float*>(data)[index]);
        case FLOAT64: return R(static_cast<const double*>(data)[index]);
        case BFLOAT16: return R(bits_as_float(u32(static_cast<const u16*>(data)[index]) << 16));
        default: return R(half_as_float(static_cast<const u16*>(data)[index]));
    }
}
template <typename R>
DEVICE void write_as(void* data, i64 index, int dtype, R value) {
    switch (dtype) {
        case FLOAT32: static_cast<float*>(data)[index] = float(value); break;
        case FLOAT64: static_cast<double*>(data)[index] = double(value); break;
        case BFLOAT16: static_cast<u16*>(data)[index] = u16(floats_as_bfloats(float(value), 0.f)); break;
        default: static_cast<u16*>(data)[index] = float_as_half(float(value));
    }
}

// ------------------------------------------------------------------------------------------------ mathematics

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

DEVICE float sigmoid_fast(float x) { return reciprocal_fast(1.f + exp2_fast(-LOG2_E * x)); }

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|). log1p(e) / e is a polynomial that is good to six digits, enough for numbers
// that were rounded to 16 bits; if PRECISE, log1p(e) is the series of the inverse hyperbolic tangent at e / (2 + e).
template <bool PRECISE>
DEVICE float softplus_fast(float x) {
    const float e = exp2_fast(-LOG2_E * fabsf(x));
    if constexpr (PRECISE) {
        const float s = e * reciprocal_fast(2.f + e), q = s * s;
        float sum = fmaf(q, 2.f / 13, 2.f / 11);
        sum = fmaf(sum, q, 2.f / 9);
        sum = fmaf(sum, q, 2.f / 7);
        sum = fmaf(sum, q, 2.f / 5);
        sum = fmaf(sum, q, 2.f / 3);
        sum = fmaf(sum, q, 2.f);
        return fmaf(sum, s, fmaxf(x, 0.f));
    } else {
        float ratio = fmaf(e, -0.00853920914f, 0.0440896339f);  // minimax for relative errors on [0, 1]
        ratio = fmaf(ratio, e, -0.107681714f);
        ratio = fmaf(ratio, e, 0.177452415f);
        ratio = fmaf(ratio, e, -0.244954631f);
        ratio = fmaf(ratio, e, 0.332754791f);
        ratio = fmaf(ratio, e, -0.499974042f);
        ratio = fmaf(ratio, e, 0.999999821f);
        return fmaf(ratio, e, fmaxf(x, 0.f));
    }
}

// The derivative of the softplus from its value: 1 - e^-value, by a series where that cancels.
template <bool PRECISE>
DEVICE float softplus_slope_fast(float value) {
    float series = -0.5f;
    if constexpr (PRECISE) {
        series = fmaf(value, 1.f / 120, -1.f / 24);
        series = fmaf(series, value, 1.f / 6);
        series = fmaf(series, value, -0.5f);
    }
    series = fmaf(series, value, 1.f);
    return value < (PRECISE ? 0.125f : 0.02f) ? series * value : 1.f - exp2_fast(-LOG2_E * value);
}
