"""Convolutions as long as the sequence on a GPU: FFTs in shared memory against cuFFT.

python -m benchmarks.long_convolution

Times are medians of replays of CUDA graphs, forward and both passes, with the gradients of inputs and filters.
"""

from __future__ import annotations

import sys

import torch

import anymamba
from anymamba.parts.fft_conv import fft_conv
from anymamba.runtimes import nvrtc
from benchmarks.gpu import machine, time_of
from benchmarks.timing import table

BF16 = torch.bfloat16
SHAPES = {
    (16, 2048, 192, BF16): "Hyena, 3 million parameters",
    (32, 2048, 256, BF16): "Hyena, 7 million",
    (8, 2048, 384, BF16): "S4 in Mamba's block",
    (128, 1024, 128, BF16): "",
    (8, 4096, 384, BF16): "",
    (16, 2048, 192, torch.float32): "",
    (1024, 2048, 24, BF16): "H3's heads",
}
"""rows, length, channels, dtype."""
BACKENDS = ("cuda", "portable")


def times(rows: int, length: int, width: int, dtype: torch.dtype, backend: str) -> list[float]:
    """Milliseconds of forward, and of forward and backward."""
    u = torch.randn(rows, length, width, device="cuda", dtype=dtype, requires_grad=True)
    kernel = torch.randn(width, length, device="cuda", requires_grad=True)
    dy = torch.randn(rows, length, width, device="cuda").to(dtype)

    def forward() -> None:
        with torch.no_grad():
            fft_conv(u, kernel)

    def both() -> None:
        torch.autograd.grad(fft_conv(u, kernel), (u, kernel), dy)

    with anymamba.backend(backend):
        return [time_of(forward), time_of(both)]


def main() -> None:
    if nvrtc.reason():
        sys.exit(f"the kernels do not run here: {nvrtc.reason()}")
    rows = []
    for shape, what in SHAPES.items():
        ours, theirs = (times(*shape, backend) for backend in BACKENDS)
        name = " x ".join(map(str, shape[:3])) + f", {str(shape[3]).removeprefix('torch.')}" + (what and f" ({what})")
        ratios = (f"{t / o:.1f}" for t, o in zip(theirs, ours, strict=True))
        rows.append([name, *(" / ".join(f"{t:.3f}" for t in found) for found in (ours, theirs)), " / ".join(ratios)])
        print(*rows[-1], file=sys.stderr)
    print(machine())
    print(table(["rows x length x channels", "in shared memory (ms)", "cuFFT (ms)", "times as fast"], rows))


if __name__ == "__main__":
    main()
