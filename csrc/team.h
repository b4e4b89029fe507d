// A team of threads that works through numbered phases, each cut into chunks. All phases of one call run inside one
// parallel region.
//
// Threads claim chunks, and a phase ends when its chunks are done, not when all threads have arrived. So a thread that
// the system has paused delays the others only if it holds a chunk, and it rejoins at the current phase. A thread that
// waits spins briefly and then sleeps: its core is then free for a thread that has a chunk.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "threads.h"

namespace anymamba {

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Work has n_phases(), n_chunks(phase) of at least 1, chunk(phase, i), and finish(phase), which one thread calls after
// the last chunk of a phase and before the next phase begins. They must not throw.
template <typename Work>
class Team {
  public:
    explicit Team(const Work& work) : work_(work) {}

    void run(int n_threads) {
        if (n_threads > 1) {
            parallel_for(n_threads, n_threads, [&](int64_t) { join(); });
            return;
        }
        for (int64_t phase = 0; phase < work_.n_phases(); phase++) {
            for (int64_t i = 0; i < work_.n_chunks(phase); i++) work_.chunk(phase, i);
            work_.finish(phase);
        }
    }

  private:
    static constexpr int SHIFT = 32;
    static constexpr std::chrono::microseconds SPIN{20};  // about as long as the last chunks of a phase take

    const Work& work_;
    alignas(64) std::atomic<uint64_t> next_{0};  // the phase and its next chunk
    alignas(64) std::atomic<int64_t> n_done_{0};
    alignas(64) std::atomic<int> n_asleep_{0};
    std::mutex mutex_;
    std::condition_variable changed_;

    uint64_t phase() const { return next_.load() >> SHIFT; }

    void join() {
        const auto n_phases = static_cast<uint64_t>(work_.n_phases());
        for (;;) {
            uint64_t next = next_.load(std::memory_order_acquire);
            const uint64_t current = next >> SHIFT;
            if (current >= n_phases) return;
            const auto i = static_cast<int64_t>(next & ((uint64_t(1) << SHIFT) - 1));
            if (i >= work_.n_chunks(current)) {
                wait(current);
            } else if (next_.compare_exchange_weak(next, next + 1, std::memory_order_acquire)) {
                work_.chunk(current, i);
                if (n_done_.fetch_add(1, std::memory_order_acq_rel) + 1 == work_.n_chunks(current)) end(current);
            }
        }
    }

    void end(uint64_t current) {
        work_.finish(current);
        n_done_.store(0, std::memory_order_relaxed);
        next_.store((current + 1) << SHIFT);
        if (n_asleep_.load() == 0) return;
        { const std::lock_guard<std::mutex> lock(mutex_); }  // a thread that saw the old phase is asleep after this
        changed_.notify_all();
    }

    void wait(uint64_t current) {
        const auto end = std::chrono::steady_clock::now() + SPIN;
        do {
            for (int i = 0; i < 16; i++) {
                if (phase() != current) return;
                pause_briefly();
            }
        } while (std::chrono::steady_clock::now() < end);
        std::unique_lock<std::mutex> lock(mutex_);
        n_asleep_.fetch_add(1);
        changed_.wait(lock, [&] { return phase() != current; });
        n_asleep_.fetch_sub(1);
    }
};

}  // namespace anymamba
