"""Throughput of Mamba 1.4b against a Transformer++ of 1.3b: a prompt of 2,048 tokens, then 128 new ones.

python -m benchmarks.gpu_throughput [--mamba mamba-1.4b] [--transformer transformer++-1.3b]

Random weights in bfloat16. The Transformer has a static cache, CUDA graphs and the faster of torch's attentions for
one query; it takes as many rows as fit into memory. Mamba takes the best of several batches, with float32 states.
Throughput is new tokens per second, of decoding alone and, as in the paper (arXiv:2312.00752, figure 8), with the
prompt included.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anymamba.models.inference import InferenceModel
from anymamba.models.language_model import LanguageModel
from anymamba.models.presets import preset
from anymamba.parts.state import concatenate_rows, state_bytes
from anymamba.runtimes import nvrtc
from benchmarks.gpu import machine
from benchmarks.gpu_transformer import StaticTransformer
from benchmarks.timing import table

PROMPT, NEW = 2048, 128
MAMBA_BATCHES = (256, 512, 1024)
PIECE = 8
"""Rows of a prompt that Mamba reads at once, so that it fits into memory."""
SPARE = 10 << 30
"""Bytes that the Transformer's batch leaves free for prompts, graphs and the allocator."""
ATTENTIONS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
DECODING_TARGET, WHOLE_TARGET = 5.0, 1.5


class Result(NamedTuple):
    """One run."""

    name: str
    batch: int
    prompt_seconds: float
    new_seconds: float
    peak_bytes: int

    @property
    def decoding(self) -> float:
        """New tokens per second after the prompt, which gives the first one."""
        return self.batch * (NEW - 1) / self.new_seconds

    @property
    def whole(self) -> float:
        """New tokens per second, prompt included."""
        return self.batch * NEW / (self.prompt_seconds + self.new_seconds)


def timed(run: Callable[[], object]) -> float:
    """Seconds until the GPU is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def exhaust(steps: Iterable[object]) -> None:
    for _ in steps:
        pass


def random_ids(batch: int) -> Tensor:
    return torch.randint(50000, (batch, PROMPT), device="cuda")


# ------------------------------------------------------------------------------------------ the Transformer


def transformer(name: str) -> list[Result]:
    """The largest batch that fits, with each attention."""
    weights = 2 * LanguageModel(preset(name), device="meta").n_parameters()
    free, _ = torch.cuda.mem_get_info()
    batch = int((free - weights - SPARE) // StaticTransformer.row_bytes(name, PROMPT + NEW)) // 8 * 8
    model, ids = StaticTransformer(name, batch, PROMPT + NEW), random_ids(batch)
    lengths, found = range(PROMPT, PROMPT + NEW - 1), list[Result]()
    model.read(ids[:PIECE])  # compiles
    prompt_seconds = timed(lambda: model.read(ids))
    for attention, backend in ATTENTIONS.items():
        try:
            model.graphs.clear()
            with sdpa_kernel(backend):
                model.capture(lengths)
            torch.cuda.reset_peak_memory_stats()
            new_seconds = timed(lambda: exhaust(model.generate(lengths)))
        except Exception as error:  # the other attention may serve
            print(f"{name} with {attention}: {str(error)[:300]}", file=sys.stderr)
            continue
        kept = torch.cuda.max_memory_allocated()
        found.append(Result(f"{name}, {attention}", batch, prompt_seconds, new_seconds, kept))
        print(found[-1], file=sys.stderr)
    return found


# ------------------------------------------------------------------------------------------ Mamba


def mamba(name: str) -> list[Result]:
    """Several batches."""
    model, found = InferenceModel.random(preset(name), "bfloat16", device="cuda"), list[Result]()
    for batch in MAMBA_BATCHES:
        try:
            found.append(mamba_batch(model, name, batch))
        except torch.OutOfMemoryError:
            break
        print(found[-1], file=sys.stderr)
        gc.collect()
        torch.cuda.empty_cache()
    return found


def mamba_batch(model: InferenceModel, name: str, batch: int) -> Result:
    """Greedy generation of a batch, whose prompts are read in pieces of rows."""
    ids = random_ids(batch)
    torch.cuda.reset_peak_memory_stats()

    def read() -> tuple[Tensor, Any]:
        parts = [model(piece, num_last_logits=1) for piece in ids.split(PIECE)]
        return torch.cat([p.logits[:, -1].argmax(-1) for p in parts]), concatenate_rows([p.state for p in parts])

    def generate(tokens: Tensor, state: Any, n_tokens: int) -> Any:
        for _ in range(n_tokens):
            logits, state = model.step(tokens, state, reuse_state=True)
            tokens = logits.argmax(-1)
        return tokens, state

    model(ids[:PIECE], num_last_logits=1)
    generate(ids[:, 0].contiguous(), model.init_state(batch), 3)  # compiles, records
    found: list[Any] = []
    prompt_seconds = timed(lambda: found.append(read()))
    new_seconds = timed(lambda: generate(*found.pop(), NEW - 1))
    return Result(name, batch, prompt_seconds, new_seconds, torch.cuda.max_memory_allocated())


# ------------------------------------------------------------------------------------------ the table


def report(mambas: list[Result], transformers: list[Result]) -> str:
    """Both models, and the ratios of the best of each."""
    rows = []
    for r in transformers + mambas:
        times = [f"{r.prompt_seconds:.2f}", f"{1e3 * r.new_seconds / (NEW - 1):.2f}"]
        rates = [f"{r.decoding:,.0f}", f"{r.whole:,.0f}", f"{r.peak_bytes / 2**30:.0f}"]
        rows.append([r.name, str(r.batch), *times, *rates])
    header = ["model", "batch", "prompt, s", "a token, ms", "tokens/s, decoding", "tokens/s, prompt included", "GiB"]
    lines = [table(header, rows), ""]
    for what, target in (("decoding", DECODING_TARGET), ("whole", WHOLE_TARGET)):
        ours, theirs = (max(getattr(r, what) for r in results) for results in (mambas, transformers))
        words = "decoding alone" if what == "decoding" else "prompt included"
        lines.append(f"Best batch of each, {words}: Mamba generates {ours / theirs:.2f} times as fast (>= {target}).")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mamba", default="mamba-1.4b")
    parser.add_argument("--transformer", default="transformer++-1.3b")
    options = parser.parse_args()
    if nvrtc.reason():
        sys.exit(f"the kernels do not run here: {nvrtc.reason()}")
    print(machine())
    with torch.inference_mode():
        mambas = mamba(options.mamba)
        gc.collect()
        torch.cuda.empty_cache()
        transformers = transformer(options.transformer)
    state = LanguageModel(preset(options.mamba), device="meta").init_state(1)
    print(
        f"\nA row of {options.mamba} has {state_bytes(state) / 1e6:.1f} MB of state, of {options.transformer} ", end=""
    )
    row = StaticTransformer.row_bytes(options.transformer, PROMPT + NEW)
    print(f"{row / 1e6:.0f} MB of keys and values.\n\n{report(mambas, transformers)}")


if __name__ == "__main__":
    main()
