// Tokens through a whole model of Mamba blocks, for one instruction set: one token of each sequence, or several.
//
// A step is four phases per layer, whose chunks the team's threads claim, and the head:
//
//     in_proj    some rows of in_proj; convolution and SiLU of the channels of u, SiLU of those of z
//     x_proj     some rows of x_proj
//     channels   some channels: dt_proj, softplus, recurrence, gate
//     out_proj   some rows of out_proj, added to the residual
//
// Between phases one thread computes the norms and packs the next product's activations. Activations are float32.
// All rows of a step go through a product together. The convolution and the recurrence of a chunk of channels take the
// rows in order; a token after the first of its sequence reads the state that the one before has written. A row is
// computed in the same way wherever it stands, so its bits do not depend on how a text is cut.
//
// Notation: c is a channel, n an index of the state; vectors hold adjacent channels, in the recurrence adjacent n.

#include "stack.h"

#include <algorithm>
#include <utility>

#include "kernels.h"
#include "stack_chunks.h"
#include "stack_recurrence.h"
#include "stack_replay.h"
#include "team.h"
#include "threads.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

constexpr int64_t MOST_ROWS = 256;

bool is_present(const Packed& matrix) { return matrix.data != nullptr; }

// y = matrix x + bias for outputs [begin, end) of each row.
void multiply(const Packed& matrix, const float* bias, const void* x, int64_t rows, float* y, int64_t begin,
              int64_t end) {
    product(matrix, x, rows, y, matrix.n_out, begin, end);
    if (!bias) return;
    for (int64_t r = 0; r < rows; r++)
        for_vectors(begin, end, [&](int64_t o, int count) {
            float* const out = y + r * matrix.n_out;
            write(out, o, count, read(out, o, count) + read(bias, o, count));
        });
}

class Step {
  public:
    Step(Stack& stack, const StackStep& args, int64_t first_row, int64_t rows)
        : stack(stack), args(args), first_row(first_row), rows(rows) {
        int64_t d_inner = 0, projected = 0, packed = packed_bytes(stack.head), packed_dt = 0;
        for (const Layer& layer : stack.layers) {
            d_inner = std::max(d_inner, layer.d_inner);
            projected = std::max(projected, layer.x_proj.n_out);
            packed_dt = std::max(packed_dt, packed_bytes(layer.dt_proj));
            for (const Packed* matrix : {&layer.in_proj, &layer.x_proj, &layer.out_proj})
                packed = std::max(packed, packed_bytes(*matrix));
        }
        Workspace& space = stack.workspace;
        residual = space.residual.at_least(rows * stack.d_model);
        normed = space.normed.at_least(rows * std::max(stack.d_model, d_inner));
        xz = space.xz.at_least(rows * 2 * d_inner);
        delta = space.delta.at_least(rows * d_inner);
        y = space.y.at_least(rows * std::max(d_inner, stack.d_model));
        projected_ = space.projected.at_least(rows * projected);
        packed_ = space.packed.at_least(packed);
        packed_dt_ = space.packed_dt.at_least(packed_dt);
        head_begin = logits_before(first_row);
        head_rows = logits_before(first_row + rows) - head_begin;
        for (int64_t r = 0; r < rows; r++)
            unpack_row(stack.embedding, args.ids[first_row + r], residual + r * stack.d_model);
        if (stack.layers.empty())
            prepare_head();
        else
            prepare(stack.layers[0].norm, stack.layers[0].in_proj);
    }

    int64_t n_phases() const { return static_cast<int64_t>(stack.chunks.bounds.size()); }

    int64_t n_chunks(int64_t phase) const { return static_cast<int64_t>(stack.chunks.bounds[phase].size()) - 1; }

    void chunk(int64_t phase, int64_t piece) const {
        const int64_t i = phase / PHASES, begin = stack.chunks.bounds[phase][piece];
        const int64_t end = stack.chunks.bounds[phase][piece + 1];
        if (i == n_layers()) return project(begin, end);
        const Layer& layer = stack.layers[i];
        switch (phase % PHASES) {
            case IN_PROJ: return project_in(layer, args.states[i], begin, end);
            case X_PROJ: return select(layer, begin, end);
            case CHANNELS: return recur(layer, args.states[i], begin, end);
            default: return project_out(layer, begin, end);
        }
    }

    void finish(int64_t phase) const {
        const int64_t i = phase / PHASES;
        if (i == n_layers()) return;
        const Layer& layer = stack.layers[i];
        switch (phase % PHASES) {
            case IN_PROJ:
                if (is_present(layer.x_proj)) pack(layer.x_proj, xz, 2 * layer.d_inner, packed_);
                return;
            case X_PROJ: return finish_selection(layer, args.states[i]);
            case CHANNELS: return finish_channels(layer);
            default:
                if (i + 1 < n_layers()) return prepare(stack.layers[i + 1].norm, stack.layers[i + 1].in_proj);
                return prepare_head();
        }
    }

  private:
    Stack& stack;
    const StackStep& args;
    const int64_t first_row, rows;
    int64_t head_begin, head_rows;  // rows of the logits that this step computes
    // Activations, one row after the other: xz has 2 d_inner columns, u before the gate z.
    float *residual, *normed, *xz, *projected_, *delta, *y;
    char *packed_, *packed_dt_;

