"""Training, reading and generating on a quiet machine and beside one process that keeps a core busy.

Each part runs in a process of its own, with OpenMP's own waiting policy and with that of the command line.

    python -m benchmarks.busy [--spin 0 1000 ...]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from anymamba.console import openmp
from benchmarks.timing import machine, table

SPIN = "GOMP_SPINCOUNT"
OURS = "the command line's"
BUSY = "x = 0\nwhile True: x += 1"
WARM_UP, SECONDS = 2, 8
"""Of each measurement. The warm-up is long enough for the command line to see the load."""


def training() -> Callable[[], int]:
    """A training step of the demo's model."""
    import torch

    from anymamba.models.config import ModelConfig
    from anymamba.models.language_model import LanguageModel

    model = LanguageModel(ModelConfig(d_model=192, n_layers=4, vocab_size=257))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    ids = torch.randint(0, 256, (16, 257))

    def step() -> int:
        output = model.loss(ids[:, :-1], ids[:, 1:])
        (output.loss / output.n_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        return ids[:, 1:].numel()

    return step


def reading() -> Callable[[], int]:
    """512 tokens through the 130m model."""
    import torch

    from anymamba.models.language_model import LanguageModel
    from anymamba.models.presets import preset

    model = LanguageModel(preset("mamba-130m"))
    ids = torch.randint(0, 1000, (1, 512))

    def step() -> int:
        with torch.inference_mode():
            model(ids)
        return ids.numel()

    return step


def generating() -> Callable[[], int]:
    """Tokens of the 130m model, one by one."""
    import torch

    from anymamba.generation.generate import stream
    from anymamba.models.language_model import LanguageModel
    from anymamba.models.presets import preset

    torch.manual_seed(0)
    tokens = stream(LanguageModel(preset("mamba-130m")), [[1, 2, 3]], max_new_tokens=10**6)

    def step() -> int:
        next(tokens)
        return 1

    return step


PARTS = {"training": training, "reading": reading, "generating": generating}


def rate(part: str) -> float:
    """Tokens per second of one part in this process."""
    step = PARTS[part]()
    end = time.perf_counter() + WARM_UP
    while time.perf_counter() < end:
        step()
    times, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        tokens = step()
        times.append((time.perf_counter() - start) / tokens)
    return 1 / statistics.mean(times)


def measured(part: str, spin: str | None, *, busy: bool) -> float:
    """The rate of a part in a fresh process, beside a busy one or not."""
    environment = {k: v for k, v in os.environ.items() if k not in (SPIN, "OMP_WAIT_POLICY")}
    if spin not in (None, OURS):
        environment[SPIN] = str(spin)
    other = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    try:
        command = [sys.executable, "-m", "benchmarks.busy", "--part", part, *(["--watch"] if spin == OURS else [])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])
    finally:
        if other is not None:
            other.kill()
            other.wait()


def run(spins: list[str | None], repeats: int) -> str:
    """Measure and return the Markdown of the results."""
    rows = []
    for part in PARTS:
        first = None
        for spin in spins:
            quiet = max(measured(part, spin, busy=False) for _ in range(repeats))
            beside = max(measured(part, spin, busy=True) for _ in range(repeats))
            first = first or quiet
            limits = (" (limit 0.97)", " (limit 0.5)") if spin == OURS else ("", "")
            cells = [f"{quiet:,.1f}", f"{quiet / first:.3f}{limits[0]}", f"{beside:,.1f}"]
            name = "OpenMP's own" if spin is None else spin if spin == OURS else f"{SPIN}={spin}"
            rows.append([part, name, *cells, f"{beside / first:.2f}{limits[1]}"])
    header = ["part", "waiting", "tokens/s, quiet", "of the first", "beside a busy process", "of the first"]
    return table(header, rows) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--watch", action="store_true", help="watch the load as the command line does")
    parser.add_argument("--spin", nargs="*", default=[], help="also measure with these values of GOMP_SPINCOUNT")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.part:
        if arguments.watch:
            threading.Thread(target=openmp.watch, daemon=True).start()
        print(rate(arguments.part))
    else:
        print(machine(), "\n")
        print(run([None, OURS, *arguments.spin], arguments.repeats))
