"""transformers' Mamba in the shape of the 130m model, with and without our operators, timed in turns; batch 1.

python -m benchmarks.drop_in [--length 512] [--layers 24] [--step-layers 2]
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys

import torch

from benchmarks.timing import interleaved, machine, table

HEADER = [
    "backbone of transformers",
    "with our operators (s)",
    "without (s)",
    "times as fast",
    "outputs differ by (relative)",
]
NOTE = "Random weights over 24 layers amplify a rounding a thousandfold; the tests compare both with float64."
PARTS = {"float32": 3.5, "bfloat16": 3.5, "step": 10.0}
"""The parts, each measured in its own process, with the target of how many times as fast it should be."""


def build(layers: int, dtype: torch.dtype):
    """The model, and two functions that switch our operators on and off in its file."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import MambaConfig, MambaModel
    from transformers.models.mamba import modeling_mamba

    from anymamba.compat import activate

    torch.manual_seed(0)
    model = MambaModel(MambaConfig(hidden_size=768, num_hidden_layers=layers, vocab_size=512, use_cache=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    plain = dict(vars(modeling_mamba))
    activate()
    ours = {name: value for name, value in vars(modeling_mamba).items() if plain.get(name) is not value}
    theirs = {name: plain[name] for name in ours}
    return model.to(dtype).train(), *(lambda kept=kept: vars(modeling_mamba).update(kept) for kept in (ours, theirs))


def measure(part: str, length: int, layers: int, repeats: int) -> list[str]:
    """A row of the table."""
    step = part == "step"
    dtype = torch.float32 if step else getattr(torch, part)
    model, switch_on, switch_off = build(layers, dtype)
    ids = torch.randint(0, 512, (1, length))

    def run(switch) -> torch.Tensor:
        switch()
        with torch.set_grad_enabled(step):
            hidden = model(ids).last_hidden_state
        if step:
            hidden.sum().backward()
        return hidden.detach()

    times = interleaved({"ours": lambda: run(switch_on), "theirs": lambda: run(switch_off)}, repeats)
    want = run(switch_off)
    difference = ((run(switch_on) - want).norm() / want.norm()).item()
    what = f"{'training step' if step else 'forward'}, {layers} layers, {length} tokens, {'float32' if step else part}"
    faster = f"**{times['theirs'] / times['ours']:.1f}** (target {PARTS[part]})"
    return [what, f"{times['ours']:.3f}", f"{times['theirs']:.3f}", faster, f"{difference:.1e}"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--step-layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=PARTS)
    arguments = parser.parse_args()
    if arguments.part is None:
        print(machine(), "\n")
        command = [sys.executable, "-m", "benchmarks.drop_in", *sys.argv[1:], "--part"]
        lines = [subprocess.run([*command, p], capture_output=True, text=True, check=True).stdout for p in PARTS]
        print(NOTE, "\n")
        print(table(HEADER, [line.strip().split(";") for line in lines]))
    else:
        layers = arguments.step_layers if arguments.part == "step" else arguments.layers
        print(*measure(arguments.part, arguments.length, layers, arguments.repeats), sep=";")
