"""The benchmark of whole models on a GPU, without a GPU: groups of kernels, tables, and parts that fail."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import gpu_models
from benchmarks.gpu_profile import by_group


def kernel(ts: int, name: str, ms: float, threads: int = 128) -> dict[str, Any]:
    return {"ts": ts, "name": name, "dur": 1e3 * ms, "args": {"block": [threads, 1, 1]}}


def test_kernels_are_grouped_by_name_and_by_the_size_of_their_blocks():
    events = [
        kernel(9, "sum_parts", 1, 256),  # of the norm's backward pass, just before
        kernel(8, "backward", 2, 256),
        kernel(1, "forward", 4),
        kernel(2, "sum_parts", 8, 256),
        kernel(3, "nvjet_sm90_tst_192x192_64x3", 16),
        kernel(4, "void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", 32),
        kernel(5, "scan_backward", 64),
        {"ts": 6, "name": "Memset (Device)", "dur": 128e3, "args": {}},
        kernel(7, "multi_tensor_apply_kernel<FusedAdam>", 256),
        kernel(10, "multiply", 512),
        kernel(11, "void at::native::elementwise_kernel<direct_copy_kernel_cuda>", 1024),
        kernel(12, "void at::native::vectorized_elementwise_kernel<MulFunctor>", 2048),
        kernel(13, "void at::native::reduce_kernel<ReduceOp>", 4096),
    ]
    want = {"norm": 3, "convolution": 12, "products": 16, "attention": 32, "scan": 64, "optimizer": 256}
    want |= {"copies": 128 + 1024, "long convolution": 512, "elementwise": 2048, "sums": 4096}
    assert {group: ms for group, ms in by_group(events).items() if ms} == want


def test_a_part_that_fails_leaves_its_cells_empty(monkeypatch, capsys):
    def broken(*row: Any) -> Any:
        raise RuntimeError("out of memory")

    found = {"ours": lambda *row: (3000.0, 2.0), "original": lambda *row: (2000.0, 4.0), "Transformer++": broken}
    monkeypatch.setattr(gpu_models, "CANDIDATES", found | {"products": lambda *row: (6000.0, float("nan"))})
    measured = gpu_models.results(["mamba-130m"], with_original=True)
    assert "Transformer++, mamba-130m, 16 x 2048 failed: RuntimeError: out of memory" in capsys.readouterr().err
    first = gpu_models.speeds(measured).splitlines()[2]
    assert first == "| mamba-130m, 16 x 2048 | 3.0 | 2.0 |  | 6.0 | **1.50** (target 1.3) |  | 0.50 |"
    assert gpu_models.memories(measured).splitlines()[2].endswith("| 2.00 | 4.00 |  | **0.50** (limit 1) |")


@pytest.mark.parametrize("failed", ["ours", "original"])
def test_without_one_side_there_is_no_ratio(failed, monkeypatch):
    both = {"ours": lambda *row: (3000.0, 2.0), "original": lambda *row: (2000.0, 4.0)}
    monkeypatch.setattr(gpu_models, "CANDIDATES", both | {failed: lambda *row: 1 / 0})
    measured = gpu_models.results(["mamba-130m"], with_original=True)
    assert "**" not in gpu_models.speeds(measured) + gpu_models.memories(measured)
