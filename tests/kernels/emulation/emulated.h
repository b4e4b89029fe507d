// CUDA kernels on a processor: the names of device.cuh with bodies that run the threads of a block as fibers.
//
// Slow and faithful where it matters: a warp's threads meet at its synchronisations only (forwards or backwards in
// order between them, so that what lacks one shows), asynchronous copies arrive when they are waited for and not
// before, shared memory ends at a page that must not be touched, and a block in which nobody can go on is reported, as
// are threads of a block that wait at different barriers: functions are inlined so that each place in the code is one.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <math.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <vector>
#include <algorithm>

#define DEVICE inline __attribute__((always_inline))
#define CALLED inline
#define KERNEL(threads, blocks) static void
#define CLUSTERED_KERNEL(cluster, threads, blocks) static void
constexpr bool CLUSTERS = true;
#define PARAMETER const
#define __launch_bounds__(...)

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline i64 min(i64 a, i64 b) { return a < b ? a : b; }
inline i64 max(i64 a, i64 b) { return a > b ? a : b; }

namespace emulated {

struct Index {
    unsigned x, y, z;
};
struct Copy {
    void* to;
    const void* from;
    int size;
    bool ok;
    int group;
};
struct Block;
struct Fiber {
    Block* block;
    ucontext_t context;
    std::vector<char> stack;
    Index index;
    int lane, warp;
    bool done;
    int group;
    std::vector<Copy> copies;
};
struct Meeting {
    int arrived = 0;
    u64 generation = 0;
    const void* place = nullptr;  // where the first thread waits
};
struct Warp {
    Meeting meeting;
    u64 values[2][32];
    u32 tiles[2][32][6];
    int alive = 32;
};

struct Memory {  // shared memory, with a page after its end that must not be touched
    u8 *start = nullptr, *shared = nullptr;
    u64 page = sysconf(_SC_PAGESIZE), whole;
    explicit Memory(u64 size) : whole((size + page - 1) / page * page) {
        start =
            static_cast<u8*>(mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        mprotect(start + whole, page, PROT_NONE);
        shared = start + (whole - size);
    }
    Memory(const Memory&) = delete;
    ~Memory() { munmap(start, whole + page); }
};
struct Block {
    Index index;
    u8* shared;
    std::vector<Warp> warps;
    Meeting all, parts[16];
    int alive;
};

inline std::vector<Fiber> fibers;
inline std::vector<Block> blocks;  // of the cluster that runs
inline Meeting cluster;
inline int alive;   // threads of the cluster
inline u64 events;  // grows with everything that lets somebody go on
inline Fiber* self;
inline ucontext_t scheduler;
inline Index grid_size, block_size;
inline std::function<void()> body;
inline const char* failure;

inline void yield() { swapcontext(&self->context, &scheduler); }

inline void meet(Meeting& meeting, const int& expected) {
    const u64 generation = meeting.generation;
    if (++meeting.arrived == expected) {
        meeting.arrived = 0, meeting.generation++, events++;
        return;
    }
    while (meeting.generation == generation) yield();
}

inline void run() {
    body();
    self->done = true;
    events++;
    self->block->warps[self->warp].alive--, self->block->alive--, alive--;
    yield();
}

inline void start_fiber(Fiber& f, Block& block, int thread) {
    f.block = &block, f.index = {unsigned(thread), 0, 0}, f.lane = thread % 32, f.warp = thread / 32;
    f.done = false, f.group = 0;
    f.copies.clear();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = &scheduler;
    makecontext(&f.context, reinterpret_cast<void (*)()>(run), 0);
}

// The blocks of one cluster, until all their threads have reached the end.
inline void run_cluster(int threads, bool backwards) {
    cluster = Meeting(), alive = threads * int(blocks.size());
    for (int i = 0; i < alive; i++) start_fiber(fibers[i], blocks[i / threads], i % threads);
    const int n_warps = alive / 32;
    while (alive) {
        const u64 before_round = events;
        for (int w = 0; w < n_warps; w++) {
            for (u64 before = ~u64(0); before != events;) {
                before = events;
                for (int l = 0; l < 32; l++) {
                    Fiber& f = fibers[w * 32 + (backwards ? 31 - l : l)];
                    if (f.done) continue;
                    self = &f;
                    swapcontext(&scheduler, &f.context);
                }
            }
        }
        if (before_round == events && alive) failure = "nobody can go on";
        if (failure) return;
    }
}

inline int launch(std::function<void()> kernel, i64 grid, int threads, u64 shared_bytes, bool backwards,
                  int of_cluster) {
    std::vector<std::unique_ptr<Memory>> memories;
    for (int i = 0; i < of_cluster; i++) memories.push_back(std::make_unique<Memory>(shared_bytes));
    body = kernel, failure = grid % of_cluster ? "the last cluster is not whole" : nullptr;
    if (int(fibers.size()) < threads * of_cluster) fibers.resize(threads * of_cluster);
    for (auto& f : fibers)
        if (f.stack.empty()) f.stack.resize(1 << 18);
    grid_size = {unsigned(grid), 1, 1}, block_size = {unsigned(threads), 1, 1};
    for (i64 first = 0; first < grid && !failure; first += of_cluster) {
        blocks.assign(of_cluster, Block());
        for (int i = 0; i < of_cluster; i++) {
            std::memset(memories[i]->start, 0xff, memories[i]->whole);  // not a number, until it is written
            blocks[i].index = {unsigned(first + i), 0, 0}, blocks[i].shared = memories[i]->shared;
            blocks[i].warps.assign(threads / 32, Warp()), blocks[i].alive = threads;
        }
        run_cluster(threads, backwards);
    }
    if (failure) std::fprintf(stderr, "emulated kernel: %s\n", failure);
    return failure ? 1 : 0;
}

}  // namespace emulated

#define threadIdx (emulated::self->index)
#define blockIdx (emulated::self->block->index)
#define gridDim (emulated::grid_size)
#define blockDim (emulated::block_size)

inline u8* shared_memory() { return emulated::self->block->shared; }

inline void need(bool fine, const char* what) {
    if (!fine) emulated::failure = what;
}

// Like a GPU's own exponential it errs to one side, by a part of the last place.
inline float exp2_fast(float x) {
    const float r = float(std::exp2(double(x)) * (1 - 1 / 33554432.));
    return std::fabs(r) < 1.17549435e-38f ? 0.f : r;
}
inline float reciprocal_fast(float x) {
    const float r = 1.f / x;
    return std::fabs(r) < 1.17549435e-38f ? 0.f : r;
}

inline const u8* advance(const u8* p, int a, int b) { return p + u64(u32(a)) * u32(b); }
inline void keep(const u8*&) {}
inline void keep(int&) {}
inline void write_8_bytes(void* to, uint2 v) {
    need(reinterpret_cast<u64>(to) % 8 == 0, "a store not aligned");
    std::memcpy(to, &v, 8);
}
inline void write_16_bytes(float* to, float4 v) {
    need(reinterpret_cast<u64>(to) % 16 == 0, "a store not aligned");
    std::memcpy(to, &v, 16);
}
// All threads of a block must wait at the same place in the code, as CUDA wants.
__attribute__((noinline)) inline void sync_block() {
    const void* place = __builtin_return_address(0);
    emulated::Block& block = *emulated::self->block;
    need(block.all.arrived == 0 || block.all.place == place, "threads of a block wait at different barriers");
    block.all.place = place;
    emulated::meet(block.all, block.alive);
}
__attribute__((noinline)) inline void sync_cluster() {
    const void* place = __builtin_return_address(0);
    need(emulated::cluster.arrived == 0 || emulated::cluster.place == place,
         "threads of a cluster wait at different barriers");
    emulated::cluster.place = place;
    emulated::meet(emulated::cluster, emulated::alive);
}
DEVICE void leave_cluster() { sync_cluster(); }
inline uint2 read_of_block(const uint2* own, int block) {
    const bool exists = block >= 0 && block < int(emulated::blocks.size());
    need(exists, "a block of another cluster");
    if (!exists) return {};
    need(emulated::blocks[block].alive == int(emulated::block_size.x), "a block that has ended, or a part of it");
    const u64 place = reinterpret_cast<const u8*>(own) - shared_memory();
    return *reinterpret_cast<const uint2*>(emulated::blocks[block].shared + place);
}
inline void sync_warp() {
    auto& warp = emulated::self->block->warps[emulated::self->warp];
    emulated::meet(warp.meeting, warp.alive);
}
inline void sync_part(int number, int threads) {
    need(number > 0 && number < 16 && threads % 32 == 0, "a barrier that does not exist");
    emulated::meet(emulated::self->block->parts[number], threads);
}
template <typename T>
T shuffle(T value, int lane) {
    auto& warp = emulated::self->block->warps[emulated::self->warp];
    const int side = warp.meeting.generation & 1;
    std::memcpy(&warp.values[side][emulated::self->lane], &value, sizeof(T));
    sync_warp();
    std::memcpy(&value, &warp.values[side][lane & 31], sizeof(T));
    return value;
}
template <typename T>
T shuffle_xor(T value, int mask) {
    return shuffle(value, emulated::self->lane ^ mask);
}
inline int first_bit(u32 bits) { return bits ? __builtin_ctz(bits) : -1; }
inline int last_bit(u32 bits) { return bits ? 31 - __builtin_clz(bits) : -1; }
inline u32 ballot(bool vote) {
    auto& warp = emulated::self->block->warps[emulated::self->warp];
    const int side = warp.meeting.generation & 1;
    warp.values[side][emulated::self->lane] = vote;
    sync_warp();
    u32 votes = 0;
    for (int l = 0; l < 32; l++) votes |= u32(warp.values[side][l] & 1) << l;
    return votes;
}

typedef u64 Barrier;
inline void start_barrier(Barrier* b) { *b = 0; }
inline void arrive(Barrier* b) { ++*b, emulated::events++; }
inline void wait(const Barrier* b, u32 parity) {
    while ((*reinterpret_cast<const volatile u64*>(b) & 1) == parity) emulated::yield();
}

inline void copy_16_bytes(void* to, const void* from, bool ok) {
    need(reinterpret_cast<u64>(to) % 16 == 0 && (!ok || reinterpret_cast<u64>(from) % 16 == 0), "a copy not aligned");
    emulated::self->copies.push_back({to, from, 16, ok, emulated::self->group});
}
inline void copy_16_bytes(void* to, const void* from) { copy_16_bytes(to, from, true); }
inline void copy_8_bytes(void* to, const void* from) {
    need((reinterpret_cast<u64>(to) | reinterpret_cast<u64>(from)) % 8 == 0, "a copy not aligned");
    emulated::self->copies.push_back({to, from, 8, true, emulated::self->group});
}
inline void end_of_copies() { emulated::self->group++; }
template <int N>
void wait_for_copies() {
    auto& copies = emulated::self->copies;
    size_t kept = 0;
    for (auto& c : copies) {
        if (c.group >= emulated::self->group - N) {
            copies[kept++] = c;
        } else if (c.ok) {
            std::memcpy(c.to, c.from, c.size);
        } else {
            std::memset(c.to, 0, c.size);
        }
    }
    copies.resize(kept);
}
inline void prefetch(const void*) {}

inline void wait_for_previous() {}
inline void let_next_start() {}
inline float4 read_fresh(const float* from) {
    need(reinterpret_cast<u64>(from) % 16 == 0, "a load not aligned");
    return *reinterpret_cast<const float4*>(from);
}
inline float4 read_streamed(const float* from) { return read_fresh(from); }
inline void write_streamed(float* to, float4 v) { write_16_bytes(to, v); }
inline float read_one_fresh(const float* from) { return *from; }
inline uint4 read_once(const void* from) {
    need(reinterpret_cast<u64>(from) % 16 == 0, "a load not aligned");
    return *reinterpret_cast<const uint4*>(from);
}

inline float bits_as_float(u32 bits) {
    float r;
    std::memcpy(&r, &bits, 4);
    return r;
}
inline u32 float_as_bits(float x) {
    u32 r;
    std::memcpy(&r, &x, 4);
    return r;
}
inline float half_as_float(u16 bits) {
    const u32 sign = u32(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    if (exponent == 31) return bits_as_float(sign | 0x7f800000u | fraction << 13);
    const float size =
        exponent ? std::ldexp(float(fraction | 0x400), int(exponent) - 25) : std::ldexp(float(fraction), -24);
    return sign ? -size : size;
}
inline u16 float_as_half(float x) {
    const u32 sign = float_as_bits(x) >> 16 & 0x8000;
    const float size = std::fabs(x);
    if (std::isnan(x)) return 0x7fff;
    if (size == 0.f) return u16(sign);
    if (size >= 65520.f) return u16(sign | 0x7c00);
    int exponent;
    std::frexp(size, &exponent);
    const int unit = std::max(exponent - 11, -24);  // of the last place, as a power of two
    const u32 units = u32(std::nearbyint(std::ldexp(size, -unit)));
    return u16(sign | (unit == -24 ? units : u32(unit + 24) * 0x400 + units));
}
inline u16 float_as_bfloat(float x) {
    const u32 bits = float_as_bits(x);
    if (std::isnan(x)) return 0x7fff;
    return u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline u32 floats_as_bfloats(float first, float second) {
    return u32(float_as_bfloat(first)) | u32(float_as_bfloat(second)) << 16;
}
inline u32 floats_as_halves(float first, float second) {
    return u32(float_as_half(first)) | u32(float_as_half(second)) << 16;
}
inline u32 add_bfloats(u32 a, u32 b) {
    return floats_as_bfloats(bits_as_float(a << 16) + bits_as_float(b << 16),
                             bits_as_float(a & 0xffff0000u) + bits_as_float(b & 0xffff0000u));
}
inline u32 permute_bytes(u32 a, u32 b, u32 select) {
    const u64 both = u64(b) << 32 | a;
    u32 r = 0;
    for (int i = 0; i < 4; i++) r |= u32(both >> (select >> 4 * i & 7) * 8 & 255) << 8 * i;
    return r;
}
inline u32 shift_words(u32 low, u32 high, u32 bits) { return u32((u64(high) << 32 | low) >> bits); }
template <typename T>
T read_ahead(const T* global) {
    need(reinterpret_cast<u64>(global) % sizeof(T) == 0, "a load not aligned");
    return *global;
}
inline float dot_bfloats(u32 a, u32 b) {
    return bits_as_float(a << 16) * bits_as_float(b << 16) +
           bits_as_float(a & 0xffff0000u) * bits_as_float(b & 0xffff0000u);
}
// Every lane of a warp gives some words; returns those of all lanes.
template <int N>
inline const u32 (&gathered(const u32 (&own)[N]))[32][6] {
    auto& warp = emulated::self->block->warps[emulated::self->warp];
    auto& tiles = warp.tiles[warp.meeting.generation & 1];
    std::memcpy(tiles[emulated::self->lane], own, sizeof(own));
    sync_warp();
    return tiles;
}
inline void multiply_tiles(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    const int lane = emulated::self->lane, row = lane & ~3, column = lane % 4 * 2;
    const u32 own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const auto& all = gathered(own);
    for (int half = 0; half < 2; half++)
        for (int t = 0; t < 4; t++)
            for (int i = 0; i < 2; i++) {
                const u32 other = all[(column + i) * 4 + t][4 + half];
                sums[i] += dot_bfloats(all[row + t][2 * half], other);
                sums[2 + i] += dot_bfloats(all[row + t][2 * half + 1], other);
            }
}
// The rows of four matrices, whose addresses the lanes have.
inline void rows_of_tiles(const u16* (&rows)[32], const void* own) {
    need(reinterpret_cast<u64>(own) % 16 == 0, "a row of a matrix not aligned");
    const u64 address = reinterpret_cast<u64>(own);
    const u32 words[2] = {u32(address), u32(address >> 32)};
    const auto& all = gathered(words);
    for (int l = 0; l < 32; l++) rows[l] = reinterpret_cast<const u16*>(u64(all[l][1]) << 32 | all[l][0]);
}
inline void load_tiles(u32 (&words)[4], const void* row) {
    const int g = emulated::self->lane / 4, t = emulated::self->lane % 4;
    const u16* rows[32];
    rows_of_tiles(rows, row);
    for (int i = 0; i < 4; i++) words[i] = rows[8 * i + g][2 * t] | u32(rows[8 * i + g][2 * t + 1]) << 16;
}
template <int N>
inline void load_tiles_transposed(u32 (&words)[N], const void* row) {
    const int g = emulated::self->lane / 4, t = emulated::self->lane % 4;
    const u16* rows[32];
    rows_of_tiles(rows, row);
    for (int i = 0; i < N; i++) words[i] = rows[8 * i + 2 * t][g] | u32(rows[8 * i + 2 * t + 1][g]) << 16;
}
