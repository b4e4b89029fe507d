// The kernels of one instruction set; the module chooses one set when it is loaded.
#pragma once

#include "args.h"
#include "packed.h"
#include "stack.h"

#define ANYMAMBA_DECLARE_KERNELS(ISA)                            \
    namespace anymamba::ISA {                                    \
    void scan_forward(const ScanArgs& a);                        \
    void scan_backward(const ScanArgs& a);                       \
    void scan_summary(const ScanArgs& a, bool backward);         \
    void conv_forward(const ConvArgs& a);                        \
    void conv_backward(const ConvArgs& a);                       \
    void norm_forward(const NormArgs& a);                        \
    void norm_backward(const NormArgs& a);                       \
    ANYMAMBA_DECLARE_PRODUCTS                                    \
    ANYMAMBA_DECLARE_CONVERSIONS                                 \
    void stack_step(Stack& stack, const StackStep& a);           \
    void stack_replay(const Stack& stack, const StackReplay& a); \
    }

ANYMAMBA_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
ANYMAMBA_DECLARE_KERNELS(x86_64_v3)
ANYMAMBA_DECLARE_KERNELS(x86_64_v4)
#endif

// Sets whose products are compiled twice (products_choice.cpp).
#if defined(__x86_64__)
namespace anymamba::x86_64_v4_plain {
ANYMAMBA_DECLARE_PRODUCTS
}
namespace anymamba::x86_64_v4_dot {
ANYMAMBA_DECLARE_PRODUCTS
}
#elif defined(__aarch64__)
namespace anymamba::baseline_plain {
ANYMAMBA_DECLARE_PRODUCTS
}
namespace anymamba::baseline_dot {
ANYMAMBA_DECLARE_PRODUCTS
}
#endif
