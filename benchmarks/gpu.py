"""The CUDA kernels of the scan against the limits of the GPU, on packed sequences, and against mamba-ssm's kernels.

python -m benchmarks.gpu [--original FOLDER]

FOLDER holds mamba-ssm's compiled module `selective_scan_cuda`; without it the columns of the original are empty. Times
are medians over replays of a CUDA graph, so they contain only the work of the GPU and no Python.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from anymamba.kernels.selective_scan import cuda, triton
from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.runtimes import nvrtc
from anymamba.runtimes.cubins import CACHE_VARIABLE
from benchmarks.timing import table

SHAPES = {
    (8, 2048, 1536, torch.bfloat16): (2.2, 2.2),
    (1, 2048, 1536, torch.bfloat16): (1.1, 1.35),
    (64, 1056, 128, torch.bfloat16): (5.0, 5.0),
    (1, 1 << 17, 1536, torch.bfloat16): (1.65, 2.0),
    (1, 1 << 20, 256, torch.bfloat16): (2.9, 2.7),
    (8, 2048, 1536, torch.float32): (4.0, 2.6),
}
"""For each (batch, length, channels, dtype): how many times as fast as the original it should be, for forward and for
forward with backward."""

D_STATE = 16
DOCUMENTS = 1000
PACKED_TARGET = 1.15
TRITON_TARGETS = (1.2, 0.9)
GENERAL_SHAPE = (8, 2048, 384, torch.bfloat16)
STEPS = ((1536, 1), (1536, 64), (1536, 256), (5120, 1), (5120, 256))

STEPS_OF_GRAPH = 32

FIRST_CALL = """
import time, torch
torch.cuda.synchronize(); torch.zeros(1, device="cuda"); torch.cuda.synchronize()
from benchmarks.gpu import inputs
from anymamba.kernels.selective_scan import cuda
a = inputs(1, 256, 128, torch.bfloat16)
start = time.perf_counter()
y, last_state, saved = cuda.forward(a, True)
cuda.backward(y, last_state, a, saved)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def inputs(batch: int, length: int, d_inner: int, dtype: torch.dtype, d_state: int = D_STATE) -> ScanArguments:
    """Arguments with z, D, bias and softplus; steps are about 0.02."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    u, z = (normal(batch, length, d_inner).to(dtype) for _ in range(2))
    delta, bias = (0.7 * normal(batch, length, d_inner)).to(dtype), 0.7 * normal(d_inner) - 4
    A = -torch.arange(1.0, d_state + 1, device="cuda") * torch.exp(0.1 * normal(d_inner, d_state))
    B, C = (normal(batch, length, 1, d_state).to(dtype) for _ in range(2))
    return ScanArguments(u, delta, A, B, C, 1 + 0.1 * normal(d_inner), z, bias, delta_softplus=True)


def time_of(run: Callable[[], object], repeats: int = 15, in_graph: int = 1) -> float:
    """Milliseconds of GPU work per call of `run`: the median over repeats of about a millisecond each. A repeat replays
    a graph of `in_graph` calls."""
    for _ in range(2):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(in_graph):
            run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(n: int) -> float:
        start.record()
        for _ in range(n):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / n / in_graph

    once(1)
    n = max(1, min(100, int(1 / max(in_graph * once(1), 1e-3))))
    return statistics.median(once(n) for _ in range(repeats))


def both_passes(a: ScanArguments, backend: Any = cuda) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward that saves states for training, and forward with backward."""
    dlast = torch.zeros(a.n_sequences, a.d_inner, a.d_state, device="cuda")
    dy = torch.randn_like(a.u)

    def all_of_it() -> object:
        _, _, saved = backend.forward(a, True)
        return backend.backward(dy, dlast, a, saved)

    return lambda: backend.forward(a, True), all_of_it


def original_passes(module: Any, a: ScanArguments) -> tuple[Callable[[], object], Callable[[], object]]:
    """The same with mamba-ssm's kernels, whose tensors are (batch, channels, length)."""
    u, delta, z = (t.mT.contiguous() for t in (a.u, a.delta, a.z) if t is not None)
    B, C = (t.permute(0, 2, 3, 1).contiguous() for t in (a.B, a.C))
    dy = torch.randn_like(u)

    def forward() -> list[Tensor]:
        return module.fwd(u, delta, a.A, B, C, a.D, z, a.delta_bias, True)

    def all_of_it() -> object:
        out, x, *_ = forward()
        dz = torch.empty_like(z)
        return module.bwd(u, delta, a.A, B, C, a.D, z, a.delta_bias, dy, x, out, dz, True, False)

    return forward, all_of_it


