"""Run a sweep of calls under compute-sanitizer: memcheck, racecheck and synccheck find nothing.

python tests/gpu/sanitize.py [TOOL ...]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
TOOLS = ("memcheck", "racecheck", "synccheck")
SEEDS = range(24)


def sweep() -> None:
    """Small calls of every kind; every variant that they need is compiled."""
    sys.path += [str(HERE.parents[1] / name) for name in ("ops", "kernels")]
    import torch
    from scan_backends import arguments, contract, moved, results
    from scan_cases import scan_inputs

    from anymamba.kernels.selective_scan import cuda
    from anymamba.runtimes import nvrtc, replaying

    replaying._plan = lambda *call: None  # repeated calls have their scratch tensors in one allocation

    flags = nvrtc.Variant.flags
    nvrtc.Variant.flags = lambda variant: (*flags(variant), "-DANYMAMBA_CHECKED")  # see device.cuh

    kinds: list[dict] = [
        {"length": 65, "d_inner": 33, "d_state": 16, "dtype": torch.float32},
        {"length": 130, "d_inner": 64, "d_state": 40, "dtype": torch.bfloat16},
        {"batch": 1, "length": 400, "d_inner": 64, "d_state": 16, "dtype": torch.bfloat16},
        {"batch": 1, "length": 400, "d_inner": 8, "d_state": 16, "lengths": [0, 40, 3, 0, 260, 97, 0]},
        {"length": 37, "d_inner": 35, "d_state": 6, "B": "constant", "is_complex": True, "rule": "zoh"},
    ]
    for kind in kinds:
        results(cuda, arguments(scan_inputs(**kind), "cuda"))
    for seed in SEEDS:
        results(cuda, moved(contract(seed), "cuda"))
    for d_state in (5, 12, 16):
        cuda.step(arguments(scan_inputs(3, 1, 33, d_state, dtype=torch.float32), "cuda"))
    others()
    long_convolutions()
    torch.cuda.synchronize()


def others() -> None:
    """The convolution, the norm of a sum, the loss, the sums of columns and the gradient of an embedding."""
    import torch
    from test_cuda_memory_bound import conv, conv_contract, conv_results, norm, norm_results, on

    from anymamba.kernels.add_norm.arguments import NormArguments
    from anymamba.kernels.column_sums import cuda as column_sums
    from anymamba.kernels.embedding_gradient import cuda as embedding_gradient
    from anymamba.ops.linear_cross_entropy import linear_cross_entropy

    for seed in SEEDS:
        conv_results(conv, on("cuda", conv_contract(seed)))
    for size in (12, 13, 768, 2560, 8192, 8200):
        rows, columns = torch.randn(2, 37, size, device="cuda"), torch.randn(2, size, device="cuda")
        norm_results(norm, NormArguments(*rows, *columns, 1e-5, size % 3 == 0))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x, weight = (torch.randn(n, 16, device="cuda", dtype=dtype, requires_grad=True) for n in (50, 1001))
        linear_cross_entropy(x, weight, torch.arange(50, device="cuda")).backward()
    for dtype in column_sums.DTYPES:
        for rows, width in ((1, 1), (70, 576), (3000, 8), (5000, 1500), (20000, 1168)):
            x = torch.randn(rows, width + 8, device="cuda").to(dtype)
            column_sums.sums(x[:, :width]), column_sums.sums(x[:, 1 : width + 1])
        for vocab, tokens, width in ((5, 1000, 36), (300, 4100, 7), (40_000, 130, 64)):
            dy, ids = torch.randn(tokens, width, device="cuda").to(dtype), torch.arange(tokens, device="cuda")
            embedding_gradient.sums(dy, ids**2 % vocab, vocab), embedding_gradient.sums(dy, ids // 999, vocab)


def long_convolutions() -> None:
    """By products, in either order of memory, and by FFTs; and what H3, Hyena and attention do around them."""
    import torch

    from anymamba.parts import head_products
    from anymamba.parts.fft_conv import fft_conv
    from anymamba.parts.gated import FUNCTIONS, gated_halves
    from anymamba.parts.rotary import rotate_heads

    for rows, length, width in ((3, 70, 5), (8, 300, 18), (20, 530, 24), (16, 150, 1)):
        kernel = torch.randn(width, length, device="cuda", requires_grad=True)
        for dtype in (torch.bfloat16, torch.float32):
            u = torch.randn(rows, length, width, device="cuda").to(dtype)
            for given in (u, u.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
                fft_conv(given.requires_grad_(), kernel).sum().backward()
    q, k, v = torch.randn(3, 3, 50, 5, 8, device="cuda", dtype=torch.bfloat16).requires_grad_().unbind()
    head_products.contract(q, head_products.outer(k, v)).sum().backward()
    for dtype in (torch.bfloat16, torch.float32):
        both, packed = (torch.randn(3, 50, *n, device="cuda").to(dtype) for n in ((2 * 24,), (6, 32)))
        for function in FUNCTIONS:
            gated_halves(both.requires_grad_(), function).sum().backward()
        q, k, v = rotate_heads(packed.requires_grad_(), torch.arange(50, device="cuda")[None], 1)
        (q.sum() + (k * v).sum()).backward()


def main() -> None:
    command = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in sys.argv[1:] or TOOLS:
        flags = ["--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no"]
        run = subprocess.run([command, *flags, sys.executable, str(HERE)], env=os.environ | {"ANYMAMBA_SWEEP": "1"})
        print(f"{tool}: {'nothing found' if run.returncode == 0 else 'see above'}")
        if run.returncode:
            sys.exit(1)


if __name__ == "__main__":
    sweep() if os.environ.get("ANYMAMBA_SWEEP") else main()
