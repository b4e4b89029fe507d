"""The 130m backbone (no head) on this machine: ours against transformers' own Mamba with the same weights, and against
the bare matrix products of the same layers, float32, batch 1. The candidates take turns.

    python -m benchmarks.backbone_vs_transformers [--length 512] [--layers 24] [--step-layers 4]
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile

import torch
import torch.nn.functional as F

from anymamba.models.language_model import LanguageModel
from benchmarks.timing import interleaved, machine, table

TARGETS = {"forward": 3.0, "forward + backward": 10.0}


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


def build(layers: int) -> tuple[LanguageModel, torch.nn.Module]:
    """Our model and transformers' with the same weights, moved away from their initialisation.

    Another process writes them: what it leaves on the heap would serve transformers' large temporaries, which in a
    program that only loads a model come fresh from the system.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import MambaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", SAVE, str(layers), folder], check=True)
        ours = LanguageModel.from_pretrained(folder)
        theirs = MambaForCausalLM.from_pretrained(folder, use_cache=False)
    return ours, theirs.train()


def products(model: LanguageModel, length: int):
    """The matrix products of every layer, forward and (with gradients) backward, and nothing else."""
    layers = [
        (block.mixer.in_proj, block.mixer.x_proj, block.mixer.dt_proj, block.mixer.out_proj) for block in model.blocks
    ]
    inputs = [torch.randn(1, length, linear.in_features, requires_grad=True) for linear in layers[0]]

    def forward() -> list[torch.Tensor]:
        return [F.linear(x, linear.weight) for linears in layers for x, linear in zip(inputs, linears, strict=True)]

    def backward() -> None:
        outputs = forward()
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    return forward, backward


def run(length: int = 512, layers: int = 24, step_layers: int = 4, repeats: int = 4) -> str:
    """Measure and return the Markdown of the results.

    Backward has fewer layers: there transformers takes some 15 seconds a layer.
    """
    return forward(length, layers, repeats) + "\n" + step(length, step_layers, max(1, repeats // 2))


def forward(length: int, layers: int, repeats: int) -> str:
    """The pass without gradients, and whether the logits agree."""
    ours, theirs = build(layers)
    ids = torch.randint(0, 512, (1, length))
    products_forward, _ = products(ours, length)
    with torch.no_grad():
        difference = (ours(ids).logits - theirs(ids).logits).abs().max().item()
        times = interleaved(
            {
                "ours": lambda: ours.hidden(ids),
                "transformers": lambda: theirs.backbone(ids),
                "products": products_forward,
            },
            repeats,
        )
    note = (
        f"{layers} layers x 768, {length} tokens, batch 1, float32; logits differ by {difference:.1e} (allowed 1e-4)."
    )
    return f"{note}\n\n{row('forward', times)}\n"


def step(length: int, layers: int, repeats: int) -> str:
    """Forward and backward."""
    ours, theirs = build(layers)
    ids = torch.randint(0, 512, (1, length))
    _, products_step = products(ours, length)
    times = interleaved(
        {
            "ours": lambda: ours.hidden(ids)[0].sum().backward(),
            "transformers": lambda: theirs.backbone(ids).last_hidden_state.sum().backward(),
            "products": products_step,
        },
        repeats,
    )
    return f"The same with {layers} layers and gradients.\n\n{row('forward + backward', times)}\n"


def row(what: str, times: dict[str, float]) -> str:
    """A table of one row."""
    header = ["pass", "ours (s)", "transformers (s)", "bare products (s)", "times as fast", "times the products"]
    seconds = [f"{times[name]:.3f}" for name in ("ours", "transformers", "products")]
    faster = f"**{times['transformers'] / times['ours']:.1f}** (target {TARGETS[what]:.0f})"
    return table(header, [[what, *seconds, faster, f"{times['ours'] / times['products']:.2f}"]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--step-layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parser.parse_args()
    print(machine(), "\n")
    print(run(arguments.length, arguments.layers, arguments.step_layers, arguments.repeats))
