// Runs tasks on the threads of the OpenMP runtime that the process has loaded, such as torch's, so that two thread
// pools do not compete for the cores. Without such a runtime it uses threads of the standard library.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#if defined(__linux__) && !defined(ANYMAMBA_STD_THREADS)
#include <dlfcn.h>
#endif

namespace anymamba {

using ParallelRegion = void (*)(void (*)(void*), void*, unsigned, unsigned);

// GOMP_parallel of the loaded runtime, which LLVM's and Intel's also have; null if there is none.
inline ParallelRegion openmp_region() {
#if defined(__linux__) && !defined(ANYMAMBA_STD_THREADS)
    static const auto region = reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return region;
#else
    return nullptr;
#endif
}

// Calls task(i) for i in [0, n_tasks), each once, in any order, on at most n_threads threads.
template <typename Task>
void parallel_for(int64_t n_tasks, int n_threads, const Task& task) {
    struct Shared {
        const Task& task;
        int64_t n_tasks;
        std::atomic<int64_t> next{0};
        std::atomic<bool> failed{false};
        std::exception_ptr failure{};
        static void work(void* data) {
            auto* shared = static_cast<Shared*>(data);
            try {
                for (int64_t i; (i = shared->next.fetch_add(1)) < shared->n_tasks;) shared->task(i);
            } catch (...) {  // such as bad_alloc; an exception must not leave the parallel region
                if (!shared->failed.exchange(true)) shared->failure = std::current_exception();
            }
        }
    } shared{task, n_tasks};
    const auto n = static_cast<unsigned>(n_tasks < n_threads ? n_tasks : n_threads);
    if (n <= 1) {
        Shared::work(&shared);
    } else if (ParallelRegion region = openmp_region()) {
        region(&Shared::work, &shared, n, 0);
    } else {
        std::vector<std::thread> threads;
        for (unsigned i = 1; i < n; i++) threads.emplace_back(&Shared::work, &shared);
        Shared::work(&shared);
        for (auto& thread : threads) thread.join();
    }
    if (shared.failure) std::rethrow_exception(shared.failure);
}

}  // namespace anymamba
