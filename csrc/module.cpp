// The Python module anymamba._native: lists the available instruction sets and calls the kernels of the chosen one.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "pointer.h"
#include "stack_binding.h"
#include "threads.h"

namespace nb = nanobind;
using anymamba::bind_pointer;
using anymamba::ConvArgs;
using anymamba::NormArgs;
using anymamba::Packed;
using anymamba::PackedLinearArgs;
using anymamba::Rows;
using anymamba::ScanArgs;

namespace {

struct Kernels {
    const char* name;
    bool (*runs_here)();
    void (*scan_forward)(const ScanArgs&);
    void (*scan_backward)(const ScanArgs&);
    void (*scan_summary)(const ScanArgs&, bool);
    void (*conv_forward)(const ConvArgs&);
    void (*conv_backward)(const ConvArgs&);
    void (*norm_forward)(const NormArgs&);
    void (*norm_backward)(const NormArgs&);
    void (*packed_linear)(const PackedLinearArgs&);
    void (*read_memory)(const void*, int64_t, int);
    void (*pack_weights)(const Packed&, const float*, int);
    void (*unpack_weights)(const Packed&, float*, int);
    anymamba::RunStep stack_step;
    anymamba::RunReplay stack_replay;
};

#define ANYMAMBA_KERNELS(ISA)                                                                   \
    anymamba::ISA::scan_forward, anymamba::ISA::scan_backward, anymamba::ISA::scan_summary,     \
        anymamba::ISA::conv_forward, anymamba::ISA::conv_backward, anymamba::ISA::norm_forward, \
        anymamba::ISA::norm_backward, anymamba::ISA::packed_linear, anymamba::ISA::read_memory, \
        anymamba::ISA::pack_weights, anymamba::ISA::unpack_weights, anymamba::ISA::stack_step,  \
        anymamba::ISA::stack_replay

// Best first.
const Kernels KERNELS[] = {
#if defined(__x86_64__)
    {"x86-64-v4",
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl");
     },
     ANYMAMBA_KERNELS(x86_64_v4)},
    {"x86-64-v3", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     ANYMAMBA_KERNELS(x86_64_v3)},
    {"x86-64-v2", [] { return true; }, ANYMAMBA_KERNELS(baseline)},
#else
    {"default", [] { return true; }, ANYMAMBA_KERNELS(baseline)},
#endif
};

const Kernels* chosen = nullptr;

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels& kernels : KERNELS)
        if (kernels.runs_here()) names.emplace_back(kernels.name);
    return names;
}

void choose(const std::string& name) {
    for (const Kernels& kernels : KERNELS)
        if (name == kernels.name && kernels.runs_here()) {
            chosen = &kernels;
            return;
        }
    throw std::invalid_argument("this machine does not have the instruction set " + name);
}

// Request pages of 2 MiB for fresh memory. The system allocates and clears pages of 4 KiB with one page fault each,
// which can take as long as computing the values that are written to them.
void use_large_pages(uintptr_t address, int64_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 1 << 21;
    const uintptr_t begin = (address + page - 1) / page * page, end = (address + size) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // it is only advice
#else
    (void)address, (void)size;
#endif
}