    int64_t n_layers() const { return static_cast<int64_t>(stack.layers.size()); }
    int64_t packed_bytes(const Packed& matrix) const {
        return is_present(matrix) ? activation_bytes(Format(matrix.format), rows, matrix.n_in) : 0;
    }
    // Rows of the logits of the rows before this one.
    int64_t logits_before(int64_t row) const {
        const int64_t without = args.length - args.n_logits;
        return row / args.length * args.n_logits + std::max<int64_t>(0, row % args.length - without);
    }
    // The row's sequence, and whether the row is its first token.
    int64_t sequence(int64_t row) const { return (first_row + row) / args.length; }
    bool is_first(int64_t row) const { return (first_row + row) % args.length == 0; }

    void pack(const Packed& matrix, const float* x, int64_t stride, char* out) const {
        pack_activations(Format(matrix.format), x, stride, rows, matrix.n_in, out);
    }

    // The input of in_proj.
    void prepare(const Norm& norm, const Packed& matrix) const {
        const int64_t size = stack.d_model;
        for (int64_t r = 0; r < rows; r++) normalize(norm, residual + r * size, size, normed + r * size);
        pack(matrix, normed, size, packed_);
    }

    // The input of the head: only the rows whose logits are wanted.
    void prepare_head() const {
        const int64_t size = stack.d_model;
        for (int64_t r = 0; r < rows; r++) {
            const int64_t place = logits_before(first_row + r);
            if (logits_before(first_row + r + 1) > place)
                normalize(stack.norm, residual + r * size, size, normed + (place - head_begin) * size);
        }
        pack_activations(Format(stack.head.format), normed, size, head_rows, size, packed_);
    }

    // The phases, for outputs or channels [begin, end).

    void project(int64_t begin, int64_t end) const {
        const Packed& head = stack.head;
        if (head_rows == 0) return;
        multiply(head, nullptr, packed_, head_rows, args.logits + head_begin * head.n_out, begin, end);
    }

    void project_in(const Layer& layer, const LayerState& state, int64_t begin, int64_t end) const {
        const int64_t D = layer.d_inner;
        multiply(layer.in_proj, layer.in_bias, packed_, rows, xz, begin, end);
        for (int64_t r = 0; r < rows; r++) {
            float* const row = xz + r * 2 * D;
            for_vectors(begin, std::min(end, D), [&](int64_t c, int count) {
                write(row, c, count, convolve(layer, state, r, c, count, read(row, c, count)));
            });
            for_vectors(std::max(begin, D), std::max(end, D),
                        [&](int64_t c, int count) { write(row, c, count, silu_of(read(row, c, count))); });
        }
    }

    // SiLU of the convolution, whose newest input is x; the state moves on by one input.
    ANYMAMBA_ONE_COPY vfloat convolve(const Layer& layer, const LayerState& state, int64_t row, int64_t c, int count,
                                      vfloat x) const {
        const int64_t D = layer.d_inner, before = layer.d_conv - 1, place = sequence(row) * before * D + c;
        const float* const inputs = is_first(row) ? state.conv : state.new_conv;
        vfloat sum = read(layer.conv_bias, c, count);
        for (int64_t i = 0; i < before; i++) {
            const vfloat input = read(inputs, place + i * D, count);
            sum += read(layer.conv_weight, i * D + c, count) * input;
            if (i > 0) write(state.new_conv, place + (i - 1) * D, count, input);
        }
        if (before > 0) write(state.new_conv, place + (before - 1) * D, count, x);
        const vfloat u = silu(sum + read(layer.conv_weight, before * D + c, count) * x);
        if (state.kept) {
            const KeptInputs kept(layer, state.kept, first_row + row);
            write(kept.x, c, count, x);
            write(kept.u, c, count, u);
        }
        return u;
    }

    void select(const Layer& layer, int64_t begin, int64_t end) const {
        if (is_present(layer.x_proj)) multiply(layer.x_proj, nullptr, packed_, rows, projected_, begin, end);
    }

    void finish_selection(const Layer& layer, const LayerState& state) const {
        const int64_t size = layer.x_proj.n_out;
        for (int64_t r = 0; r < rows; r++) {
            float* part = projected_ + r * size;
            for (const auto& [norm, columns] :
                 {std::pair(&layer.dt_norm, layer.dt_rows), std::pair(&layer.B_norm, layer.B_rows),
                  std::pair(&layer.C_norm, layer.C_rows)}) {
                if (norm->present) normalize(*norm, part, columns, part);
                part += columns;
            }
            if (state.kept)
                std::copy_n(selected_B(layer, r), layer.B_rows, KeptInputs(layer, state.kept, first_row + r).B);
        }
        if (is_present(layer.dt_proj)) pack(layer.dt_proj, projected_, size, packed_dt_);
    }

