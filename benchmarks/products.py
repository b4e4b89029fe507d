"""Products of packed weights against the machine: one row and a few against memory, prompts against F.linear."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.ops.packed_linear import FORMATS, PackedWeight, pack, packed_linear
from anymamba.runtimes import native
from benchmarks.timing import interleaved, machine, table

SHAPES = ((3072, 768), (768, 1536), (50280, 768))  # in_proj, out_proj and the head of mamba-130m
READ = 1 << 29  # bytes of the loop that measures the bandwidth
BATCHES = (1, 2, 4, 8, 16, 64)
PROMPT = 512
TARGETS = {"float32": 0.93, "bfloat16": 0.90, "q8_0": 0.80, "q4_0": 0.72}
"""Shares of the bandwidth that one row should reach."""


def matrices(format: str, size: int) -> list[PackedWeight]:
    """Matrices of the shapes of mamba-130m, as many as take `size` bytes, so that none stays in a cache."""
    generator = torch.Generator().manual_seed(0)
    found: list[PackedWeight] = []
    written = "q4_k" if format == "q5_k" else format
    kinds = [pack(torch.randn(shape, generator=generator) * 0.02, written) for shape in SHAPES[:2]]
    if format == "q5_k":
        kinds = [random_q5_k(*shape, generator) for shape in SHAPES[:2]]
    while sum(w.data.nbytes for w in found) < size:
        found.extend(w._replace(data=w.data.clone()) for w in kinds)
    return found


def random_q5_k(n_out: int, n_in: int, generator: torch.Generator) -> PackedWeight:
    """A matrix of random bytes with finite scales."""
    data = torch.randint(0, 256, (n_out, n_in // 256, 176), generator=generator, dtype=torch.uint8)
    data[..., [1, 3]] = 0x10
    return PackedWeight(data.flatten(1), "q5_k", n_in)


def through(weights: list[PackedWeight], rows: int) -> Callable[[], object]:
    """Multiply `rows` rows by every matrix."""
    inputs = {n: torch.randn(rows, n) for n in {w.n_in for w in weights}}
    return lambda: [packed_linear(inputs[w.n_in], w) for w in weights]


def read(memory: Tensor) -> None:
    """Read the memory in a plain compiled loop."""
    native.module().read_memory(native.address("memory", memory), memory.nbytes, torch.get_num_threads())


def few_rows() -> str:
    """Bytes of weights per second over the bandwidth."""
    memory = torch.zeros(READ // 4)
    lines = []
    for name in FORMATS:
        weights = matrices(name, 1 << 28)
        n_bytes = sum(w.data.nbytes for w in weights)
        candidates: dict[str, Callable[[], object]] = {str(n): through(weights, n) for n in BATCHES}
        candidates["read"] = lambda: read(memory)
        times = interleaved(candidates, 5)
        limit = n_bytes * times["read"] / READ
        share = f"{limit / times['1']:.2f}" + (f" (target {TARGETS[name]})" if name in TARGETS else "")
        ratios = [f"{times[str(n)] / times['1']:.2f}" for n in BATCHES[1:]]
        lines.append([name, f"{n_bytes / 2**20:.0f}", f"{READ / times['read'] / 1e9:.1f}", f"**{share}**", *ratios])
    header = ["format", "MiB", "read (GB/s)", "one row over the limit", *(f"{n} rows / 1" for n in BATCHES[1:])]
    return table(header, lines)


def prompt() -> str:
    """Times of a prompt over that of F.linear in bfloat16 and in float32."""
    lines = []
    for shape in SHAPES[:2]:
        x, matrix = torch.randn(PROMPT, shape[1]), torch.randn(shape) * 0.02
        narrow: tuple[Tensor, Tensor] = (x.bfloat16(), matrix.bfloat16())
        candidates: dict[str, Callable[[], object]] = {
            "F.linear": lambda x=x, m=matrix: F.linear(x, m),
            "F.linear bfloat16": lambda n=narrow: F.linear(*n),
        }
        for name in FORMATS:
            weight = random_q5_k(*shape, torch.Generator()) if name == "q5_k" else pack(matrix, name)
            candidates[name] = lambda x=x, w=weight: packed_linear(x, w)
        times = interleaved(candidates, 20)
        base = times["F.linear bfloat16"]
        lines.append([str((PROMPT, *shape)), *(f"{times[n] * 1e3:.2f} ({base / times[n]:.2f})" for n in candidates)])
    return table(["(rows, n_out, n_in)", *candidates], lines)


def run() -> str:
    """Measure and return the Markdown of the results."""
    with torch.inference_mode():
        words = (
            "Matrices of mamba-130m, more than the caches hold. The limit is the time of reading the same bytes in a "
            "plain loop over 512 MB."
        )
        rows = (
            f"A prompt of {PROMPT} rows: milliseconds, and in brackets how many times as fast as F.linear in bfloat16."
        )
        return "\n\n".join([words, few_rows(), rows, prompt()]) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(machine(), "\n")
    print(run())
