"""The CUDA kernels of the convolution, the norm of a sum and the loss against a copy of as many bytes, and others'.

python -m benchmarks.gpu_memory_bound [--original FOLDER]

FOLDER holds causal-conv1d's compiled module `causal_conv1d_cuda`; without it the columns of the original are empty.
Times are medians of replays of a CUDA graph that goes through several sets of tensors, so that little is in the cache.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.kernels.add_norm import cuda as norm
from anymamba.kernels.add_norm import portable as separate
from anymamba.kernels.add_norm.arguments import NormArguments
from anymamba.kernels.causal_conv1d import cuda as conv
from anymamba.kernels.causal_conv1d.arguments import ConvArguments
from anymamba.ops.linear_cross_entropy import linear_cross_entropy
from anymamba.runtimes import nvrtc
from benchmarks.gpu import limits, machine, time_of, time_of_copy
from benchmarks.timing import table

BF16 = torch.bfloat16
CONVOLUTIONS = (
    (8, 2048, 1536, BF16),
    (1, 2048, 1536, BF16),
    (64, 1056, 128, BF16),
    (1, 1 << 17, 1536, BF16),
    (8, 2048, 1536, torch.float32),
)
"""batch, length, channels, dtype; width 4 with SiLU."""
WIDE = ((8, 2048, 1536, 5, BF16), (8, 2048, 1536, 16, BF16), (128, 1056, 64, 64, torch.float32))
"""The same with a width above four; the last one is the shift of H3 in selective copying."""
FORWARD_TARGET, BACKWARD_TARGET = 1.3, 1.5
"""Times of a copy of as many bytes, at most."""
DOCUMENTS = 1000
NORMS = ((16 * 2048, 768), (16 * 2048, 1024), (8 * 2048, 2560))
"""Rows and their size: the update in bfloat16, the residual in float32."""
LOSSES = ((16 * 2048, 768, 50280), (16 * 2048, 1024, 50280), (32 * 2048, 256, 256), (128 * 1056, 64, 16))
"""tokens, d_model, vocab."""
STEPS = ((1536, 1), (1536, 256), (5120, 256))
SETS = 4


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def time_of_each(runs: Iterable[Callable[[], object]]) -> float:
    """Milliseconds of one of several runs, queued one after the other."""
    some = list(runs)

    def all_of_them() -> None:
        for run in some:
            run()

    return time_of(all_of_them) / len(some)


def convolutions(module: Any | None) -> str:
    """Forward and backward of each shape, and of packed documents."""
    copied, _ = limits()
    rows = []
    for batch, length, d_inner, dtype in CONVOLUTIONS:
        weight, bias = normal(d_inner, 4, dtype=dtype), normal(d_inner, dtype=dtype)
        sets = [
            ConvArguments(normal(batch, length, d_inner, dtype=dtype), weight, bias, silu=True) for _ in range(SETS)
        ]
        dys = [torch.randn_like(a.x) for a in sets]
        ours = passes_of_conv(sets, dys)
        theirs = () if module is None else passes_of_original(module, sets, dys)
        name = f"{batch} x {length} x {d_inner}, {str(dtype).removeprefix('torch.')}"
        n_bytes = sets[0].x.nbytes
        copies = time_of_copy(2 * n_bytes, sets=SETS), time_of_copy(3 * n_bytes, inputs=2, sets=SETS)
        rows.append([name, *line_of_conv(n_bytes / copied, ours, copies, theirs)])
        if batch == 1 and length > 1 << 16:
            cuts = torch.randperm(length - 1)[: DOCUMENTS - 1].sort().values + 1
            offsets = torch.cat([torch.zeros(1), cuts, torch.tensor([length])]).int().cuda()
            packed = passes_of_conv([a._replace(cu_seqlens=offsets) for a in sets], dys)
            rows.append([f"{name}, {DOCUMENTS} documents", *line_of_conv(n_bytes / copied, packed, copies, ())])
        print(*rows[-1], file=sys.stderr)
        del sets, dys
        torch.cuda.empty_cache()
    passes = [[f"{name} (ms)", "of its bytes' time", "of a copy's time"] for name in ("forward", "backward")]
    return table(["convolution", *passes[0], *passes[1], "original forward / ours", "original backward / ours"], rows)


def wide_convolutions() -> str:
    """The convolution of more than four taps against its bytes, its arithmetic and torch's grouped convolution."""
    copied, _ = limits()
    rows = []
    for batch, length, d_inner, width, dtype in WIDE:
        weight = normal(d_inner, width, dtype=dtype)
        sets = [ConvArguments(normal(batch, length, d_inner, dtype=dtype), weight, None) for _ in range(SETS)]
        dys = [torch.randn_like(a.x) for a in sets]
        ours = passes_of_conv(sets, dys)
        x = sets[0].x.mT.contiguous().requires_grad_()
        taps = weight[:, None].detach().requires_grad_()

        def torchs(x: Tensor = x, taps: Tensor = taps, padding: int = width - 1) -> Tensor:
            return F.conv1d(x, taps, padding=padding, groups=len(taps))

        dy = torch.randn_like(torchs())
        forward = time_of(torchs)
        both = time_of(lambda x=x, taps=taps, dy=dy, run=torchs: torch.autograd.grad(run(), (x, taps), dy))
        cells = []
        for time, tensors, theirs in ((ours[0], 2, forward), (sum(ours), 5, both)):
            of_bytes = time / (tensors * sets[0].x.nbytes / copied)
            cells += [f"{time:.4f}", f"{of_bytes:.2f}", f"{theirs / time:.2f}"]
        rows.append([f"{batch} x {length} x {d_inner}, {str(dtype).removeprefix('torch.')}", str(width), *cells])
        print(*rows[-1], file=sys.stderr)
        del sets, dys
        torch.cuda.empty_cache()
    passes = [[f"{name} (ms)", "of its bytes' time", "torch / ours"] for name in ("forward", "forward + backward")]
    return table(["convolution", "taps", *passes[0], *passes[1]], rows)


