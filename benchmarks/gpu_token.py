"""One token of Mamba on a GPU against the bandwidth of its memory.

python -m benchmarks.gpu_token [--rows NAME ...]

Random weights. A token is a step whose ids are the likeliest of the last step's logits, chosen on the GPU; the state is
reused. "limit" is the time that the bytes of a step take at the rates measured in the same run: weights are read, and
states are read and written. "served" waits for each token's id on the CPU before the next step. "generated" is what a
greedy token of `generate` costs.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from anymamba.generation.generate import generate
from anymamba.generation.sampling import SamplingConfig
from anymamba.models.inference import InferenceModel
from anymamba.models.presets import preset
from anymamba.models.weight_formats import Weights
from anymamba.parts.state import state_bytes
from benchmarks.gpu import machine, time_of
from benchmarks.timing import table

REPEATS, STEPS = 9, 20
SHORT, LONG = 20, 220
"""Lengths of two answers; their difference has no prompt in it."""


class Row(NamedTuple):
    """What is measured, and the milliseconds that are wanted, or the share of the bandwidth."""

    preset: str
    weights: Weights
    batch: int
    wanted: str = ""


ROWS = {
    "130m": Row("mamba-130m", "bfloat16", 1, "0.5 ms"),
    "130m-float32": Row("mamba-130m", "float32", 1),
    "130m-8": Row("mamba-130m", "bfloat16", 8),
    "130m-64": Row("mamba-130m", "bfloat16", 64),
    "2.8b": Row("mamba-2.8b", "bfloat16", 1, "2.3 ms"),
    "2.8b-4": Row("mamba-2.8b", "bfloat16", 4),
    "130m-int8": Row("mamba-130m", "int8", 1),
    "2.8b-int8": Row("mamba-2.8b", "int8", 1, "less than bfloat16"),
    "2.8b-int4": Row("mamba-2.8b", "int4", 1, "less than bfloat16"),
    "2.8b-int8-8": Row("mamba-2.8b", "int8", 8),
    "1.4b-256": Row("mamba-1.4b", "bfloat16", 256, "0.6 of the limit"),
}


class Rates(NamedTuple):
    """Bytes per millisecond."""

    read: float
    """Of a sum over more than the caches hold."""
    moved: float
    """Read and written, of numbers that are incremented in place."""


def measured_rates() -> Rates:
    """The memory's rates; a graph's copy would run in the copy engines, which are slower than kernels."""
    numbers = torch.ones(1 << 29, device="cuda")
    return Rates(numbers.nbytes / time_of(numbers.sum), 2 * numbers.nbytes / time_of(lambda: numbers.add_(1)))


def limit_of(model: InferenceModel, batch: int, rates: Rates) -> float:
    """Milliseconds in which weights are read, and states are read and written. The table of an untied embedding is not
    counted."""
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    table = 0 if model.head is None else sum(t.nbytes for t in model.embedding.buffers())
    return (weights - table) / rates.read + 2 * state_bytes(model.init_state(batch)) / rates.moved


def milliseconds_of_token(model: InferenceModel, batch: int) -> tuple[float, float, float]:
    """Of a step on the GPU, of one whose ids the CPU waits for, and of the first step, which records the graph."""
    ids, state = torch.zeros(batch, dtype=torch.int64, device="cuda"), model.init_state(batch)

    def token() -> None:
        nonlocal ids, state
        logits, state = model.step(ids, state, reuse_state=True)
        ids = logits.argmax(-1)

    def served() -> None:
        token()
        ids.tolist()

    with torch.inference_mode():
        first = timed(served, 1)
        timed(token, 3)
        return (
            statistics.median(timed(token, STEPS) for _ in range(REPEATS)),
            statistics.median(timed(served, STEPS) for _ in range(REPEATS)),
            first,
        )


def milliseconds_of_generated(model: InferenceModel, batch: int) -> float:
    """A greedy token of every row."""

    def generated(n_tokens: int) -> float:
        options = {"max_new_tokens": n_tokens, "sampling": SamplingConfig(temperature=0)}
        return timed(lambda: generate(model, [[1, 2, 3]] * batch, **options), 1)  # type: ignore[arg-type]

    generated(SHORT)
    return (generated(LONG) - generated(SHORT)) / (LONG - SHORT)


def timed(run: Callable[[], None], repeats: int) -> float:
    """Milliseconds of a call; the GPU is idle before the first and after the last."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / repeats


def measured(row: Row, rates: Rates) -> list[str]:
    """A line of the table."""
    model = InferenceModel.random(preset(row.preset), row.weights, device="cuda")
    token, served, first = milliseconds_of_token(model, row.batch)
    limit = limit_of(model, row.batch, rates)
    name = f"{row.preset}, {row.weights}, {row.batch} rows"
    generated = milliseconds_of_generated(model, row.batch)
    figures = [f"{token:.3f}", f"{limit:.3f}", f"{limit / token:.2f}", f"{served:.3f}", f"{generated:.3f}"]
    figures += [f"{first:.0f}", row.wanted]
    return [name, *figures]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    chosen = parser.parse_args().rows
    rates = measured_rates()
    print(f"{machine()}; read {rates.read / 1e9:.2f}, read and written {rates.moved / 1e9:.2f} TB/s", flush=True)
    lines = []
    for name in chosen:
        try:
            lines.append(measured(ROWS[name], rates))
        except Exception as error:
            lines.append([name, f"failed: {type(error).__name__}: {error}"[:300], *[""] * 6])
        print(*lines[-1], file=sys.stderr, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    print(table(["", "ms a token", "limit", "share of it", "ms served", "ms generated", "first step", "wanted"], lines))


if __name__ == "__main__":
    main()
