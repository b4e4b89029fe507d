// The selective scan for one instruction set: forward and backward.
//
// Notation. A task is one row of the batch, some adjacent channels of one group and a chunk of time. The chunk is the
// whole length, except for narrow and long shapes. A chunk is split into tiles of a.tile steps. In a tile, vectors of
// channels ("blocks") are processed one after the other: lanes are channels, and the states of a block stay in
// registers for all steps. Rows of a tile are (step, lane), states (n, lane).
//
// Several chunks take three phases. First, each chunk computes the state that it passes on if it starts from zero; the
// first chunk has its initial state and is computed completely. From these follows the state at the start of each
// chunk. Then the other chunks are computed.
//
// Incomplete vectors are padded with zeros in scratch memory. The split and the order of every sum depend only on the
// shapes. Sums over time are added up tile by tile (sums.h). Forward saves the states before each tile; backward
// recomputes the states inside it.

#include "kernels.h"
#include "scan_task.h"
#include "sums.h"
#include "threads.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

// The work on a chunk: all of it in the first phase, because its start is known; only what it passes on; or all of it
// in the last phase.
enum class Part { first, summary, rest };

template <typename T>
class ForwardTask : Task<T> {
    using Base = Task<T>;
    using Base::a, Base::row, Base::W, Base::states;
    using typename Base::V;

  public:
    using Base::Base;

    void work(Part part) const {
        for (int i = 0; i < this->n_blocks; i++) {
            if (part == Part::rest) this->arrive(this->block(i), 0, 1, this->block(i).h);
            if (part == Part::summary) std::fill_n(this->decays(i), states, T(1));
        }
        for (int64_t tile = this->first_tile; tile < this->last_tile; tile++) {
            const int64_t first = tile * a.tile, last = std::min(first + a.tile, a.length);
            const auto pieces = pieces_of(a, row, first, last);
            this->read_matrices(first, int(last - first));
            for (int i = 0; i < this->n_blocks; i++) {
                Block<T> k = this->block(i);
                this->fetch_ahead(k, i, first, std::min(last, a.length - 1), a.y.data ? a.y : a.u);
                if (a.saved && part != Part::summary) save(k, tile);
                this->template read_rows<false>(k, first, int(last - first));
                for (const Piece& p : pieces) {
                    if (p.starts()) this->start(k, p.index);
                    if (part == Part::summary) {
                        run<T, false, false>(k, int(p.first - first), int(p.last - first));
                        continue;
                    }
                    run<T, false>(k, int(p.first - first), int(p.last - first));
                    if (p.ends()) this->scatter(k.h, p.index * a.d_inner + k.channel, k.count, a.last_state);
                }
                if (part == Part::summary)
                    run_decay(k, this->decays(i), this->step_sums(i), 0, int(last - first));
                else
                    write(k, first, int(last - first));
            }
        }
        if (part == Part::summary || (part == Part::first && this->n_chunks > 1))
            for (int i = 0; i < this->n_blocks; i++) this->hand_over(this->block(i), this->block(i).h, i);
    }

  private:
    void save(const Block<T>& k, int64_t tile) const {
        for (int64_t n = 0; n < a.d_state; n++)
            std::copy_n(k.h + n * W, k.count, this->saved(tile) + n * a.d_inner + k.channel);
    }

    void write(const Block<T>& k, int64_t first, int n_steps) const {
        for (int t = 0; t < n_steps; t++) {
            V y = load<T>(k.y + t * W);
            if (a.z.data) {
                const V z = read_row<T>(a.z.data, a.z.type(), a.z.at(row, first + t) + k.channel, k.count);
                y *= silu(z);
            }
            write_row<T>(a.y.data, a.y.type(), a.y.at(row, first + t) + k.channel, k.count, y);
        }
    }
};

template <typename T>
class BackwardTask : Task<T> {
    using Base = Task<T>;
    using Base::a, Base::row, Base::W, Base::states, Base::rows;
    using typename Base::V;

