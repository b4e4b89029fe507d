"""Run every benchmark in a process of its own and write benchmarks/RESULTS.md: python -m benchmarks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.timing import machine

BENCHMARKS = {
    "The compiled kernels against the machine": "cpu_kernels",
    "Time and memory of the scan against the length": "scan_length",
    "The 130m backbone against its own matrix products": "backbone_vs_products",
    "The 130m backbone against transformers": "backbone_vs_transformers",
    "transformers' backbone with our operators dropped in": "drop_in",
    "One layer against mambapy": "layer_vs_mambapy",
    "1,000 packed documents against one sequence": "packing",
    "Time of a token against the context": "decode_context",
    "Start-up": "startup",
}


def main() -> None:
    results = Path(__file__).with_name("RESULTS.md")
    sections = [f"# Results\n\nWritten by `make bench`. {machine()}.\n"]
    for title, name in BENCHMARKS.items():
        print(f"{title} ...", file=sys.stderr)
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        sections.append(f"## {title}\n\n{printed.split(chr(10), 2)[2].strip()}\n")  # without the machine's line
        print(sections[-1])
    results.write_text("\n".join(sections), encoding="utf-8")
    print(f"written to {results}", file=sys.stderr)


if __name__ == "__main__":
    main()
