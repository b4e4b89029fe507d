"""The 130m backbone (no head): ours against transformers' Mamba with the same weights, timed in turns; batch 1.

python -m benchmarks.backbone_vs_transformers [--length 512] [--layers 24] [--step-layers 2]
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile

import torch

from anymamba.models.language_model import LanguageModel
from benchmarks.timing import interleaved, machine, table

FORWARD = {torch.float32: 4.5, torch.bfloat16: 15.0}  # times as fast
STEP = 30.0
HEADER = ["backbone", "ours (s)", "transformers (s)", "times as fast", "logits differ by"]

SAVE = """
import sys, torch
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
torch.manual_seed(0)
model = LanguageModel(ModelConfig(d_model=768, n_layers=int(sys.argv[1]), vocab_size=512))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.01)
model.save_pretrained(sys.argv[2])
"""


def build(layers: int, dtype: torch.dtype = torch.float32) -> tuple[LanguageModel, torch.nn.Module]:
    """Our model and transformers' with the same weights, which differ from their initialisation.

    Another process makes the weights. Otherwise transformers could reuse the memory that this leaves on the heap for
    its large temporaries; a program that only loads a model must get that memory from the system.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import MambaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", SAVE, str(layers), folder], check=True)
        ours = LanguageModel.from_pretrained(folder, dtype=dtype)
        theirs = MambaForCausalLM.from_pretrained(folder, use_cache=False, dtype=dtype)
    return ours, theirs.train()


PARTS = ("float32", "bfloat16", "step")


def run(options: list[str]) -> str:
    """Measure each part in its own process, for the reason given in `build`, and return the Markdown."""
    command = [sys.executable, "-m", "benchmarks.backbone_vs_transformers", *options, "--part"]
    lines = [subprocess.run([*command, part], capture_output=True, text=True, check=True).stdout for part in PARTS]
    return table(HEADER, [line.strip().split(";") for line in lines]) + "\n"


def forward(length: int, layers: int, repeats: int, dtype: torch.dtype) -> list[str]:
    """The forward pass without gradients, and the difference of the logits."""
    ours, theirs = build(layers, dtype)
    ids = torch.randint(0, 512, (1, length))
    with torch.no_grad():
        times = interleaved({"ours": lambda: ours.hidden(ids), "theirs": lambda: theirs.backbone(ids)}, repeats)
        difference = (ours(ids).logits - theirs(ids).logits).abs().max().item()
    name = f"forward, {layers} layers, {length} tokens, {str(dtype).removeprefix('torch.')}"
    return row(name, times, FORWARD[dtype], f"{difference:.1e}")


def step(length: int, layers: int, repeats: int) -> list[str]:
    """Forward and backward in float32."""
    ours, theirs = build(layers)
    ids = torch.randint(0, 512, (1, length))
    times = interleaved(
        {
            "ours": lambda: ours.hidden(ids)[0].sum().backward(),
            "theirs": lambda: theirs.backbone(ids).last_hidden_state.sum().backward(),
        },
        repeats,
    )
    return row(f"training step, {layers} layers, {length} tokens, float32", times, STEP, "")


def row(what: str, times: dict[str, float], target: float, difference: str) -> list[str]:
    """A row of the table."""
    faster = f"**{times['theirs'] / times['ours']:.1f}** (target {target})"
    return [what, f"{times['ours']:.3f}", f"{times['theirs']:.3f}", faster, difference]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--step-layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--part", choices=PARTS)
    arguments = parser.parse_args()
    if arguments.part is None:
        print(machine(), "\n")
        print(run(sys.argv[1:]))
    elif arguments.part == "step":
        print(*step(arguments.length, arguments.step_layers, max(1, arguments.repeats // 2)), sep=";")
    else:
        dtype = getattr(torch, arguments.part)
        print(*forward(arguments.length, arguments.layers, arguments.repeats, dtype), sep=";")
