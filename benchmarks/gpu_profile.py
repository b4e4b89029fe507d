"""Time of a training step on a GPU by group of kernels."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from anymamba.kernels.add_norm.cuda import call as norm
from anymamba.kernels.causal_conv1d.cuda import call as conv

GROUPS = (
    *("products", "scan", "convolution", "long convolution", "head products", "norm", "loss", "optimizer", "attention"),
    *("elementwise", "sums", "copies", "rest"),
)
NAMES = {
    "attention": r"flash|fmha|attention",
    "products": r"nvjet|gemm|cutlass|splitK|cublas",
    "scan": r"^(scan|scan_backward|sum_pieces|carry|find_sequences|pass_empty|sum_blocks)$",
    "loss": r"^losses",
    "optimizer": r"multi_tensor|[Aa]dam",
    "long convolution": r"fft|^(order|multiply|correlate|finish|spectra|convolve)$",
    "head products": r"^combine$",
    "convolution": r"^(inputs|slopes|weights|states)$",
    "copies": r"copy|Cat|^Mem",
    "sums": r"reduce|^(sum_columns|sum_runs|join_runs)$",
    "elementwise": r"elementwise|^(gate|gate_gradients|rotate)$",
}
"""A pattern of the names of a group's kernels; the first that fits. Those of convolution and norm have the same names:
see `group_of`."""
THREADS = {conv.THREADS: "convolution", norm.THREADS: "norm", 2 * norm.THREADS: "norm"}
"""Of a block of the kernels `forward` and `backward`."""


def profile(step: Callable[[], None], seconds: float) -> dict[str, float]:
    """Milliseconds of a step in each group, and those without a kernel ("idle").

    Args:
        seconds: how long a step takes without a profiler.
    """
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with torch_profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    times = by_group([e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")])
    return times | {"idle": max(0.0, 1e3 * seconds - sum(times.values()))}


def by_group(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of kernels in each group."""
    times, last = dict.fromkeys(GROUPS, 0.0), "rest"
    for event in sorted(events, key=lambda e: e["ts"]):
        last = group_of(event, last)
        times[last] += event["dur"] / 1e3
    return times


def group_of(event: dict[str, Any], last: str) -> str:
    """The group of a kernel that comes after one of group `last`: `sum_parts` ends the kernel before it."""
    name = event["name"]
    if name in ("forward", "backward"):
        return THREADS.get(event["args"]["block"][0], "rest")
    if name == "sum_parts":
        return last
    return next((group for group, pattern in NAMES.items() if re.search(pattern, name)), "rest")
