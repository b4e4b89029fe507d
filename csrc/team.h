// A team of threads that works through numbered phases, each cut into chunks. All phases of one call run inside one
// parallel region.
//
// Each thread has a share of a phase's chunks. It claims them one after the other, because memory is read fastest in
// order, and then takes chunks from the shares of others. A phase ends when its chunks are done, not when all threads
// have arrived. So a thread that the system has paused delays the others only if it is in the middle of its work, and
// it rejoins at the current phase. A thread that waits spins briefly and then sleeps: its core is then free for a
// thread that has work.
#pragma once

#include <algorithm>
#include <array>
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
            n_shares_ = std::min(n_threads, MOST_SHARES);
            parallel_for(n_threads, n_threads, [&](int64_t i) { join(int(i) % n_shares_); });
            return;
        }
        for (int64_t phase = 0; phase < work_.n_phases(); phase++) {
            for (int64_t i = 0; i < work_.n_chunks(phase); i++) work_.chunk(phase, i);
            work_.finish(phase);
        }
    }

  private:
    static constexpr int SHIFT = 32, MOST_SHARES = 64;
    static constexpr std::chrono::microseconds SPIN{20};  // about as long as the last chunks of a phase take

    struct alignas(64) Share {
        std::atomic<uint64_t> next{0};  // the phase, and how many of the share's chunks are claimed
    };

    const Work& work_;
    int n_shares_ = 1;
    std::array<Share, MOST_SHARES> shares_;
    alignas(64) std::atomic<uint64_t> phase_{0};
    alignas(64) std::atomic<int64_t> n_done_{0};
    alignas(64) std::atomic<int> n_asleep_{0};
    std::mutex mutex_;
    std::condition_variable changed_;

    // The first chunk of a share.
    int64_t first_of(int share, uint64_t phase) const { return share * work_.n_chunks(phase) / n_shares_; }

    void join(int own) {
        const auto n_phases = static_cast<uint64_t>(work_.n_phases());
        for (;;) {
            const uint64_t current = phase_.load(std::memory_order_acquire);
            if (current >= n_phases) return;
            int64_t n_done = 0;
            for (int64_t i; (i = claim(own, current)) >= 0; n_done++) work_.chunk(current, i);
            if (n_done > 0 && finished(current, n_done)) continue;
            const int64_t other = claim_from_others(own, current);
            if (other < 0) {
                wait(current);
            } else {
                work_.chunk(current, other);
                finished(current, 1);
            }
        }
    }

    // Claims a chunk of a share; -1 if there is none or the phase is over.
    int64_t claim(int share, uint64_t current) {
        std::atomic<uint64_t>& place = shares_[share].next;
        const int64_t first = first_of(share, current), size = first_of(share + 1, current) - first;
        uint64_t next = place.load(std::memory_order_acquire);
        while (next >> SHIFT == current) {
            const auto i = static_cast<int64_t>(next & ((uint64_t(1) << SHIFT) - 1));
            if (i >= size) return -1;
            if (place.compare_exchange_weak(next, next + 1, std::memory_order_acquire)) return first + i;
        }
        return -1;
    }

    int64_t claim_from_others(int own, uint64_t current) {
        for (int k = 1; k < n_shares_; k++) {
            const int64_t i = claim((own + k) % n_shares_, current);
            if (i >= 0) return i;
        }
        return -1;
    }

    // Reports chunks as done; the thread that reports the last ones ends the phase.
    bool finished(uint64_t current, int64_t n_done) {
        if (n_done_.fetch_add(n_done, std::memory_order_acq_rel) + n_done != work_.n_chunks(current)) return false;
        work_.finish(current);
        n_done_.store(0, std::memory_order_relaxed);
        for (int i = 0; i < n_shares_; i++) shares_[i].next.store((current + 1) << SHIFT, std::memory_order_release);
        phase_.store(current + 1);
        if (n_asleep_.load() > 0) {
            {
                const std::lock_guard<std::mutex> lock(mutex_);
            }  // a thread that saw the old phase is asleep after this
            changed_.notify_all();
        }
        return true;
    }

    void wait(uint64_t current) {
        const auto end = std::chrono::steady_clock::now() + SPIN;
        do {
            for (int i = 0; i < 16; i++) {
                if (phase_.load() != current) return;
                pause_briefly();
            }
        } while (std::chrono::steady_clock::now() < end);
        std::unique_lock<std::mutex> lock(mutex_);
        n_asleep_.fetch_add(1);
        changed_.wait(lock, [&] { return phase_.load() != current; });
        n_asleep_.fetch_sub(1);
    }
};

}  // namespace anymamba