def passes_of_conv(sets: list[ConvArguments], dys: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of forward and of backward."""
    zero = torch.zeros(sets[0].state_shape, device="cuda", dtype=sets[0].x.dtype)
    forward = time_of_each(partial(conv.forward, a) for a in sets)
    backward = time_of_each(partial(conv.backward, dy, zero, a) for a, dy in zip(sets, dys, strict=True))
    return forward, backward


def passes_of_original(module: Any, sets: list[ConvArguments], dys: list[Tensor]) -> tuple[float, float]:
    """The same by causal-conv1d, on tensors (batch, channels, length) with the faster of its two layouts."""
    best = [float("inf")] * 2
    for channels_last in (False, True):
        turned = [
            [t.mT if channels_last else t.mT.contiguous() for t in (a.x, dy)] for a, dy in zip(sets, dys, strict=True)
        ]
        out = torch.empty_like(turned[0][0])

        times = (
            time_of_each(partial(original_forward, module, sets[0], x, out) for x, _ in turned),
            time_of_each(partial(original_backward, module, sets[0], x, dy, out) for x, dy in turned),
        )
        best = [min(a, b) for a, b in zip(best, times, strict=True)]
    return best[0], best[1]


def original_forward(module: Any, a: ConvArguments, x: Tensor, out: Tensor) -> None:
    module.causal_conv1d_fwd(x, a.weight, a.bias, None, None, out, None, True)


def original_backward(module: Any, a: ConvArguments, x: Tensor, dy: Tensor, dx: Tensor) -> None:
    sums = [torch.zeros_like(t, dtype=torch.float32) for t in (a.weight, a.bias) if t is not None]
    module.causal_conv1d_bwd(x, a.weight, a.bias, dy, None, None, None, dx, *sums, None, True)


def line_of_conv(
    of_x: float, ours: tuple[float, float], copies: tuple[float, float], theirs: tuple[float, ...]
) -> list[str]:
    """Cells of a row; `of_x` is the time of the bytes of x, `copies` that of kernels that move as many bytes."""
    cells = []
    for time, tensors, copy, target in zip(ours, (2, 3), copies, (FORWARD_TARGET, BACKWARD_TARGET), strict=True):
        cells += [f"{time:.4f}", f"**{time / (tensors * of_x):.2f}** (limit {target})", f"{time / copy:.2f}"]
    return cells + ([f"**{t / o:.2f}**" for t, o in zip(theirs, ours, strict=True)] if theirs else ["", ""])


def norms() -> str:
    """The addition and the norm against their bytes, and against torch's own operations."""
    copied, _ = limits()
    rows = []
    for n_rows, size in NORMS:
        for subtract_mean in (False, True):
            weight, bias = normal(size), normal(size) if subtract_mean else None
            sets = [
                NormArguments(
                    normal(n_rows, size), normal(n_rows, size, dtype=torch.float32), weight, bias, 1e-5, subtract_mean
                )
                for _ in range(SETS)
            ]
            dys, dtotals = ([normal(n_rows, size, dtype=d) for _ in range(SETS)] for d in (BF16, torch.float32))
            saved = [norm.forward(a, True)[2] for a in sets]
            forward = time_of_each(partial(norm.forward, a, True) for a in sets)
            work = list(zip(dys, dtotals, sets, saved, strict=True))
            backward = time_of_each(partial(norm.backward, *w) for w in work)
            apart = time_of_each(partial(separate.forward, a, False) for a in sets)
            n_bytes = 12 * n_rows * size, 18 * n_rows * size
            copies = time_of_copy(n_bytes[0], sets=SETS), time_of_copy(n_bytes[1], inputs=2, sets=SETS)
            name = f"{n_rows} x {size}, {'layer norm' if subtract_mean else 'RMS norm'}"
            cells: list[str] = []
            for time, moved, copy in zip((forward, backward), n_bytes, copies, strict=True):
                cells += [f"{time:.4f}", f"**{time / (moved / copied):.2f}**", f"{time / copy:.2f}"]
            rows.append([name, *cells, f"{apart / forward:.2f}"])
            print(*rows[-1], file=sys.stderr)
    passes = [[f"{name} (ms)", "of its bytes' time", "of a copy's time"] for name in ("forward", "backward")]
    return table(["norm of a sum", *passes[0], *passes[1], "separate operations / ours, forward"], rows)


def losses() -> str:
    """The loss with its gradients against its three products, and against torch's loss of whole logits."""
    rows = []
    for n_tokens, d_model, vocab in LOSSES:
        x, weight = (
            normal(n_tokens, d_model).requires_grad_(),
            (0.02 * normal(vocab, d_model)).detach().requires_grad_(),
        )
        labels = torch.randint(vocab, (n_tokens,), device="cuda")

        @torch.no_grad()
        def products(x: Tensor = x, weight: Tensor = weight) -> None:
            for part in x.split(4096):
                logits = part @ weight.T
                logits @ weight
                logits.T @ part

        def whole(x: Tensor = x, weight: Tensor = weight, labels: Tensor = labels) -> Tensor:
            return F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")

        def fused(x: Tensor = x, weight: Tensor = weight, labels: Tensor = labels) -> Tensor:
            return linear_cross_entropy(x, weight, labels)

        def trained(loss: Callable[[], Tensor], x: Tensor = x, weight: Tensor = weight) -> Callable[[], object]:
            return lambda: torch.autograd.grad(loss(), (x, weight))

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ours = time_of(trained(fused), repeats=5)
        memory = (torch.cuda.max_memory_allocated() - before) / 2**30
        times = (time_of(products, repeats=5), time_of(trained(whole), repeats=5))
        rows.append(
            [
                f"{n_tokens} x {d_model} x {vocab}",
                f"{ours:.2f}",
                f"**{ours / times[0]:.2f}**",
                f"{memory:.2f}",
                f"{times[1] / ours:.2f}",
            ]
        )
        print(*rows[-1], file=sys.stderr)
        torch.cuda.empty_cache()
    header = ["loss and its gradients", "ms", "times its products", "memory (GiB)", "torch with whole logits / ours"]
    return table(header, rows)


def steps() -> str:
    """One token of the convolution, of many in a graph."""
    copied, _ = limits()
    rows = []
    for d_inner, batch in STEPS:
        a = ConvArguments(
            normal(batch, 1, d_inner), normal(d_inner, 4), normal(d_inner), normal(batch, 3, d_inner), silu=True
        )
        micro = 1e3 * time_of(partial(conv.step, a), in_graph=32)
        n_bytes = 8 * a.x.nbytes + a.weight.nbytes
        rows.append([str(d_inner), str(batch), f"{micro:.2f}", f"{1e3 * n_bytes / copied:.2f}"])
    return table(["channels", "batch", "step in a graph (µs)", "its bytes (µs)"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--original", metavar="FOLDER", help="where causal-conv1d's compiled causal_conv1d_cuda is")
    folder = parser.parse_args().original
    if nvrtc.reason():
        sys.exit(f"the kernels do not run here: {nvrtc.reason()}")
    module = None
    if folder:
        sys.path.insert(0, folder)
        module = importlib.import_module("causal_conv1d_cuda")
    print(machine())
    print("\n\n".join(["", convolutions(module), wide_convolutions(), norms(), losses(), steps()]))


if __name__ == "__main__":
    main()
