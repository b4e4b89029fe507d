"""Reading a prompt in every weight format, beside its products and beside llama.cpp; and reading a few tokens.

python -m benchmarks.prompt [--length 512]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from anymamba.models.inference import InferenceModel
from anymamba.models.inference import model as inference_model
from anymamba.models.presets import preset
from anymamba.models.weight_formats import WEIGHTS
from benchmarks.timing import interleaved, machine, table

LENGTH = 512
FEW = (1, 4, 16, 64)
WANTED = {"bfloat16": 1.4, "int8": 1.4}
"""Times of F.linear over all matrices in bfloat16, at most."""


def products(model: InferenceModel, length: int) -> Callable[[], object]:
    """F.linear in bfloat16 over matrices of the model's shapes; the head reads one row."""
    pairs = []
    for name, weight in model.packed_weights().items():
        n_out, n_in = weight.shape
        rows = 1 if name in ("embedding.weight", "head.weight") else length
        pairs.append((torch.randn(rows, n_in).bfloat16(), torch.randn(n_out, n_in).bfloat16()))
    return lambda: [F.linear(x, w) for x, w in pairs]


def llama_prompt(model: InferenceModel, path: Path, length: int) -> Callable[[], object] | None:
    """The same in llama.cpp, from a file that we write; None without its Python binding."""
    try:
        import llama_cpp
    except ImportError:
        return None
    model.save_pretrained(path, format="gguf")
    threads, ids = torch.get_num_threads(), list(range(length))
    options = {"n_ctx": 2 * length, "n_batch": length, "n_ubatch": length, "n_threads_batch": threads}
    llama: Any = llama_cpp.Llama(str(path), n_threads=threads, verbose=False, **options)

    def read() -> None:
        llama.reset()
        llama.eval(ids)

    return read


def run(length: int, repeats: int) -> str:
    """Measure and return the Markdown of the results."""
    config, ids = preset("mamba-130m"), torch.randint(1000, (1, length))
    models = {weights: InferenceModel.random(config, weights) for weights in WEIGHTS}
    candidates: dict[str, Callable[[], object]] = {"products": products(models["float32"], length)}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for weights, model in models.items():
            candidates[weights] = lambda model=model: model(ids, num_last_logits=1)
            peer = llama_prompt(model, Path(folder) / f"{weights}.gguf", length)
            if peer is not None:
                candidates[f"llama {weights}"] = peer
        found = interleaved(candidates, repeats)
    limit, rows = found["products"], []
    for weights in models:
        wanted = f" ({WANTED[weights]})" if weights in WANTED else ""
        peer_time = found.get(f"llama {weights}")
        other = "not installed" if peer_time is None else f"{1e3 * peer_time:.0f} ({peer_time / limit:.2f})"
        times = "" if peer_time is None else f"{peer_time / found[weights]:.1f}"
        rows.append([weights, f"{1e3 * found[weights]:.1f}", f"**{found[weights] / limit:.2f}**{wanted}", other, times])
    header = ["weights", "ms", "over the products (wanted)", "llama.cpp, ms", "llama.cpp / ours"]
    title = f"130m, a prompt of {length} tokens; its products with F.linear in bfloat16: {1e3 * limit:.1f} ms."
    return f"{title}\n\n{table(header, rows)}\n"


def few_tokens(repeats: int) -> str:
    """Reading a few tokens in one compiled call, and block by block."""
    rows = []
    for name in ("tiny", "mamba-130m"):
        packed = InferenceModel.random(preset(name), "int8")
        for n in FEW:
            ids = torch.randint(200, (1, n))
            with torch.inference_mode():
                found = interleaved(
                    {"compiled": partial(packed, ids), "blocks": partial(by_blocks, packed, ids)}, repeats
                )
            one, other = found["compiled"], found["blocks"]
            rows.append([f"{name}, {n}", f"{1e3 * one:.2f}", f"{1e3 * other:.2f}", f"**{other / one:.1f}**"])
    header = ["int8, tokens", "one compiled call (ms)", "block by block (ms)", "times as fast"]
    return f"A few tokens after none, with the logits of all.\n\n{table(header, rows)}\n"


def by_blocks(packed: InferenceModel, ids: torch.Tensor) -> None:
    with mock.patch.object(inference_model, "FEW_TOKENS", 0):
        packed(ids)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--repeats", type=int, default=6)
    arguments = parser.parse_args()
    print(machine(), "\n")
    print(few_tokens(arguments.repeats))
    print(run(arguments.length, arguments.repeats))
