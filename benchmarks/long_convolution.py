"""Convolutions as long as the sequence on a GPU: products on tensor cores and FFTs in shared memory against cuFFT, in
the package's own passes and in torch's operations one after another.

python -m benchmarks.long_convolution

Times are medians of replays of CUDA graphs, forward and both passes, with the gradients of inputs and filters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

import anymamba
from anymamba.kernels.fft_conv.cuda import products
from anymamba.parts import toeplitz
from anymamba.parts.fft_conv import fft_conv
from anymamba.runtimes import nvrtc
from benchmarks.gpu import machine, time_of
from benchmarks.timing import table

BF16 = torch.bfloat16
HEADS = (1024, 2048, 24, BF16)
"""H3's, whose memory is ordered (channels, length, rows)."""
SHAPES = {
    (16, 2048, 128, BF16): "Hyena, 1 million parameters",
    (16, 2048, 192, BF16): "Hyena, 3 million",
    (32, 2048, 256, BF16): "Hyena, 7 million",
    (16, 2048, 384, BF16): "S4 in Mamba's block",
    (8, 2048, 384, BF16): "",
    (128, 1024, 128, BF16): "",
    (8, 4096, 384, BF16): "",
    (16, 2048, 192, torch.float32): "",
    HEADS: "H3's heads",
}
"""rows, length, channels, dtype."""
WAYS = ("products", "FFTs", "cuFFT", "torch")
OURS = WAYS[:2]


@contextmanager
def by(way: str) -> Iterator[None]:
    """Have `fft_conv` go this way, where it can."""
    served = {"products": products.serves}.get(way, lambda u, kernel: False)
    with (
        mock.patch.object(products, "serves", served),
        mock.patch.object(toeplitz, "is_faster", lambda *_: False),
        anymamba.backend("portable" if way == "cuFFT" else "cuda"),
    ):
        yield


def in_torch(u: Tensor, kernel: Tensor) -> Tensor:
    """The convolution as it is written in torch, whose spectra autograd keeps."""
    length = u.shape[1]
    spectrum = torch.fft.rfft(u.float().transpose(1, 2), 2 * length) * torch.fft.rfft(kernel, 2 * length)
    return torch.fft.irfft(spectrum, 2 * length)[..., :length].transpose(1, 2).to(u.dtype)


def times(rows: int, length: int, width: int, dtype: torch.dtype, way: str) -> list[float]:
    """Milliseconds of forward, and of forward and backward."""
    u, dy = (torch.randn(rows, length, width, device="cuda").to(dtype) for _ in range(2))
    if (rows, length, width, dtype) == HEADS:
        u, dy = (t.permute(2, 1, 0).contiguous().permute(2, 1, 0) for t in (u, dy))
    u.requires_grad_()
    kernel = torch.randn(width, length, device="cuda", requires_grad=True)
    convolve = in_torch if way == "torch" else fft_conv

    def forward() -> None:
        with torch.no_grad():
            convolve(u, kernel)

    def both() -> None:
        torch.autograd.grad(convolve(u, kernel), (u, kernel), dy)

    with by(way):
        return [time_of(forward), time_of(both)]


def served(rows: int, length: int, dtype: torch.dtype) -> bool:
    """Whether products take these."""
    return dtype == BF16 and products.suits(rows, length)


def main() -> None:
    if nvrtc.reason():
        sys.exit(f"the kernels do not run here: {nvrtc.reason()}")
    rows = []
    for shape, what in SHAPES.items():
        found = {way: times(*shape, way) for way in WAYS if way != "products" or served(shape[0], shape[1], shape[3])}
        name = " x ".join(map(str, shape[:3])) + f", {str(shape[3]).removeprefix('torch.')}" + (what and f" ({what})")
        cells = [" / ".join(f"{t:.3f}" for t in found[way]) if way in found else "" for way in WAYS]
        best = [min(o) for o in zip(*(found[way] for way in OURS if way in found), strict=True)]
        ratios = [" / ".join(f"{t / o:.1f}" for t, o in zip(found[way], best, strict=True)) for way in WAYS[2:]]
        rows.append([name, *cells, *ratios])
        print(*rows[-1], file=sys.stderr)
    print(machine())
    names = ("products (ms)", "FFTs in shared memory (ms)", "cuFFT (ms)", "torch (ms)", "cuFFT / ours", "torch / ours")
    print(table(["rows x length x channels", *names], rows))


if __name__ == "__main__":
    main()
