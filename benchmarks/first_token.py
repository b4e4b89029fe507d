"""How long `anymamba generate` takes to its first token, and how long a model takes to load, from the page cache.

python -m benchmarks.first_token [--repeats 5]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from anymamba.data.tokenizer import ByteTokenizer
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.models.presets import preset
from benchmarks.timing import machine, table

LOAD = """
import sys, time, torch
start = time.perf_counter()
from anymamba import LanguageModel
from anymamba.models.inference import InferenceModel
kind = InferenceModel if sys.argv[1].endswith("int8") else LanguageModel
kind.from_pretrained(sys.argv[1], verify=sys.argv[2] == "verified")
print(time.perf_counter() - start)
"""
LIMIT = 0.5
"""Seconds over `import torch` until the first token of the small model."""


def importing() -> float:
    """Wall time of a process that imports torch."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - start


def first_token(model: Path) -> float:
    """Wall time from the start of `anymamba generate` to the first byte after the prompt."""
    command = [Path(sys.executable).with_name("anymamba"), "generate", "--model", model, "--prompt", "ab"]
    start = time.perf_counter()
    with subprocess.Popen(
        [*map(str, command), "--max-new-tokens", "64"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as process:
        assert process.stdout is not None
        got = b""
        while len(got) < len("ab") + 1:
            got += process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.kill()
    return seconds


def loading(model: Path, how: str) -> float:
    """Seconds of `from_pretrained` in a process that has imported torch."""
    done = subprocess.run([sys.executable, "-c", LOAD, model, how], capture_output=True, text=True, check=True)
    return float(done.stdout)


def models(folder: Path) -> dict[str, Path]:
    """A small model and one of 130 million parameters with random weights, as folders and as GGUF files; the large one
    also in int8."""
    torch.manual_seed(0)
    small = LanguageModel(ModelConfig(d_model=128, n_layers=4, vocab_size=257))
    large = LanguageModel(preset("mamba-130m"))
    paths = {}
    for name, model in (("128 x 4, 257 bytes", small), ("mamba-130m", large)):
        tokenizer = ByteTokenizer()
        for format, suffix in (("hf", ""), ("gguf", ".gguf")):
            path = folder / f"{name.split()[0]}{suffix}"
            model.save_pretrained(path, format=format, tokenizer=tokenizer)
            paths[f"{name}, {'GGUF' if suffix else 'safetensors'}"] = path
    paths["mamba-130m, int8"] = folder / "int8"
    large.for_inference("int8").save_pretrained(paths["mamba-130m, int8"], tokenizer=ByteTokenizer())
    return paths


def reading(model: Path) -> float:
    """Seconds in which the bytes of a model's files are read into one place in memory."""
    files = [path for path in (sorted(model.rglob("*")) if model.is_dir() else [model]) if path.is_file()]
    place = bytearray(max(path.stat().st_size for path in files))
    start = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(place):
                pass
    return time.perf_counter() - start


def run(repeats: int) -> str:
    """Measure and return the Markdown of the results."""

    def best(measure: Callable[[], float]) -> float:
        return min(measure() for _ in range(repeats))

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        found = models(Path(folder))
        torch_alone = best(importing)
        for name, path in found.items():
            token = best(lambda path=path: first_token(path)) - torch_alone
            limit = f" (limit {LIMIT})" if name.startswith("128") else ""
            loads = [f"{best(lambda path=path, how=how: loading(path, how)):.3f}" for how in ("verified", "as it is")]
            rows.append([name, f"**{token:.2f}**{limit}", *loads, f"{best(lambda path=path: reading(path)):.3f}"])
    loads = ["from_pretrained (s)", "with verify=False (s)", "reading the files (s)"]
    header = ["model", "first token, over `import torch` (s)", *loads]
    return f"`import torch` alone takes {torch_alone:.2f} s.\n\n{table(header, rows)}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(machine(), "\n")
    print(run(arguments.repeats))