  public:
    BackwardTask(const ScanArgs& args, int64_t row, int64_t chunk, int64_t range)
        : Base(args, row, chunk, range),
          kept_(2 * a.tile * states),
          dB_(a.selective_B ? a.tile * states : 0),
          dC_(a.selective_C ? a.tile * states : 0),
          dh_(this->n_blocks * states),
          sums_(this->n_blocks, a.d_state * (1 + !a.selective_B + !a.selective_C) + 2) {}

    void work(Part part) const {
        if (part == Part::summary) return summarize();
        if (part == Part::rest)
            for (int i = 0; i < this->n_blocks; i++)
                this->arrive(block_back(i), this->n_chunks - 1, -1, block_back(i).dh);
        for (int64_t tile = this->last_tile - 1; tile >= this->first_tile; tile--) {
            const int64_t first = tile * a.tile, last = std::min(first + a.tile, a.length);
            const auto pieces = pieces_of(a, row, first, last);
            this->read_matrices(first, int(last - first));
            if (a.selective_B) std::fill_n(dB_.get(), a.tile * states, T(0));
            if (a.selective_C) std::fill_n(dC_.get(), a.tile * states, T(0));
            for (int i = 0; i < this->n_blocks; i++) work_on(i, tile, first, int(last - first), pieces);
            if (a.selective_B) reduce(dB_.get(), a.dB_parts, first, int(last - first));
            if (a.selective_C) reduce(dC_.get(), a.dC_parts, first, int(last - first));
        }
        for (int i = 0; i < this->n_blocks; i++) {
            finish(i);
            if (this->n_chunks > 1 && part == Part::first) this->hand_over(block_back(i), block_back(i).dh, i);
        }
    }

  private:
    Scratch<T> kept_, dB_, dC_, dh_;
    Sums<T> sums_;  // sums over time for each block: dD, dbias, dA, and dB and dC of a constant B and C

    // Their indices.
    int64_t first_dA() const { return 2; }
    int64_t first_dB() const { return first_dA() + a.d_state; }
    int64_t first_dC() const { return first_dB() + (a.selective_B ? 0 : a.d_state); }

    Block<T> block_back(int i) const {
        Block<T> k = this->block(i);
        k.decay = kept_.get(), k.before = kept_.get() + a.tile * states;
        k.dh = dh_.get() + i * states, k.dA = sums_.tile(i) + first_dA() * W;
        k.dB = a.selective_B ? dB_.get() : sums_.tile(i) + first_dB() * W;
        k.dC = a.selective_C ? dC_.get() : sums_.tile(i) + first_dC() * W;
        k.dy = rows(Base::DY), k.ddelta = rows(Base::DDELTA), k.ddrive = rows(Base::DDRIVE);
        return k;
    }

    void work_on(int i, int64_t tile, int64_t first, int n_steps, const std::vector<Piece>& pieces) const {
        Block<T> k = block_back(i);
        this->fetch_ahead(k, i, first, std::max<int64_t>(first - a.tile, 0), a.dy);
        for (int64_t n = 0; n < a.d_state; n++)
            std::copy_n(this->saved(tile) + n * a.d_inner + k.channel, k.count, k.h + n * W);
        this->template read_rows<true>(k, first, n_steps);
        for (const Piece& p : pieces) {
            if (p.starts()) this->start(k, p.index);
            run<T, true>(k, int(p.first - first), int(p.last - first));
        }
        read_gradients(k, first, n_steps, true);
        for (auto p = pieces.rbegin(); p != pieces.rend(); ++p) {
            const int64_t channel = p->index * a.d_inner + k.channel;
            if (p->ends()) this->gather(a.dlast_state, channel, k.count, k.dh);
            run_back<T>(k, int(p->first - first), int(p->last - first));
            if (!p->starts()) continue;
            if (a.dinitial_state) this->scatter(k.dh, channel, k.count, a.dinitial_state);
            std::fill_n(k.dh, states, T(0));
        }
        write_gradients(k, sums_.tile(i), first, n_steps);
        sums_.close_tile(i);
    }

