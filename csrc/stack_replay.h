// Going back to an earlier token of a pass: the state, from the inputs of the recurrence that were kept.
#pragma once

#include <algorithm>

#include "stack_recurrence.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

// The state of channels [begin, end) of one sequence after its first `count` tokens.
void replay_channels(const Layer& layer, const LayerState& state, int64_t first_row, int64_t count, int64_t sequence,
                     int64_t begin, int64_t end) {
    const int64_t D = layer.d_inner, N = layer.d_state, before = layer.d_conv - 1;
    const int64_t place = sequence * D * N, size = end - begin;
    for (int64_t i = 0; i < before; i++) {
        const int64_t at = i + count;  // among the inputs in the old state and then those kept
        const float* const from = at < before ? state.conv + (sequence * before + at) * D
                                              : KeptInputs(layer, state.kept, first_row + at - before).x;
        std::copy_n(from + begin, size, state.new_conv + (sequence * before + i) * D + begin);
    }
    if (count == 0 && state.ssm != state.new_ssm)
        std::copy_n(state.ssm + place + begin * N, size * N, state.new_ssm + place + begin * N);
    for (int64_t t = 0; t < count; t++) {
        const KeptInputs kept(layer, state.kept, first_row + t);
        const float* const h = (t == 0 ? state.ssm : state.new_ssm) + place;
        const float* const C = layer.B_rows ? kept.B : layer.A;  // any numbers: the output is not used
        for_vectors(begin, end, [&](int64_t c, int lanes) {
            run_vector(layer, c, lanes, read(kept.delta, c, lanes), read(kept.u, c, lanes), kept.B, C, h,
                       state.new_ssm + place);
        });
    }
}

}  // namespace
}  // namespace anymamba::ANYMAMBA_ISA