    void recur(const Layer& layer, const LayerState& state, int64_t begin, int64_t end) const {
        if (is_present(layer.dt_proj)) multiply(layer.dt_proj, nullptr, packed_dt_, rows, delta, begin, end);
        for (int64_t r = 0; r < rows; r++)
            for_vectors(begin, end, [&](int64_t c, int count) { recur_vector(layer, state, r, c, count); });
    }

    const float* selected_B(const Layer& layer, int64_t r) const {
        return projected_ + r * layer.x_proj.n_out + layer.dt_rows;
    }

    // delta before its bias.
    vfloat raw_step(const Layer& layer, int64_t r, int64_t c, int count) const {
        if (is_present(layer.dt_proj)) return read(delta, r * layer.d_inner + c, count);
        if (!layer.dt_blocks) return vfloat{};
        const float* const dt = projected_ + r * layer.x_proj.n_out;
        const int64_t place = c / CHANNEL_BLOCK * CHANNEL_BLOCK * layer.dt_rows + c % CHANNEL_BLOCK;
        switch (static_cast<DType>(layer.dt_dtype)) {
            case DType::bfloat16: return sum_of_columns<DType::bfloat16>(layer.dt_blocks, place, dt, layer.dt_rows);
            case DType::float16: return sum_of_columns<DType::float16>(layer.dt_blocks, place, dt, layer.dt_rows);
            default: return sum_of_columns<F32>(layer.dt_blocks, place, dt, layer.dt_rows);
        }
    }

    template <DType TYPE>
    static vfloat sum_of_columns(const void* blocks, int64_t place, const float* x, int64_t n) {
        vfloat sums[4] = {};
        int64_t i = 0;
        for (; i + 4 <= n; i += 4)
            for (int k = 0; k < 4; k++)
                sums[k] += x[i + k] * read_floats(blocks, TYPE, place + (i + k) * CHANNEL_BLOCK, W);
        for (; i < n; i++) sums[0] += x[i] * read_floats(blocks, TYPE, place + i * CHANNEL_BLOCK, W);
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }

    // Channels [c, c + count) of one row, from delta before its bias to the gated y.
    ANYMAMBA_ONE_COPY void recur_vector(const Layer& layer, const LayerState& state, int64_t r, int64_t c,
                                        int count) const {
        const int64_t D = layer.d_inner, place = sequence(r) * D * layer.d_state;
        const float* const row = xz + r * 2 * D;
        const vfloat u = read(row, c, count);
        const vfloat raw = raw_step(layer, r, c, count);
        const vfloat step = softplus(raw + read(layer.delta_bias, c, count));
        if (state.kept) write(KeptInputs(layer, state.kept, first_row + r).delta, c, count, step);
        const float *const B = selected_B(layer, r), *const C = B + layer.B_rows;
        const float* const h = is_first(r) ? state.ssm : state.new_ssm;
        const vfloat sums = run_vector(layer, c, count, step, u, B, C, h + place, state.new_ssm + place);
        write(y, r * D + c, count, (sums + read(layer.D, c, count) * u) * read(row, D + c, count));
    }

    void finish_channels(const Layer& layer) const {
        const int64_t D = layer.d_inner;
        if (layer.output_norm.present)
            for (int64_t r = 0; r < rows; r++) normalize(layer.output_norm, y + r * D, D, y + r * D);
        pack(layer.out_proj, y, D, packed_);
    }

    void project_out(const Layer& layer, int64_t begin, int64_t end) const {
        const int64_t size = stack.d_model;
        multiply(layer.out_proj, layer.out_bias, packed_, rows, normed, begin, end);
        for (int64_t r = 0; r < rows; r++)
            for_vectors(begin, end, [&](int64_t o, int count) {
                const int64_t at = r * size + o;
                write(residual, at, count, read(residual, at, count) + read(normed, at, count));
            });
    }
};

}  // namespace

void stack_replay(const Stack& stack, const StackReplay& args) {
    constexpr int64_t CHANNELS_PER_TASK = 128;
    int64_t widest = 0;
    for (const Layer& layer : stack.layers) widest = std::max(widest, layer.d_inner);
    const int64_t pieces = (widest + CHANNELS_PER_TASK - 1) / CHANNELS_PER_TASK;
    const auto n_layers = static_cast<int64_t>(stack.layers.size());
    parallel_for(args.batch * n_layers * pieces, args.n_threads, [&](int64_t task) {
        const int64_t b = task / (n_layers * pieces), i = task / pieces % n_layers;
        const int64_t begin = task % pieces * CHANNELS_PER_TASK;
        const Layer& layer = stack.layers[i];
        replay_channels(layer, args.states[i], b * args.length, args.counts[b], b, begin,
                        std::min(layer.d_inner, begin + CHANNELS_PER_TASK));
    });
}

void stack_step(Stack& stack, const StackStep& args) {
    const std::lock_guard<std::mutex> lock(stack.workspace.in_use);
    if (stack.chunks.n_threads != args.n_threads) cut_into_chunks(stack, args.n_threads);
    for (int64_t first = 0; first < args.rows; first += MOST_ROWS) {
        const Step step(stack, args, first, std::min(MOST_ROWS, args.rows - first));
        Team<Step>(step).run(args.n_threads);
    }
}

}  // namespace anymamba::ANYMAMBA_ISA
