// Aligned, zeroed memory for a task.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace anymamba {

template <typename T>
class Scratch {
  public:
    explicit Scratch(int64_t size) : data_(static_cast<T*>(::operator new((size + 1) * sizeof(T), ALIGNMENT))) {
        std::fill_n(data_.get(), size, T(0));
    }
    T* get() const { return data_.get(); }

  private:
    static constexpr std::align_val_t ALIGNMENT{64};
    struct Free {
        void operator()(T* p) const { ::operator delete(p, ALIGNMENT); }
    };
    std::unique_ptr<T, Free> data_;
};

}  // namespace anymamba
