// What follows a product of a few rows, for one output of a row.
#pragma once

#include "parameters.cuh"

constexpr int STORE = 0, ADD = 1, LOGITS = 2;  // p.target

DEVICE void finish_product(const Parameters& p, const Step& step, float value, int row, int output) {
    if (p.target == LOGITS) {
        if (row < step.rows) step.logits[row * p.n_out + output] = value;
        return;
    }
    float* to = floats(p.y.data) + row * p.y.stride + output;
    *to = p.target == ADD ? read_one_fresh(to) + value : value;
}

DEVICE void finish_in_proj(const Parameters& p, const Step& step, const Inputs& old, float value, int row, int output) {
    const int channel = output - int(p.d_inner);
    if (channel >= 0)
        floats(p.z.data)[row * p.z.stride + channel] = silu(value);
    else if (row < step.rows)
        floats(p.u.data)[row * p.u.stride + output] = convolve(old, value, p, step, row, output);
}
