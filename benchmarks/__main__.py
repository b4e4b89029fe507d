"""Run every benchmark, one after the other, and write benchmarks/RESULTS.md: python -m benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import backbone_vs_transformers, decode_context, packing, scan_memory, startup
from benchmarks.timing import machine

BENCHMARKS: dict[str, Callable[[], str]] = {
    "The 130m backbone against transformers": backbone_vs_transformers.run,
    "Memory of the scan's forward plus backward": scan_memory.run,
    "1,000 packed documents against one sequence": packing.run,
    "Time of a token against the context": decode_context.run,
    "Start-up": startup.run,
}


def main() -> None:
    results = Path(__file__).with_name("RESULTS.md")
    sections = [f"# Results\n\nWritten by `make bench`. {machine()}.\n"]
    for title, run in BENCHMARKS.items():
        print(f"{title} ...", file=sys.stderr)
        sections.append(f"## {title}\n\n{run()}")
        print(sections[-1])
    results.write_text("\n".join(sections), encoding="utf-8")
    print(f"written to {results}", file=sys.stderr)


if __name__ == "__main__":
    main()
