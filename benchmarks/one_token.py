"""The time of one token in every weight format, beside the time that reading the weights and the state once takes.

The limit is measured in turns with the tokens: a compiled loop reads 512 MB with all threads.

    python -m benchmarks.one_token [--without-2.8b]
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from anymamba.console.openmp import watch
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.evaluation.inference_speed import weight_bytes
from anymamba.generation.generate import stream
from anymamba.generation.sampling import SamplingConfig
from anymamba.models.config import ModelConfig
from anymamba.models.inference import InferenceModel
from anymamba.models.language_model import LanguageModel
from anymamba.models.presets import preset
from anymamba.models.weight_formats import Weights
from anymamba.parts.state import state_bytes
from benchmarks.products import READ, read
from benchmarks.timing import machine, table

FORMATS: tuple[Weights, ...] = ("float32", "bfloat16", "int8", "int4")
WANTED = {"float32": 1.07, "bfloat16": 1.12, "int8": 1.25, "int4": 1.4}
"""Milliseconds of a token over those of the limit, at most."""
WANTED_LARGE, WANTED_GB = 1.25, 2.2
WANTED_DEMO, WANTED_BUSY = 0.2, 2.2
DEMO = ModelConfig(d_model=256, n_layers=3, vocab_size=257)
"""The larger of the models that `anymamba demo` trains."""
BUSY = "x = 0\nwhile True: x += 1"


def token_of(model: InferenceModel) -> Callable[[], object]:
    """A function that reads one token; the state is reused."""
    state, ids = model.init_state(1), torch.tensor([1])

    def step() -> None:
        with torch.inference_mode():
            model.step(ids, state, reuse_state=True)

    return step


def bytes_of(model: InferenceModel) -> int:
    """Bytes of weights and state that a token reads."""
    return weight_bytes(model) + state_bytes(model.init_state(1))


# ------------------------------------------------------------------------------------------------- llama.cpp


def llama_token(model: InferenceModel, folder: Path, name: str) -> Callable[[], object] | None:
    """The same in llama.cpp, from a file that we write; None without its Python binding."""
    try:
        import llama_cpp
    except ImportError:
        return None
    path = folder / f"{name}.gguf"
    model.save_pretrained(path, format="gguf")
    llama: Any = llama_cpp.Llama(str(path), n_ctx=4096, n_threads=torch.get_num_threads(), verbose=False)
    llama.eval([1, 2, 3])

    def step() -> None:
        if llama.n_tokens > 4000:
            llama.reset()
        llama.eval([1])

    return step


# ------------------------------------------------------------------------------------------------- measuring


def medians(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each; they take turns, each three times in a row, of which the first does not count."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            for attempt in range(3):
                start = time.perf_counter()
                run()
                if attempt:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def formats_of_130m(repeats: int) -> str:
    """A table with a row for each format."""
    torch.manual_seed(0)
    source = LanguageModel(preset("mamba-130m"))
    models = {weights: source.for_inference(weights) for weights in FORMATS}
    memory = torch.zeros(READ // 4)
    with tempfile.TemporaryDirectory() as folder:
        candidates: dict[str, Callable[[], object]] = {"read": lambda: read(memory)}
        for weights, model in models.items():
            candidates[weights] = token_of(model)
            peer = llama_token(model, Path(folder), weights)
            if peer is not None:
                candidates[f"llama {weights}"] = peer
        found = medians(candidates, repeats)
    rate = READ / found["read"]
    rows = []
    for weights, model in models.items():
        limit = bytes_of(model) / rate
        peer_time = found.get(f"llama {weights}")
        rows.append(
            [
                weights,
                f"{bytes_of(model) / 1e6:.0f}",
                f"{1e3 * limit:.2f}",
                f"{1e3 * found[weights]:.2f}",
                f"**{found[weights] / limit:.2f}** ({WANTED[weights]})",
                "not installed" if peer_time is None else f"{1e3 * peer_time:.2f} ({peer_time / limit:.2f})",
            ]
        )
    header = ["weights", "MB read", "limit, ms", "a token, ms", "over the limit (wanted)", "llama.cpp, ms"]
    return f"130m, one row; reading alone: {rate / 1e9:.1f} GB/s.\n\n{table(header, rows)}\n"


def large(repeats: int) -> str:
    """The shape of 2.8b in int4, in a process that holds nothing else."""
    model = InferenceModel.random(preset("mamba-2.8b"), "int4")
    step = token_of(model)
    step()
    used = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    memory = torch.zeros(READ // 4)
    found = medians({"read": lambda: read(memory), "token": step}, repeats)
    limit = bytes_of(model) * found["read"] / READ
    return (
        f"2.8b, int4, random weights: {bytes_of(model) / 1e9:.2f} GB read, {1e3 * found['token']:.1f} ms a token, "
        f"**{found['token'] / limit:.2f}** of the limit (wanted {WANTED_LARGE}); {used:.2f} GB of memory (wanted "
        f"{WANTED_GB}), {peak:.2f} GB while the weights were made.\n"
    )


def demo_token(seconds: float) -> float:
    """Milliseconds of a token of the demo's model in a stream, with sampling and text."""
    torch.manual_seed(0)
    model, sampling = LanguageModel(DEMO).eval(), SamplingConfig(temperature=0.8, top_p=0.95)

    def tokens() -> Iterator[object]:
        for seed in itertools.count():  # a stream ends when it draws the end of the text
            yield from stream(model, [[1, 2, 3]], ByteTokenizer(), max_new_tokens=1000, sampling=sampling, seed=seed)

    run = tokens()
    return mean_time(lambda: next(run), seconds)


