// Whether this machine has instructions for products of bytes.

#include "packed.h"

#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace anymamba {

bool has_dot_products() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#elif defined(__linux__) && defined(__aarch64__)
    return getauxval(AT_HWCAP) & (1UL << 20);  // HWCAP_ASIMDDP
#elif defined(__aarch64__)
    return true;  // macOS
#else
    return false;
#endif
}

}  // namespace anymamba
