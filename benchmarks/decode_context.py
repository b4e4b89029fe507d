"""The time per generated token after a context of 128 and of 32,768 tokens, and the size of the state after each.

The two streams run in turns, a few tokens each. The whole path of `stream` is measured, including sampling.

    python -m benchmarks.decode_context [--context 32768]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from anymamba.generation.generate import TokenStream, stream
from anymamba.generation.sampling import SamplingConfig
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.models.presets import preset
from anymamba.parts.state import state_bytes
from benchmarks.timing import machine, table

LIMIT = 1.1
SHORT = 128
MODELS = {"tiny": (400, 4), "mamba-130m": (30, 2)}
"""For each model, the number of repeats and the tokens in each turn."""


def measure(config: ModelConfig, contexts: list[int], repeats: int, tokens: int) -> dict[int, tuple[float, int]]:
    """For each context, the median seconds per token and the bytes of the state."""
    torch.manual_seed(0)
    model = LanguageModel(config)
    sampling = SamplingConfig(temperature=0.8, top_p=0.95)
    streams: dict[int, TokenStream] = {}
    for context in contexts:
        prompt = torch.randint(0, config.vocab_size, (context,)).tolist()
        streams[context] = stream(model, [prompt], max_new_tokens=(repeats + 1) * tokens, sampling=sampling)
    times: dict[int, list[float]] = {context: [] for context in contexts}
    for repeat in range(repeats + 1):
        for context in contexts if repeat % 2 else contexts[::-1]:
            start = time.perf_counter()
            for _ in range(tokens):
                next(streams[context])
            if repeat:  # the first warms up
                times[context].append((time.perf_counter() - start) / tokens)
    return {context: (statistics.median(times[context]), state_bytes(streams[context].state)) for context in contexts}


def run(context: int = 32768) -> str:
    """Measure and return the Markdown of the results."""
    rows = []
    for name, (repeats, tokens) in MODELS.items():
        found = measure(preset(name), [SHORT, context], repeats, tokens)
        (short, short_bytes), (long, long_bytes) = found[SHORT], found[context]
        same = "equal" if short_bytes == long_bytes else f"**grown** from {short_bytes:,}"
        ratio = f"**{long / short:.3f}** (limit {LIMIT})"
        rows.append([name, f"{1e3 * short:.2f}", f"{1e3 * long:.2f}", ratio, f"{long_bytes:,} ({same})"])
    header = ["model", f"ms a token after {SHORT:,}", f"after {context:,}", "ratio", "bytes of the state"]
    return f"One row, float32, temperature and top-p; medians, the contexts take turns.\n\n{table(header, rows)}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=32768)
    arguments = parser.parse_args()
    print(machine(), "\n")
    print(run(arguments.context))
