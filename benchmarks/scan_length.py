"""Time and peak resident memory of the scan's forward plus backward against the length, each length in a fresh process.

python -m benchmarks.scan_length [--d-inner 256]
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys

from benchmarks.timing import machine, table

LIMIT = 12.0  # peak memory above the inputs at the longest length, in units of the bytes of u
SLOPE = (0.95, 1.05)  # allowed slope of log time over log length

MEASURE = """
import sys, time, torch
from anymamba import selective_scan

def status(field):  # in bytes
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))

length, d_inner, d_state, repeats = map(int, sys.argv[1:])
torch.manual_seed(0)
def run(length, repeats):
    def leaf(*shape):
        return torch.randn(shape, requires_grad=True)
    u, delta, z = leaf(1, length, d_inner), leaf(1, length, d_inner), leaf(1, length, d_inner)
    B, C = leaf(1, length, d_state), leaf(1, length, d_state)
    A, D, bias = (-torch.rand(d_inner, d_state)).requires_grad_(), leaf(d_inner), leaf(d_inner)
    leaves = [u, delta, A, B, C, D, z, bias]
    cotangent = torch.ones(1, length, d_inner)
    before, times = status("VmRSS:"), []
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    for _ in range(repeats):
        for t in leaves:
            t.grad = None
        start = time.perf_counter()
        selective_scan(*leaves, delta_softplus=True).y.backward(cotangent)
        times.append(time.perf_counter() - start)
    return (status("VmHWM:") - before) / (u.numel() * u.element_size()), sorted(times)[repeats // 2]
run(64, 2)
print(*run(length, repeats))
"""


def measured(length: int, d_inner: int, d_state: int, repeats: int) -> tuple[float, float]:
    """Peak memory above the inputs, in units of the bytes of u, and the median seconds."""
    command = [sys.executable, "-c", MEASURE, *map(str, (length, d_inner, d_state, repeats))]
    peak, seconds = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(peak), float(seconds)


def run(exponents: tuple[int, ...] = (14, 16, 18, 20), d_inner: int = 256, d_state: int = 16) -> str:
    """Measure and return the Markdown of the results."""
    rows, times = [], []
    for exponent in exponents:
        length = 2**exponent
        peak, seconds = measured(length, d_inner, d_state, repeats=5)
        times.append(seconds)
        limit = f" (limit {LIMIT:.0f})" if exponent == exponents[-1] else ""
        nanoseconds = seconds * 1e9 / length / d_inner
        rows.append([f"2^{exponent}", f"{seconds:.3f}", f"{nanoseconds:.2f}", f"**{peak:.1f}**{limit}"])
    slope = math.log(times[-1] / times[0]) / math.log(2.0 ** (exponents[-1] - exponents[0]))
    note = f"d_inner {d_inner}, d_state {d_state}, float32, batch 1, with z, D, delta_bias and softplus."
    note += f" Slope of log time over log length: **{slope:.3f}** (allowed {SLOPE[0]} to {SLOPE[1]})."
    header = ["length", "forward + backward (s)", "ns a token and channel", "peak above the inputs in bytes of u"]
    return f"{note}\n\n{table(header, rows)}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-inner", type=int, default=256)
    arguments = parser.parse_args()
    print(machine(), "\n")
    print(run(d_inner=arguments.d_inner))
