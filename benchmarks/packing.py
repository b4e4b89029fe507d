"""A training step on 1,000 packed short documents against one sequence of the same total length, timed in turns.

python -m benchmarks.packing [--documents 1000]
"""

from __future__ import annotations

import argparse

import torch

from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from benchmarks.timing import interleaved, machine, table

LIMIT = 1.3


def run(documents: int = 1000, mean_length: int = 16, repeats: int = 7) -> str:
    """Measure and return the Markdown of the results."""
    torch.manual_seed(0)
    lengths = torch.randint(1, 2 * mean_length, (documents,))
    total = int(lengths.sum())
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    model = LanguageModel(ModelConfig(d_model=192, n_layers=2, vocab_size=257))
    ids, labels = torch.randint(0, 257, (2, 1, total))

    def step(offsets: torch.Tensor | None) -> None:
        model.zero_grad()
        model.loss(ids, labels, cu_seqlens=offsets).loss.backward()

    best = interleaved({"packed": lambda: step(cu_seqlens), "one": lambda: step(None)}, repeats)
    ratio = best["packed"] / best["one"]
    rows = [
        [str(documents), str(total), f"{best['packed']:.2f}", f"{best['one']:.2f}", f"**{ratio:.2f}** (limit {LIMIT})"]
    ]
    header = ["documents", "tokens", "packed (s)", "one sequence (s)", "ratio"]
    return f"Forward and backward of 2 layers x 192.\n\n{table(header, rows)}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1000)
    arguments = parser.parse_args()
    print(machine(), "\n")
    print(run(arguments.documents))