void bind_scan(nb::module_& m) {
    auto type = nb::class_<ScanArgs>(m, "ScanArgs").def(nb::init<>());
    type.def_rw("is_double", &ScanArgs::is_double).def_rw("softplus", &ScanArgs::softplus);
    type.def_rw("zoh", &ScanArgs::zoh).def_rw("n_threads", &ScanArgs::n_threads);
    type.def_rw("selective_B", &ScanArgs::selective_B).def_rw("selective_C", &ScanArgs::selective_C);
    type.def_rw("batch", &ScanArgs::batch).def_rw("length", &ScanArgs::length).def_rw("d_inner", &ScanArgs::d_inner);
    type.def_rw("d_state", &ScanArgs::d_state).def_rw("n_groups", &ScanArgs::n_groups);
    type.def_rw("tile", &ScanArgs::tile).def_rw("range", &ScanArgs::range).def_rw("chunk", &ScanArgs::chunk);
    type.def_rw("n_sequences", &ScanArgs::n_sequences);
    type.def_rw("u", &ScanArgs::u).def_rw("delta", &ScanArgs::delta).def_rw("z", &ScanArgs::z);
    type.def_rw("B", &ScanArgs::B).def_rw("C", &ScanArgs::C).def_rw("y", &ScanArgs::y);
    type.def_rw("dy", &ScanArgs::dy).def_rw("du", &ScanArgs::du);
    type.def_rw("ddelta", &ScanArgs::ddelta).def_rw("dz", &ScanArgs::dz);
    bind_pointer(type, "A", &ScanArgs::A);
    bind_pointer(type, "D", &ScanArgs::D);
    bind_pointer(type, "delta_bias", &ScanArgs::delta_bias);
    bind_pointer(type, "constant_B", &ScanArgs::constant_B);
    bind_pointer(type, "constant_C", &ScanArgs::constant_C);
    bind_pointer(type, "initial_state", &ScanArgs::initial_state);
    bind_pointer(type, "last_state", &ScanArgs::last_state);
    bind_pointer(type, "saved", &ScanArgs::saved);
    bind_pointer(type, "chunk_states", &ScanArgs::chunk_states);
    bind_pointer(type, "chunk_decays", &ScanArgs::chunk_decays);
    bind_pointer(type, "chunk_steps", &ScanArgs::chunk_steps);
    bind_pointer(type, "offsets", &ScanArgs::offsets);
    bind_pointer(type, "dlast_state", &ScanArgs::dlast_state);
    bind_pointer(type, "dinitial_state", &ScanArgs::dinitial_state);
    bind_pointer(type, "dA_parts", &ScanArgs::dA_parts);
    bind_pointer(type, "dB_parts", &ScanArgs::dB_parts);
    bind_pointer(type, "dC_parts", &ScanArgs::dC_parts);
    bind_pointer(type, "dD_parts", &ScanArgs::dD_parts);
    bind_pointer(type, "dbias_parts", &ScanArgs::dbias_parts);
    m.def("scan_forward", [](const ScanArgs& a) { chosen->scan_forward(a); }, nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "scan_backward", [](const ScanArgs& a) { chosen->scan_backward(a); }, nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "scan_summary", [](const ScanArgs& a, bool backward) { chosen->scan_summary(a, backward); },
        nb::call_guard<nb::gil_scoped_release>());
}

void bind_conv(nb::module_& m) {
    auto type = nb::class_<ConvArgs>(m, "ConvArgs").def(nb::init<>());
    type.def_rw("is_double", &ConvArgs::is_double).def_rw("silu", &ConvArgs::silu);
    type.def_rw("batch", &ConvArgs::batch).def_rw("length", &ConvArgs::length).def_rw("d_inner", &ConvArgs::d_inner);
    type.def_rw("width", &ConvArgs::width).def_rw("chunk", &ConvArgs::chunk);
    type.def_rw("n_threads", &ConvArgs::n_threads).def_rw("n_sequences", &ConvArgs::n_sequences);
    type.def_rw("x", &ConvArgs::x).def_rw("y", &ConvArgs::y);
    type.def_rw("dy", &ConvArgs::dy).def_rw("dx", &ConvArgs::dx);
    bind_pointer(type, "weight", &ConvArgs::weight);
    bind_pointer(type, "bias", &ConvArgs::bias);
    bind_pointer(type, "initial_state", &ConvArgs::initial_state);
    bind_pointer(type, "last_state", &ConvArgs::last_state);
    bind_pointer(type, "offsets", &ConvArgs::offsets);
    bind_pointer(type, "dlast_state", &ConvArgs::dlast_state);
    bind_pointer(type, "dinitial_state", &ConvArgs::dinitial_state);
    bind_pointer(type, "dweight_parts", &ConvArgs::dweight_parts);
    bind_pointer(type, "dbias_parts", &ConvArgs::dbias_parts);
    m.def("conv_forward", [](const ConvArgs& a) { chosen->conv_forward(a); }, nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "conv_backward", [](const ConvArgs& a) { chosen->conv_backward(a); }, nb::call_guard<nb::gil_scoped_release>());
}

