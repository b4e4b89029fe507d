"""Run all benchmarks or the named ones, each in its own process, and write benchmarks/RESULTS.md.

python -m benchmarks [NAME ...]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

BENCHMARKS = {
    "cpu_kernels": "The compiled kernels against the machine",
    "products": "Products of packed weights",
    "scan_length": "Time and memory of the scan against the length",
    "backbone_vs_products": "The 130m backbone against its own matrix products",
    "backbone_vs_transformers": "The 130m backbone against transformers",
    "drop_in": "transformers' backbone with our operators dropped in",
    "layer_vs_mambapy": "One layer against mambapy",
    "packing": "1,000 packed documents against one sequence",
    "decode_context": "Time of a token against the context",
    "one_token": "A token against the memory",
    "prompt": "A prompt against its products",
    "weight_formats": "What packed weights cost in quality",
    "startup": "Start-up",
    "first_token": "The first token",
    "speculation": "Speculation",
    "serving_engine": "Many requests at once",
    "serving": "The server",
    "busy": "Beside another busy process",
    "planning": "What calls of GPU kernels cost in Python",
    "experiment_times": "How long the experiments take",
}
ON_A_GPU = {
    "gpu": "The CUDA kernels of the scan",
    "gpu_memory_bound": "The CUDA kernels of the convolution, the norm and the loss",
    "gpu_models": "Training steps of whole models on a GPU",
    "experiment_speed": "How fast the arms of a language experiment train",
    "gpu_token": "A token on a GPU",
    "gpu_throughput": "Throughput beside a Transformer on a GPU",
    "distributed": "Training on one and two GPUs",
    "several_gpus": "Training on up to eight GPUs",
}
"""Run only when they are named."""
WITH_ORIGINAL = ("gpu", "gpu_memory_bound", "gpu_models")
"""These take `--original FOLDER`, a folder of the compiled modules to compare with."""
TITLES = BENCHMARKS | ON_A_GPU
RESULTS = Path(__file__).with_name("RESULTS.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"any of {', '.join(TITLES)}; defaults to those of a CPU"
    )
    parser.add_argument(
        "--original", metavar="FOLDER", help="for benchmarks on a GPU: compiled modules to compare with"
    )
    options = parser.parse_args()
    names = options.names or list(BENCHMARKS)
    if unknown := set(names) - set(TITLES):
        parser.error(f"there is no benchmark {sorted(unknown)[0]!r}")
    sections = sections_of(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in names:
        print(f"{TITLES[name]} ...", file=sys.stderr)
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        command += ["--original", options.original] if options.original and name in WITH_ORIGINAL else []
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        machine, rest = printed.split("\n", 1)
        sections[TITLES[name]] = f"{machine.strip()}.\n\n{rest.strip()}"
        print(sections[TITLES[name]])
    RESULTS.write_text(document(sections), encoding="utf-8")
    print(f"written to {RESULTS}", file=sys.stderr)


def sections_of(text: str) -> dict[str, str]:
    """The text below each title. A benchmark that is run again replaces its section."""
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)[1:]
    return {title: body.strip() for title, body in zip(parts[::2], parts[1::2], strict=True)}


def document(sections: dict[str, str]) -> str:
    """The sections in the order of the benchmarks, each with its machine and date."""
    known = [title for title in TITLES.values() if title in sections]
    body = "\n".join(f"## {title}\n\n{sections[title]}\n" for title in known)
    return f"# Results\n\nWritten by `make bench`; `python -m benchmarks NAME` runs one again.\n\n{body}"


if __name__ == "__main__":
    main()