def limits() -> tuple[float, float]:
    """Bytes that a copy moves per millisecond, and exponentials that the GPU computes per millisecond.

    The copy is the faster of torch's copy, which a graph may give to a copy engine, and a kernel that reads and writes.
    """
    source = torch.zeros(1 << 28, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    copied = 2 * source.nbytes / min(time_of(way) for way in ways)
    properties = torch.cuda.get_device_properties(0)
    clock = int(_smi("clocks.max.sm")) * 1e3  # cycles per millisecond
    return copied, properties.multi_processor_count * 16 * clock


def time_of_copy(n_bytes: int, inputs: int = 1, sets: int = 1, in_graph: int = 1) -> float:
    """Milliseconds of a kernel of torch that reads `inputs` tensors and writes one, n_bytes in all: as fast as a kernel
    of so many bytes gets, with its launch. It goes through several sets of tensors, as the kernel beside it does."""
    size = n_bytes // (inputs + 1) // 4
    given = [[torch.randn(size, device="cuda") for _ in range(inputs)] for _ in range(sets)]

    def run() -> None:
        for tensors in given:
            torch.neg(*tensors) if inputs == 1 else torch.add(*tensors)

    return time_of(run, in_graph=in_graph) / sets


def _smi(field: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()


def floor_of(a: ScanArguments, copied: float, exponentials: float) -> float:
    """The least possible milliseconds of a forward pass, from its bytes or its exponentials with softplus and gate."""
    n_bytes = 4 * a.u.nbytes + 2 * a.B.nbytes
    return max(n_bytes / copied, a.u.numel() * (a.d_state + 4) / exponentials)


def against_original(module: Any | None) -> str:
    """The table of all shapes."""
    copied, exponentials = limits()
    rows = []
    for (batch, length, d_inner, dtype), targets in SHAPES.items():
        a = inputs(batch, length, d_inner, dtype)
        ours = [time_of(run) for run in both_passes(a)]
        inference = time_of(lambda a=a: cuda.forward(a, False))  # type: ignore[misc]
        theirs = [time_of(run) for run in original_passes(module, a)] if module else []
        ratios = [
            f"**{t / o:.2f}** (target {target})" for t, o, target in zip(theirs, ours, targets, strict=bool(theirs))
        ]
        floor = floor_of(a, copied, exponentials)
        name = f"{batch} x {length} x {d_inner}, {str(dtype).removeprefix('torch.')}"
        times = [f"{t:.3f}" for t in (floor, inference, *ours, *theirs)]
        rows.append([name, *times, *ratios, *[""] * (8 - len(times) - len(ratios))])
        print(*rows[-1], file=sys.stderr)
        torch.cuda.empty_cache()
    header = ["shape", "floor forward (ms)", "forward, nothing saved", "forward", "forward + backward"]
    original = ["original forward", "original both", "times as fast forward", "times as fast both"]
    return table([*header, *original], rows)


def of_triton(module: Any | None) -> str:
    """The first shape with the backend `triton`."""
    if why := triton.unavailable("cuda"):
        return f"triton: {why}"
    (batch, length, d_inner, dtype), *_ = SHAPES
    a = inputs(batch, length, d_inner, dtype)
    ours = [time_of(run) for run in both_passes(a, triton)]
    theirs = [time_of(run) for run in original_passes(module, a)] if module else []
    ratios = [f"**{t / o:.2f}** (target {x})" for t, o, x in zip(theirs, ours, TRITON_TARGETS, strict=bool(theirs))]
    row = [f"triton, {batch} x {length} x {d_inner}", *(f"{t:.3f}" for t in ours), *(ratios or ["", ""])]
    return table(["shape", "forward (ms)", "forward + backward", "times as fast forward", "times as fast both"], [row])


def packed() -> str:
    """A thousand documents against one sequence of as many tokens."""
    length, d_inner = 1 << 17, 1536
    a = inputs(1, length, d_inner, torch.bfloat16)
    inner = torch.randperm(length - 1, generator=torch.Generator().manual_seed(0))[: DOCUMENTS - 1].sort().values + 1
    offsets = torch.cat([torch.zeros(1), inner, torch.tensor([length])]).int().cuda()
    one = [time_of(run) for run in both_passes(a)]
    many = [time_of(run) for run in both_passes(a._replace(cu_seqlens=offsets))]
    names = ("forward", "forward + backward")
    rows = [
        [name, f"{o:.2f}", f"{m:.2f}", f"**{m / o:.2f}** (limit {PACKED_TARGET})"]
        for name, o, m in zip(names, one, many, strict=True)
    ]
    return table(["pass", "one sequence (ms)", f"{DOCUMENTS} documents (ms)", "ratio"], rows)


def general() -> str:
    """What the general kernels take, beside the fast ones of the same shape."""
    a = inputs(*GENERAL_SHAPE)
    constant = torch.randn(a.d_inner, D_STATE, device="cuda")
    wide: dict[str, Any] = {k: t.double() for k, t in a._asdict().items() if isinstance(t, Tensor)}
    cases = {
        "selective B and C (the fast kernels)": a,
        "constant B": a._replace(B=constant),
        "constant B and C": a._replace(B=constant, C=constant),
        "zero-order hold": a._replace(b_discretization="zoh"),
        "complex A, B and C": a._replace(A=torch.complex(a.A, 3 * a.A), B=a.B.cfloat(), C=a.C.cfloat()),
        "float64": a._replace(**wide),
    }
    fast, rows = [time_of(run) for run in both_passes(a)], []
    for name, case in cases.items():
        found = [time_of(run) for run in both_passes(case)]
        pairs = zip(found, fast, strict=True)
        rows.append([name, *(cell for ms, own in pairs for cell in (f"{ms:.3f}", f"{ms / own:.1f}"))])
        print(*rows[-1], file=sys.stderr)
    passes = ("forward (ms)", "times the fast kernels", "forward + backward (ms)", "times the fast kernels")
    return table([" x ".join(map(str, GENERAL_SHAPE[:3])), *passes], rows)


def steps() -> str:
    """One token, in a graph of many, against a kernel that copies as many bytes and against the bandwidth."""
    copied, _ = limits()
    rows = []
    for d_inner, batch in STEPS:
        state = torch.randn(batch, d_inner, D_STATE, device="cuda")
        a = inputs(batch, 1, d_inner, torch.bfloat16)._replace(initial_state=state)
        micro = 1e3 * time_of(lambda a=a: cuda.step(a), in_graph=STEPS_OF_GRAPH)  # type: ignore[misc]
        n_bytes = 2 * state.nbytes + 4 * a.u.nbytes + a.A.nbytes
        copy, floor = 1e3 * time_of_copy(n_bytes, in_graph=STEPS_OF_GRAPH), 1e3 * n_bytes / copied
        ratios = f"**{micro / copy:.2f}**", f"{micro / floor:.2f}"
        rows.append([str(d_inner), str(batch), f"{micro:.2f}", f"{copy:.2f}", ratios[0], f"{floor:.2f}", ratios[1]])
    header = ["channels", "batch", "step in a graph (µs)", "a copy of its bytes (µs)", "ratio"]
    return table([*header, "its bytes at the bandwidth (µs)", "ratio to that"], rows)


def first_calls() -> str:
    """Forward and backward of a small shape in a fresh process: with an empty kernel cache, then with a full one."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {CACHE_VARIABLE: folder, "CUDA_CACHE_DISABLE": "1"}
        times = [
            float(
                subprocess.run(
                    [sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True, check=True
                ).stdout
            )
            for _ in range(2)
        ]
    limits_of_time = ("5 s", "0.3 s")
    rows = [
        [name, f"{t:.2f}", limit]
        for name, t, limit in zip(("nothing kept", "kept"), times, limits_of_time, strict=True)
    ]
    return table(["compiled kernels", "first forward and backward (s)", "limit"], rows)


def machine() -> str:
    """One line: GPU, driver, NVRTC, torch, date."""
    version = ".".join(map(str, nvrtc.version()))
    date = datetime.now(UTC).date().isoformat()
    gpu = f"{torch.cuda.get_device_name()}, driver {_smi('driver_version')}"
    return f"{gpu}, NVRTC {version}, torch {torch.__version__}, {date}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--original", metavar="FOLDER", help="where mamba-ssm's compiled selective_scan_cuda is")
    folder = parser.parse_args().original
    if nvrtc.reason():
        sys.exit(f"the kernels do not run here: {nvrtc.reason()}")
    module = None
    if folder:
        sys.path.insert(0, folder)
        module = importlib.import_module("selective_scan_cuda")
    print(machine())
    print("\n\n".join(["", against_original(module), of_triton(module), packed(), general(), steps(), first_calls()]))


if __name__ == "__main__":
    main()