void bind_norm(nb::module_& m) {
    auto type = nb::class_<NormArgs>(m, "NormArgs");
    type.def("__init__", [](NormArgs* args, int64_t rows, int64_t size, int64_t chunk, double eps, bool subtract_mean) {
        new (args) NormArgs{};
        args->rows = rows, args->size = size, args->chunk = chunk, args->eps = eps, args->subtract_mean = subtract_mean;
    });
    type.def_rw("is_double", &NormArgs::is_double).def_rw("is_plain", &NormArgs::is_plain);
    type.def_rw("n_threads", &NormArgs::n_threads).def_rw("total_dtype", &NormArgs::total_dtype);
    type.def_rw("x", &NormArgs::x).def_rw("residual", &NormArgs::residual);
    type.def_rw("total", &NormArgs::total).def_rw("y", &NormArgs::y);
    type.def_rw("dy", &NormArgs::dy).def_rw("dtotal", &NormArgs::dtotal);
    type.def_rw("dx", &NormArgs::dx).def_rw("dresidual", &NormArgs::dresidual);
    bind_pointer(type, "weight", &NormArgs::weight);
    bind_pointer(type, "bias", &NormArgs::bias);
    bind_pointer(type, "statistics", &NormArgs::statistics);
    bind_pointer(type, "dweight_parts", &NormArgs::dweight_parts);
    bind_pointer(type, "dbias_parts", &NormArgs::dbias_parts);
    m.def(
        "norm_of_floats",
        [](uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias, uintptr_t total, uintptr_t y,
           int64_t rows, int64_t size, int64_t chunk, double eps, bool subtract_mean, int threads) {
            const auto pointer = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
            const auto dense = [&](uintptr_t address) { return Rows{pointer(address), 0, 0, size, 0}; };
            NormArgs a;
            a.is_plain = true, a.rows = rows, a.size = size, a.chunk = chunk, a.eps = eps, a.n_threads = threads;
            a.subtract_mean = subtract_mean, a.weight = pointer(weight), a.bias = pointer(bias);
            a.x = dense(x), a.residual = dense(residual), a.total = dense(total), a.y = dense(y);
            chosen->norm_forward(a);
        },
        nb::call_guard<nb::gil_scoped_release>(), "norm_forward of dense float32, in one call.");
    m.def("norm_forward", [](const NormArgs& a) { chosen->norm_forward(a); }, nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "norm_backward", [](const NormArgs& a) { chosen->norm_backward(a); }, nb::call_guard<nb::gil_scoped_release>());
}

void bind_products(nb::module_& m) {
    nb::class_<Packed>(m, "Packed")
        .def("__init__",
             [](Packed* packed, uintptr_t data, int format, int64_t n_out, int64_t n_in, int64_t row_bytes) {
                 new (packed) Packed{reinterpret_cast<const void*>(data), format, n_out, n_in, row_bytes};
             });
    m.def(
        "packed_linear",
        [](const Packed& weight, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t bias, uintptr_t y,
           int threads) {
            const auto floats = [](uintptr_t address) { return reinterpret_cast<float*>(address); };
            chosen->packed_linear({weight, floats(x), x_stride, rows, floats(bias), floats(y), threads});
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "pack_weights",
        [](const Packed& to, uintptr_t from, int threads) {
            chosen->pack_weights(to, reinterpret_cast<const float*>(from), threads);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "unpack_weights",
        [](const Packed& from, uintptr_t to, int threads) {
            chosen->unpack_weights(from, reinterpret_cast<float*>(to), threads);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "read_memory",
        [](uintptr_t data, int64_t size, int threads) {
            chosen->read_memory(reinterpret_cast<const void*>(data), size, threads);
        },
        nb::call_guard<nb::gil_scoped_release>(), "Reads memory in a plain loop, to measure the bandwidth.");
    m.def("has_dot_products", &anymamba::has_dot_products, "Whether this machine multiplies bytes in one instruction.");
    m.def("use_dot_products", [](bool use) { anymamba::use_dot_products = use && anymamba::has_dot_products(); });
}

}  // namespace

NB_MODULE(_native, m) {
    choose(instruction_sets().front());
    m.def("instruction_sets", &instruction_sets, "The instruction sets that this machine has, best first.");
    m.def("instruction_set", [] { return std::string(chosen->name); }, "The instruction set in use.");
    m.def("choose_instruction_set", &choose, nb::arg("name"));
    m.def(
        "shares_openmp", [] { return anymamba::openmp_region() != nullptr; },
        "Whether tasks run on the threads of an OpenMP runtime that the process has loaded.");
    m.def("use_large_pages", &use_large_pages, nb::arg("address"), nb::arg("size"));
    nb::class_<Rows>(m, "Rows").def("__init__", [](Rows* rows, uintptr_t data, int dtype, int64_t batch_stride,
                                                   int64_t length_stride, int64_t group_stride) {
        new (rows) Rows{reinterpret_cast<void*>(data), dtype, batch_stride, length_stride, group_stride};
    });
    bind_scan(m);
    bind_conv(m);
    bind_norm(m);
    bind_products(m);
    anymamba::bind_stack(
        m, [](anymamba::Stack& s, const anymamba::StackStep& a) { chosen->stack_step(s, a); },
        [](const anymamba::Stack& s, const anymamba::StackReplay& a) { chosen->stack_replay(s, a); });
}
