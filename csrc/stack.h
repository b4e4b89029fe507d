// Tokens through a whole language model of Mamba blocks. Python checks sizes before the calls and keeps the tensors
// alive. All tensors are contiguous; those given as float are float32.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "packed.h"
#include "scratch.h"

namespace anymamba {

constexpr int64_t CHANNEL_BLOCK = 32;

struct Norm {
    bool present = false, subtract_mean = false;
    float eps = 0;
    float *weight = nullptr, *bias = nullptr;
};

// A matrix without data is absent. Step, B and C are selective where x_proj has rows for them; those rows are in this
// order. A constant B or C is (d_inner, d_state). A dt_proj of floats is given in blocks of channels instead: it has
// few columns, and sums over them in lanes of channels take less time than those of a product.
struct Layer {
    int64_t d_inner = 0, d_state = 0, d_conv = 0, dt_rows = 0, B_rows = 0, C_rows = 0;
    bool zoh = false;
    float largest_A = 0;  // the largest magnitude
    Norm norm, dt_norm, B_norm, C_norm, output_norm;
    Packed in_proj{}, x_proj{}, dt_proj{}, out_proj{};
    float *in_bias = nullptr, *out_bias = nullptr;
    float *conv_weight = nullptr, *conv_bias = nullptr;  // (d_conv, d_inner), (d_inner,)
    float *A = nullptr, *D = nullptr, *delta_bias = nullptr, *B = nullptr, *C = nullptr;
    void* dt_blocks = nullptr;  // (blocks, dt_rows, CHANNEL_BLOCK), the last block filled up
    int dt_dtype = 0;           // DType, not float64
};

// The state of one layer: conv (batch, d_conv - 1, d_inner) and ssm (batch, d_inner, d_state). The new state may be
// written over the old one.
struct LayerState {
    const float *conv, *ssm;
    float *new_conv, *new_ssm;
    float* kept = nullptr;  // (batch, length, KeptInputs::size): what a replay needs; null: not kept
};

// What is kept of one token in one layer: the inputs of the convolution and of the recurrence.
struct KeptInputs {
    float *x, *u, *delta, *B;  // (d_inner), (d_inner), (d_inner), (B_rows)
    KeptInputs(const Layer& layer, float* kept, int64_t row)
        : x(kept + row * size(layer)), u(x + layer.d_inner), delta(u + layer.d_inner), B(delta + layer.d_inner) {}
    static int64_t size(const Layer& layer) { return 3 * layer.d_inner + layer.B_rows; }
};

// Aligned memory that is kept between steps.
template <typename T>
class Kept {
  public:
    T* at_least(int64_t size) {
        if (size > size_) memory_ = Scratch<T>(size), size_ = size;
        return memory_.get();
    }

  private:
    int64_t size_ = 0;
    Scratch<T> memory_{0};
};

// Memory for the activations of a step.
struct Workspace {
    std::mutex in_use;
    Kept<float> residual, normed, xz, projected, delta, y;
    Kept<char> packed, packed_dt;
};

// The first output of each chunk of each phase, and the end.
struct Chunks {
    int n_threads = 0;  // for which they were made
    std::vector<std::vector<int64_t>> bounds;
};

struct Stack {
    int64_t d_model = 0;
    Packed embedding{}, head{};
    Norm norm;
    std::vector<Layer> layers;
    Workspace workspace;
    Chunks chunks;
};

// Rows are (batch, length): the tokens of a sequence one after the other.
struct StackStep {
    const int64_t* ids = nullptr;
    int64_t rows = 0, length = 1;
    int n_threads = 1;
    const LayerState* states = nullptr;  // one for each layer
    float* logits = nullptr;             // (batch, n_logits, head.n_out)
    int64_t n_logits = 1;                // of the last tokens of each sequence
};

// The new state after the first counts[b] of the `length` tokens of each sequence, from the inputs that were kept.
struct StackReplay {
    const int64_t* counts = nullptr;
    int64_t batch = 0, length = 0;
    int n_threads = 1;
    const LayerState* states = nullptr;
};

}  // namespace anymamba