def token(weights: Weights, seconds: float) -> float:
    """Milliseconds of a token of 130m."""
    return mean_time(token_of(InferenceModel.random(preset("mamba-130m"), weights)), seconds)


def prompt(weights: Weights, seconds: float) -> float:
    """Milliseconds in which 130m reads 512 tokens."""
    model, ids = InferenceModel.random(preset("mamba-130m"), weights), torch.randint(50000, (1, 512))

    def read_prompt() -> None:
        with torch.inference_mode():
            model(ids, num_last_logits=1)

    return mean_time(read_prompt, seconds)


def large_token(seconds: float) -> float:
    """Milliseconds of a token of 2.8b in int4."""
    return mean_time(token_of(InferenceModel.random(preset("mamba-2.8b"), "int4")), seconds)


def mean_time(run: Callable[[], object], seconds: float) -> float:
    """Mean milliseconds of a call; pauses count."""
    run()
    n, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        run()
        n += 1
    return 1e3 * (time.perf_counter() - start) / n


PARTS: dict[str, Callable[[float], object]] = {
    "large": lambda seconds: large(max(3, int(seconds / 0.6))),
    "demo": demo_token,
    **{weights: partial(token, weights) for weights in FORMATS},
    "2.8b, int4": large_token,
    "prompt of 512, bfloat16": partial(prompt, "bfloat16"),
    "prompt of 512, int8": partial(prompt, "int8"),
}
"""What runs in a process of its own: with the settings of the command line, alone or beside a busy process."""


def part(name: str, seconds: float, busy: bool = False) -> str:
    """What a part prints."""
    other = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    try:
        command = [sys.executable, "-m", "benchmarks.one_token", "--part", name, "--seconds", str(seconds)]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    finally:
        if other is not None:
            other.kill()
            other.wait()


def beside_a_busy_process(seconds: float) -> str:
    """A table: tokens and prompts, quiet and beside a process that keeps one core busy."""
    rows = []
    for name in (part for part in PARTS if part != "large"):
        quiet = min(float(part(name, seconds)) for _ in range(2))
        busy = min(float(part(name, seconds, busy=True)) for _ in range(2))
        rows.append([name, f"{quiet:.3f}", f"{busy:.3f}", f"**{busy / quiet:.2f}** ({WANTED_BUSY})"])
    header = ["", "ms, quiet", "ms, beside one busy process", "ratio (wanted)"]
    return table(header, rows) + f"\n\nThe demo's model includes sampling and text; wanted {WANTED_DEMO} ms.\n"


def run(repeats: int, seconds: float, with_large: bool) -> str:
    """Measure and return the Markdown of the results."""
    parts = [formats_of_130m(repeats)]
    if with_large:
        parts.append(part("large", seconds))
    return "\n".join([*parts, beside_a_busy_process(seconds)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--without-2.8b", action="store_true", dest="without_large")
    arguments = parser.parse_args()
    if arguments.part:
        threading.Thread(target=watch, daemon=True).start()  # as the command line does
        print(PARTS[arguments.part](arguments.seconds))
    else:
        print(machine(), "\n")
        print(run(arguments.repeats, arguments.seconds, not arguments.without_large))
