"""Long convolutions and the layers around them on a GPU, against an older version of the package in the same run.

python -m benchmarks.long_layers [--before FOLDER]

FOLDER is the `src` of another checkout. Times are medians of replays of CUDA graphs in bfloat16, forward and both
passes: of `fft_conv`, of H3's heads (outer products, S4D and their sums), and of whole layers of H3 and Hyena as they
are trained, in autocast and without last states.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

import anymamba
from anymamba.layers.h3 import H3
from anymamba.layers.hyena import Hyena
from anymamba.layers.s4d import S4D
from anymamba.parts import state
from anymamba.parts.fft_conv import fft_conv
from anymamba.runtimes import nvrtc
from benchmarks.gpu import machine, time_of
from benchmarks.timing import table

BF16, LENGTH, D_HEAD = torch.bfloat16, 2048, 8
CONVOLUTIONS = ((16, 2048, 128), (16, 2048, 192), (32, 2048, 256), (16, 2048, 384), (8, 2048, 384), (8, 4096, 384))
"""rows, length, channels."""
LAYERS = ((16, 128), (16, 192), (32, 256))
"""rows and width of the models of 1, 3 and 7 million parameters."""

Times = dict[str, list[float]]
"""Milliseconds of forward, and of forward and backward."""


def passes(function: Callable[[], Tensor], inputs: Iterable[Tensor], dy: Tensor) -> list[float]:
    leaves = [t for t in inputs if t.requires_grad]

    def forward() -> None:
        with torch.no_grad():
            function()

    def both() -> None:
        y = function()
        torch.autograd.grad(y, leaves, dy.to(y.dtype), allow_unused=True)

    return [time_of(forward), time_of(both)]


def numbers(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def of_convolution(rows: int, length: int, width: int) -> list[float]:
    u = numbers(rows, length, width).requires_grad_()
    kernel = numbers(width, length, dtype=torch.float32).requires_grad_()
    return passes(lambda: fft_conv(u, kernel), (u, kernel), numbers(rows, length, width))


def of_heads(layer: H3, rows: int) -> list[float]:
    """What is between H3's projections, without the shift."""
    q, k, v = (numbers(rows, LENGTH, layer.d_model).requires_grad_() for _ in range(3))

    def heads() -> Tensor:
        return layer._contract(q, layer.inner(layer._outer(k, v), None)[0])

    return passes(heads, (q, k, v, *layer.inner.parameters()), numbers(rows, LENGTH, layer.d_model))


def of_layer(layer: nn.Module, rows: int, width: int) -> list[float]:
    x = numbers(rows, LENGTH, width, dtype=torch.float32)

    def run() -> Tensor:
        with torch.autocast("cuda", BF16):
            return layer(x)[0]

    return passes(run, layer.parameters(), numbers(rows, LENGTH, width))


def measure() -> Times:
    torch.manual_seed(0)
    found = {f"convolution, {r:,} x {n:,} x {w}": of_convolution(r, n, w) for r, n, w in CONVOLUTIONS}
    unread = getattr(state, "without_last_states", nullcontext)  # older versions always compute them
    with unread():
        for rows, width in LAYERS:
            size = f"{rows} x {LENGTH:,} x {width}"
            layer = H3(width, S4D(width // D_HEAD), d_head=D_HEAD).cuda()
            found[f"H3's heads, {size}"] = of_heads(layer, rows)
            found[f"H3, {size}"] = of_layer(layer, rows, width)
            found[f"Hyena, {size}"] = of_layer(Hyena(width, max_length=LENGTH).cuda(), rows, width)
    return found


def measure_of(folder: Path) -> Times:
    """The same with the package in another folder."""
    root = Path(__file__).resolve().parents[1]
    after = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder.resolve()), str(root), *after])}
    command = [sys.executable, "-m", "benchmarks.long_layers", "--json", "--expect", str(folder.resolve())]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the src folder of another version")
    parser.add_argument("--json", action="store_true", help="print the times only")
    parser.add_argument("--expect", type=Path, help="the folder that the package must come from")
    args = parser.parse_args()
    if nvrtc.reason():
        sys.exit(f"the kernels do not run here: {nvrtc.reason()}")
    source = Path(anymamba.__file__).resolve().parents[1]
    if args.expect and source != args.expect:
        sys.exit(f"the package was imported from {source}; run without an installed one")
    before = measure_of(args.before) if args.before else {}
    found = measure()
    print(json.dumps(found) if args.json else report(found, before))


def report(found: Times, before: Times) -> str:
    rows = []
    for name, times in found.items():
        row = [name, " / ".join(f"{t:.3f}" for t in times)]
        if before:
            ratios = [b / t for b, t in zip(before[name], times, strict=True)]
            row += [" / ".join(f"{t:.3f}" for t in before[name]), " / ".join(f"{r:.1f}" for r in ratios)]
        rows.append(row)
    names = ["", "now (ms)", *(["before (ms)", "before / now"] if before else [])]
    return f"{machine()}\n{table(names, rows)}"


if __name__ == "__main__":
    main()
