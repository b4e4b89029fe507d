"""How the benchmarks measure: candidates run in turns in one process, so that ratios compare like conditions."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime

import torch


def interleaved(candidates: dict[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, float]:
    """The smallest wall time of each candidate in seconds. Every repeat runs each candidate once."""
    best = dict.fromkeys(candidates, float("inf"))
    for i in range(warm_up + repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if i >= warm_up:
                best[name] = min(best[name], elapsed)
    return best


def machine() -> str:
    """One line: processor, threads, Python, torch, date."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    capability = torch.backends.cpu.get_cpu_capability()
    date = datetime.now(UTC).date().isoformat()
    return (
        f"{name} ({capability}), {torch.get_num_threads()} threads, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, {date}"
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
