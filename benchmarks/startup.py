"""The start-up time: importing the package (beyond importing torch), and `anymamba --help`.

python -m benchmarks.startup [--repeats 5]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.timing import machine, table

IMPORT = """
import time, torch
start = time.perf_counter()
import anymamba
[getattr(anymamba, name) for name in anymamba.__all__]
print(time.perf_counter() - start)
"""
LIMITS = {"every public name, over importing torch": 0.3, "anymamba --help": 0.5}


def import_seconds() -> float:
    """Time to resolve every public name in a fresh interpreter that has imported torch."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    return float(done.stdout)


def command_seconds(*arguments: str) -> float:
    """Wall time of a whole `anymamba` process."""
    command = [str(Path(sys.executable).with_name("anymamba")), *arguments]
    start = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - start


def run(repeats: int = 5) -> str:
    """Measure and return the Markdown of the results."""
    measures = {
        "every public name, over importing torch": import_seconds,
        "anymamba --help": lambda: command_seconds("--help"),
        "anymamba train --help": lambda: command_seconds("train", "--help"),
        "anymamba info": lambda: command_seconds("info"),
    }
    rows = []
    for name, measure in measures.items():
        limit = f"{LIMITS[name]:.1f}" if name in LIMITS else ""
        rows.append([name, f"{min(measure() for _ in range(repeats)):.3f}", limit])
    return table(["startup", f"seconds (best of {repeats})", "limit"], rows) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(machine(), "\n")
    print(run(arguments.repeats))