    void summarize() const {
        for (int i = 0; i < this->n_blocks; i++) std::fill_n(this->decays(i), states, T(1));
        for (int64_t tile = this->last_tile - 1; tile >= this->first_tile; tile--) {
            const int64_t first = tile * a.tile, last = std::min(first + a.tile, a.length);
            const auto pieces = pieces_of(a, row, first, last);
            this->read_matrices(first, int(last - first));
            for (int i = 0; i < this->n_blocks; i++) {
                Block<T> k = block_back(i);
                this->template read_rows<false>(k, first, int(last - first));
                read_gradients(k, first, int(last - first), false);
                for (auto p = pieces.rbegin(); p != pieces.rend(); ++p) {
                    if (p->ends()) this->gather(a.dlast_state, p->index * a.d_inner + k.channel, k.count, k.dh);
                    run_dstate(k, int(p->first - first), int(p->last - first));
                    if (p->starts() && p->first > 0) std::fill_n(k.dh, states, T(0));  // the row's first state has one
                }
                run_decay(k, this->decays(i), this->step_sums(i), 0, int(last - first));
            }
        }
        for (int i = 0; i < this->n_blocks; i++) this->hand_over(block_back(i), block_back(i).dh, i);
    }

    // The gradient of the scan's output before the gate, from that of y; with a gate, the gradient of z is written.
    void read_gradients(const Block<T>& k, int64_t first, int n_steps, bool with_dz) const {
        for (int t = 0; t < n_steps; t++) {
            V dy = read_row<T>(a.dy.data, a.dy.type(), a.dy.at(row, first + t) + k.channel, k.count);
            if (a.z.data) {
                const V z = read_row<T>(a.z.data, a.z.type(), a.z.at(row, first + t) + k.channel, k.count);
                const V gate = sigmoid(z), dz = dy * load<T>(k.y + t * W) * gate * (1 + z * (1 - gate));
                if (with_dz) write_row<T>(a.dz.data, a.dz.type(), a.dz.at(row, first + t) + k.channel, k.count, dz);
                dy *= z * gate;
            }
            store<T>(k.dy + t * W, dy);
            store<T>(k.ddelta + t * W, V{});
            store<T>(k.ddrive + t * W, V{});
        }
    }

    void write_gradients(const Block<T>& k, T* sums, int64_t first, int n_steps) const {
        const V D = this->vector(a.D, k);
        V dD{}, dbias{};
        for (int t = 0; t < n_steps; t++) {
            const V u = load<T>(rows(Base::U) + t * W), dy = load<T>(k.dy + t * W), ddrive = load<T>(k.ddrive + t * W);
            const V du = ddrive * load<T>(k.delta + t * W) + D * dy;
            V draw = load<T>(k.ddelta + t * W) + ddrive * u;
            if (a.softplus) {
                const V raw = load<T>(rows(Base::RAW) + t * W);
                draw = raw > 20 ? draw : draw * sigmoid(raw);
            }
            write_row<T>(a.du.data, a.du.type(), a.du.at(row, first + t) + k.channel, k.count, du);
            write_row<T>(a.ddelta.data, a.ddelta.type(), a.ddelta.at(row, first + t) + k.channel, k.count, draw);
            dD += dy * u;
            dbias += draw;
        }
        store<T>(sums, dD);
        store<T>(sums + W, dbias);
    }

    // Sum (step, n, lane) over lanes into the partial sums of this range.
    void reduce(const T* sums, void* parts, int64_t first, int n_steps) const {
        const int64_t n_ranges = a.n_groups * this->ranges_per_group;
        T* target = static_cast<T*>(parts) + ((row * n_ranges + this->range) * a.length + first) * a.d_state;
        for (int64_t j = 0; j < n_steps * a.d_state; j++) target[j] = sum_of_lanes<T, W>(sums + j * W);
    }

