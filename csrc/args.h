// The arguments of the kernels: pointers, and sizes and strides in elements. Python checks them before the call.
#pragma once

#include <cstdint>

namespace anymamba {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// A tensor (batch, length, d_inner) or (batch, length, n_groups, d_state) whose last dimension is contiguous.
struct Rows {
    void* data = nullptr;
    int dtype = 0;
    int64_t batch_stride = 0, length_stride = 0, group_stride = 0;
    DType type() const { return static_cast<DType>(dtype); }
    int64_t at(int64_t b, int64_t t) const { return b * batch_stride + t * length_stride; }
};

// The selective scan. T is the type of the state and of everything that is not Rows: double if is_double, else float.
// Matrices per channel are contiguous: A (d_inner, d_state); states (n_sequences, d_inner, d_state).
// Saved states are (n_tiles or more, batch, d_state, d_inner). Gradients that are sums are stored as partial sums, each
// written by one task: dB_parts and dC_parts are (batch, n_ranges, length, d_state) for a selective B or C and
// (batch n_chunks, d_state, d_inner) for a constant one; dA_parts (batch n_chunks, d_state, d_inner); dD_parts and
// dbias_parts (batch n_chunks, d_inner). Narrow and long shapes are split into chunks of time: chunk_states and
// chunk_decays (batch, n_chunks, d_inner, d_state) carry states from one chunk to the next. chunk_steps, or null, gets
// the sum of delta over each chunk (batch, n_chunks, d_inner).
struct ScanArgs {
    bool is_double = false, softplus = false, zoh = false, selective_B = true, selective_C = true;
    int64_t batch = 0, length = 0, d_inner = 0, d_state = 0, n_groups = 1;
    int64_t tile = 0, range = 0, chunk = 0;  // steps per tile, channels per task, steps per task (whole tiles)
    int n_threads = 1;
    Rows u, delta, z, B, C, y;
    void *A = nullptr, *D = nullptr, *delta_bias = nullptr, *constant_B = nullptr, *constant_C = nullptr;
    void *initial_state = nullptr, *last_state = nullptr, *saved = nullptr;
    void *chunk_states = nullptr, *chunk_decays = nullptr, *chunk_steps = nullptr;
    void* offsets = nullptr;  // int64 (n_sequences + 1), or null where each row is one sequence
    int64_t n_sequences = 0;
    // backward only
    Rows dy, du, ddelta, dz;
    void *dlast_state = nullptr, *dinitial_state = nullptr;
    void *dA_parts = nullptr, *dB_parts = nullptr, *dC_parts = nullptr, *dD_parts = nullptr, *dbias_parts = nullptr;
};

// The causal convolution y[t] = silu(bias + sum over i of weight[i] x[t - width + 1 + i]). T is as above. All of these
// are contiguous: weight (width, d_inner), bias (d_inner,), states (n_sequences, width - 1, d_inner) in the dtype of x
// and their gradients in T, dweight_parts (batch n_chunks, width, d_inner), dbias_parts (batch n_chunks, d_inner).
struct ConvArgs {
    bool is_double = false, silu = false;
    int64_t batch = 0, length = 0, d_inner = 0, width = 0;
    int64_t chunk = 0;  // steps per task
    int n_threads = 1;
    Rows x, y;
    void *weight = nullptr, *bias = nullptr, *initial_state = nullptr, *last_state = nullptr;
    void* offsets = nullptr;  // int64 (n_sequences + 1), or null where each row is one sequence
    int64_t n_sequences = 0;
    // backward only
    Rows dy, dx;
    void *dlast_state = nullptr, *dinitial_state = nullptr, *dweight_parts = nullptr, *dbias_parts = nullptr;
};

// y = norm(x + residual), over rows (1, rows, size). T is as above; weight and bias (size,) and the statistics are of
// it: the scales of the rows, then their means if they are subtracted. The parts, one for each chunk of rows, start as
// zeros.
struct NormArgs {
    bool is_double = false, is_plain = false;  // is_plain: all rows are float32
    bool subtract_mean = false;
    int64_t rows = 0, size = 0, chunk = 0;  // rows per task
    double eps = 0;
    int n_threads = 1, total_dtype = 0;
    Rows x, residual, total, y;
    void *weight = nullptr, *bias = nullptr, *statistics = nullptr;
    // backward only
    Rows dy, dtotal, dx, dresidual;
    void *dweight_parts = nullptr, *dbias_parts = nullptr;
};

}  // namespace anymamba
