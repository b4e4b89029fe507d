"""Peak resident memory of the scan's forward plus backward above its inputs, each length in a fresh process.

python -m benchmarks.scan_memory [--d-inner 256]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.timing import machine, table

LIMIT = 16.0  # times the bytes of u, at d_state 16

MEASURE = """
import resource, sys, threading, time, torch
from anymamba import selective_scan

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

length, d_inner, d_state = map(int, sys.argv[1:])
torch.manual_seed(0)
def run(length, measure):
    def leaf(*shape):
        return torch.randn(shape, requires_grad=True)
    u, delta, z = leaf(1, length, d_inner), leaf(1, length, d_inner), leaf(1, length, d_inner)
    B, C = leaf(1, length, d_state), leaf(1, length, d_state)
    A, D, bias = (-torch.rand(d_inner, d_state)).requires_grad_(), leaf(d_inner), leaf(d_inner)
    before, peak, done = resident(), 0, threading.Event()
    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.002)
    watcher = threading.Thread(target=watch)
    watcher.start()
    y = selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True).y
    y.backward(torch.ones((), dtype=y.dtype).expand_as(y))
    done.set(); watcher.join()
    return (max(peak, resident()) - before) / (u.numel() * u.element_size())
run(64, False)
print(run(length, True))
"""


def times_u(length: int, d_inner: int, d_state: int) -> float:
    """Peak above the inputs, in bytes of u."""
    command = [sys.executable, "-c", MEASURE, str(length), str(d_inner), str(d_state)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def run(lengths: tuple[int, ...] = (4096, 16384, 65536), d_inner: int = 256, d_state: int = 16) -> str:
    """Measure and return the Markdown of the results."""
    rows = []
    for length in lengths:
        ratio = times_u(length, d_inner, d_state)
        rows.append(
            [str(length), f"{ratio * length * d_inner * 4 / 2**20:.0f}", f"**{ratio:.1f}** (limit {LIMIT:.0f})"]
        )
    note = f"d_inner {d_inner}, d_state {d_state}, float32, batch 1, with z, D and delta_bias."
    return f"{note}\n\n{table(['length', 'peak above inputs (MiB)', 'times the bytes of u'], rows)}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-inner", type=int, default=256)
    arguments = parser.parse_args()
    print(machine(), "\n")
    print(run(d_inner=arguments.d_inner))