    // Write the sums over time.
    void finish(int i) const {
        const Block<T> k = block_back(i);
        const int64_t index = row * this->n_chunks + this->chunk;
        const auto write = [&](void* parts, int64_t rows, int64_t n, int64_t sum) {
            write_row<T>(parts, OWN_DTYPE<T>, (index * rows + n) * a.d_inner + k.channel, k.count, sums_.total(i, sum));
        };
        for (int64_t n = 0; n < a.d_state; n++) {
            write(a.dA_parts, a.d_state, n, first_dA() + n);
            if (!a.selective_B) write(a.dB_parts, a.d_state, n, first_dB() + n);
            if (!a.selective_C) write(a.dC_parts, a.d_state, n, first_dC() + n);
        }
        if (a.dD_parts) write(a.dD_parts, 1, 0, 0);
        if (a.dbias_parts) write(a.dbias_parts, 1, 0, 1);
    }
};

// `known` is the chunk that receives no state from another one: the first one, or for backward the last one.
template <typename AnyTask>
void work(const ScanArgs& a, bool backward) {
    const int64_t per_group = a.d_inner / a.n_groups, n_ranges = a.n_groups * ((per_group + a.range - 1) / a.range);
    const int64_t n_chunks = (a.length + a.chunk - 1) / a.chunk, known = backward ? n_chunks - 1 : 0;
    const int64_t end = backward ? 0 : n_chunks - 1;  // passes nothing on
    const auto all = [&](int64_t n, const auto& chunk_of, const auto& part_of) {
        parallel_for(a.batch * n_ranges * n, a.n_threads, [&](int64_t i) {
            const int64_t chunk = chunk_of(i / n_ranges % n);
            AnyTask(a, i / n_ranges / n, chunk, i % n_ranges).work(part_of(chunk));
        });
    };
    // The most expensive tasks start first: the known chunk is the largest task of the first phase.
    const auto nth = [&](int64_t i) { return backward ? n_chunks - 1 - i : i; };
    all(std::max<int64_t>(n_chunks - 1, 1), nth,
        [&](int64_t chunk) { return chunk == known ? Part::first : Part::summary; });
    if (known != end) all(n_chunks - 1, [&](int64_t i) { return nth(i + 1); }, [](int64_t) { return Part::rest; });
}

// What leaves each chunk if nothing arrives at it, and the decay of what does: the first phase, for all chunks.
template <typename AnyTask>
void summarize(const ScanArgs& a) {
    const int64_t per_group = a.d_inner / a.n_groups, n_ranges = a.n_groups * ((per_group + a.range - 1) / a.range);
    const int64_t n_chunks = (a.length + a.chunk - 1) / a.chunk;
    parallel_for(a.batch * n_ranges * n_chunks, a.n_threads, [&](int64_t i) {
        AnyTask(a, i / n_ranges / n_chunks, i / n_ranges % n_chunks, i % n_ranges).work(Part::summary);
    });
}

}  // namespace

void scan_forward(const ScanArgs& a) {
    a.is_double ? work<ForwardTask<double>>(a, false) : work<ForwardTask<float>>(a, false);
}

void scan_backward(const ScanArgs& a) {
    a.is_double ? work<BackwardTask<double>>(a, true) : work<BackwardTask<float>>(a, true);
}

void scan_summary(const ScanArgs& a, bool backward) {
    if (backward)
        a.is_double ? summarize<BackwardTask<double>>(a) : summarize<BackwardTask<float>>(a);
    else
        a.is_double ? summarize<ForwardTask<double>>(a) : summarize<ForwardTask<float>>(a);
}

}  // namespace anymamba::ANYMAMBA_ISA
