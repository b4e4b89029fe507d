"""Every check of the CUDA kernels that needs a GPU, and a page of docs with what came out.

python -m benchmarks.gpu_checks [--page FILE] [--workers N] [PART ...]

Runs from a clone, installed or not (then with PYTHONPATH=src), with pytest and hypothesis; with pytest-xdist the tests
of a part share N processes. All parts run at once on the current GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from anymamba.runtimes import nvrtc
from benchmarks.gpu import machine
from benchmarks.timing import table

TESTS = {
    "operators": ("the tests of the operators, on tensors of the GPU", ["tests/ops", "--device", "cuda"]),
    "kernels": (
        "values at every size, equal bits a hundred times under load, streams, graphs, memory",
        ["tests/gpu", "-m", "not slow"],
    ),
    "contracts": ("2,000 random calls against `reference`, ten a test", ["tests/gpu", "-k", "random_contracts"]),
    "sizes": ("more elements than 32 bits count", ["tests/gpu", "-m", "slow", "-k", "not random_contracts"]),
    "rounding": ("errors that add up over a sequence", ["tests/kernels/test_precision.py", "-k", "cuda"]),
}
SANITIZERS = ("memcheck", "racecheck", "synccheck")
PARTS = (*TESTS, *SANITIZERS)
LONGEST, TIMES_WORKERS = "operators", 2
"""The part that takes longest, with so many times the processes of the others."""
PAGE = Path(__file__).parents[1] / "docs" / "inside" / "gpu-checks.md"


class Outcome(NamedTuple):
    """Of a part."""

    passed: int
    failed: int
    skipped: int
    seconds: float


def run_tests(arguments: list[str], workers: int) -> Outcome:
    """One run of pytest, counted by its report."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        shared = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
        command = [sys.executable, "-m", "pytest", *arguments, "-q", "--tb=short", f"--junitxml={report}", *shared]
        subprocess.run(command, stdout=sys.stderr)
        if not report.exists():
            return Outcome(0, 1, 0, time.monotonic() - start)
        suite = ElementTree.parse(report).getroot()[0]
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    return Outcome(total - failed - skipped, failed, skipped, time.monotonic() - start)


def run_sanitizer(tool: str) -> Outcome:
    start = time.monotonic()
    status = subprocess.run([sys.executable, "tests/gpu/sanitize.py", tool], stdout=sys.stderr).returncode
    return Outcome(int(status == 0), int(status != 0), 0, time.monotonic() - start)


def run_part(name: str, workers: int) -> Outcome:
    if name in SANITIZERS:
        return run_sanitizer(name)
    return run_tests(TESTS[name][1], workers * TIMES_WORKERS if name == LONGEST else workers)


def page(outcomes: dict[str, Outcome]) -> str:
    """The page of docs."""
    rows = []
    for name, found in outcomes.items():
        what = f"compute-sanitizer {name}, a sweep of shapes" if name in SANITIZERS else TESTS[name][0]
        rows.append([name, what, *map(str, found[:3]), f"{found.seconds:.0f} s"])
    return (
        "# Checks on a GPU\n\nWritten by `python -m benchmarks.gpu_checks`; it runs them again.\n\n"
        f"{machine()}.\n\n" + table(["part", "what", "passed", "failed", "skipped", "time"], rows) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; absent: all")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="where the page is written")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="processes of a part, with pytest-xdist")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {sorted(unknown)[0]!r}")
    if nvrtc.reason():
        sys.exit(f"the kernels do not run here: {nvrtc.reason()}")
    names = [name for name in PARTS if not options.parts or name in options.parts]
    with ThreadPoolExecutor(len(names)) as pool:
        outcomes = dict(zip(names, pool.map(lambda name: run_part(name, options.workers), names), strict=True))
    text = page(outcomes)
    print(text)
    options.page.write_text(text, encoding="utf-8")
    sys.exit(any(found.failed for found in outcomes.values()))


if __name__ == "__main__":
    main()
