"""A training step (forward and backward) of one layer against mambapy's parallel scan in PyTorch.

python -m benchmarks.layer_vs_mambapy
"""

from __future__ import annotations

import argparse
import importlib.util

import torch

from anymamba import Mamba
from benchmarks.timing import interleaved, machine, table

TARGET = 8.0


def run(d_model: int = 768, lengths: tuple[int, ...] = (512, 2048), repeats: int = 4) -> str:
    """Measure and return the Markdown of the results."""
    if importlib.util.find_spec("mambapy") is None:
        return "Not measured: mambapy is not installed (`make bench` installs it).\n"
    from mambapy.mamba import MambaBlock, MambaConfig

    theirs = MambaBlock(MambaConfig(d_model=d_model, n_layers=1))
    ours = Mamba(d_model)
    rows = []
    for length in lengths:
        x = torch.randn(1, length, d_model)
        candidates = {"ours": lambda x=x: ours(x)[0].sum().backward(), "theirs": lambda x=x: theirs(x).sum().backward()}
        times = interleaved(candidates, repeats)
        ratio = f"**{times['theirs'] / times['ours']:.1f}** (target {TARGET:.0f})"
        rows.append([str(length), f"{times['ours'] * 1e3:.1f}", f"{times['theirs'] * 1e3:.1f}", ratio])
    header = ["tokens", "ours (ms)", "mambapy (ms)", "times as fast"]
    return f"One layer of d_model {d_model}, float32, batch 1.\n\n{table(header, rows)}\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(machine(), "\n")
    print(run())
