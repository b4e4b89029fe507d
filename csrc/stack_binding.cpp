#include "stack_binding.h"

#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "pointer.h"

namespace nb = nanobind;

namespace anymamba {
namespace {

RunStep run_step = nullptr;
RunReplay run_replay = nullptr;

void require_ids(const Stack& stack, const int64_t* ids, int64_t rows) {
    for (int64_t r = 0; r < rows; r++)
        if (ids[r] < 0 || ids[r] >= stack.embedding.n_out)
            throw std::out_of_range("token id " + std::to_string(ids[r]) + " is outside the embedding's rows, 0 to " +
                                    std::to_string(stack.embedding.n_out - 1));
}

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// `states` has four addresses for each layer: conv, ssm, and where their new values go. `kept` has one, or is empty.
std::vector<LayerState> layer_states(const Stack& stack, const std::vector<uintptr_t>& states,
                                     const std::vector<uintptr_t>& kept) {
    const size_t n_layers = stack.layers.size();
    if (states.size() != 4 * n_layers)
        throw std::invalid_argument("the state must have four addresses for each layer, got " +
                                    std::to_string(states.size()) + " for " + std::to_string(n_layers) + " layers");
    if (!kept.empty() && kept.size() != n_layers)
        throw std::invalid_argument("what is kept must have one address for each layer, got " +
                                    std::to_string(kept.size()) + " for " + std::to_string(n_layers) + " layers");
    std::vector<LayerState> layers;
    layers.reserve(n_layers);
    for (size_t i = 0; i < states.size(); i += 4)
        layers.push_back({pointer<float>(states[i]), pointer<float>(states[i + 1]), pointer<float>(states[i + 2]),
                          pointer<float>(states[i + 3]), kept.empty() ? nullptr : pointer<float>(kept[i / 4])});
    return layers;
}

// Reads `length` tokens of each sequence; `ids` is (batch, length). Logits are those of the last n_logits tokens.
void read(Stack& stack, uintptr_t ids, int64_t batch, int64_t length, int n_threads,
          const std::vector<uintptr_t>& states, const std::vector<uintptr_t>& kept, uintptr_t logits,
          int64_t n_logits) {
    const std::vector<LayerState> layers = layer_states(stack, states, kept);
    require_ids(stack, pointer<int64_t>(ids), batch * length);
    nb::gil_scoped_release release;
    run_step(stack, {pointer<int64_t>(ids), batch * length, length, n_threads, layers.data(), pointer<float>(logits),
                     n_logits});
}

void step(Stack& stack, uintptr_t ids, int64_t rows, int n_threads, const std::vector<uintptr_t>& states,
          uintptr_t logits) {
    read(stack, ids, rows, 1, n_threads, states, {}, logits, 1);
}

void replay(const Stack& stack, uintptr_t counts, int64_t batch, int64_t length, int n_threads,
            const std::vector<uintptr_t>& states, const std::vector<uintptr_t>& kept) {
    const std::vector<LayerState> layers = layer_states(stack, states, kept);
    nb::gil_scoped_release release;
    run_replay(stack, {pointer<int64_t>(counts), batch, length, n_threads, layers.data()});
}

void bind_norm(nb::module_& m) {
    auto type = nb::class_<Norm>(m, "Norm").def(nb::init<>());
    type.def_rw("present", &Norm::present).def_rw("subtract_mean", &Norm::subtract_mean).def_rw("eps", &Norm::eps);
    bind_pointer(type, "weight", &Norm::weight);
    bind_pointer(type, "bias", &Norm::bias);
}

void bind_layer(nb::module_& m) {
    auto type = nb::class_<Layer>(m, "Layer").def(nb::init<>());
    type.def_rw("d_inner", &Layer::d_inner).def_rw("d_state", &Layer::d_state).def_rw("d_conv", &Layer::d_conv);
    type.def_rw("dt_rows", &Layer::dt_rows).def_rw("B_rows", &Layer::B_rows).def_rw("C_rows", &Layer::C_rows);
    type.def_rw("zoh", &Layer::zoh).def_rw("largest_A", &Layer::largest_A);
    type.def_rw("norm", &Layer::norm).def_rw("output_norm", &Layer::output_norm);
    type.def_rw("dt_norm", &Layer::dt_norm).def_rw("B_norm", &Layer::B_norm).def_rw("C_norm", &Layer::C_norm);
    type.def_rw("in_proj", &Layer::in_proj).def_rw("x_proj", &Layer::x_proj);
    type.def_rw("dt_proj", &Layer::dt_proj).def_rw("out_proj", &Layer::out_proj);
    type.def_rw("dt_dtype", &Layer::dt_dtype);
    bind_pointer(type, "dt_blocks", &Layer::dt_blocks);
    for (const auto& [name, member] : {std::pair("in_bias", &Layer::in_bias),
                                       {"out_bias", &Layer::out_bias},
                                       {"conv_weight", &Layer::conv_weight},
                                       {"conv_bias", &Layer::conv_bias},
                                       {"A", &Layer::A},
                                       {"D", &Layer::D},
                                       {"delta_bias", &Layer::delta_bias},
                                       {"B", &Layer::B},
                                       {"C", &Layer::C}})
        bind_pointer(type, name, member);
}

}  // namespace

void bind_stack(nb::module_& m, RunStep step_kernel, RunReplay replay_kernel) {
    run_step = step_kernel;
    run_replay = replay_kernel;
    bind_norm(m);
    bind_layer(m);
    m.attr("CHANNEL_BLOCK") = CHANNEL_BLOCK;
    auto type = nb::class_<Stack>(m, "Stack").def(nb::init<>());
    type.def_rw("d_model", &Stack::d_model).def_rw("norm", &Stack::norm);
    type.def_rw("embedding", &Stack::embedding).def_rw("head", &Stack::head);
    type.def("add", [](Stack& stack, const Layer& layer) {
        stack.layers.push_back(layer);
        stack.chunks.n_threads = 0;  // to be made again
    });
    type.def("step", &step).def("read", &read).def("replay", &replay);
}

}  // namespace anymamba
