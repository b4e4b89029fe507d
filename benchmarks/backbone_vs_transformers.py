"""The 130m backbone (no head) on this machine: ours against transformers' own Mamba with the same weights, and against
the bare matrix products of the same layers, float32, batch 1. The candidates take turns.

    python -m benchmarks.backbone_vs_transformers [--length 512] [--layers 24]
"""

from __future__ import annotations

import argparse
import logging
import tempfile

import torch
import torch.nn.functional as F

from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from benchmarks.timing import interleaved, machine, table

TARGETS = {"forward": 3.0, "forward + backward": 10.0}


def build(layers: int) -> tuple[LanguageModel, torch.nn.Module]:
    """Our model and transformers' with the same weights, moved away from their initialisation."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import MambaForCausalLM

    torch.manual_seed(0)
    ours = LanguageModel(ModelConfig(d_model=768, n_layers=layers, vocab_size=512))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
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


def run(length: int, layers: int, repeats: int) -> str:
    """Measure and return the Markdown of the results."""
    ours, theirs = build(layers)
    ids = torch.randint(0, 512, (1, length))
    with torch.no_grad():
        difference = (ours(ids).logits - theirs(ids).logits).abs().max().item()
    product_forward, product_step = products(ours, length)

    def without_gradients(fn):
        def call() -> None:
            with torch.no_grad():
                fn()

        return call

    forward = interleaved(
        {
            "ours": without_gradients(lambda: ours.hidden(ids)),
            "transformers": without_gradients(lambda: theirs.backbone(ids)),
            "products": without_gradients(product_forward),
        },
        repeats,
    )
    step = interleaved(
        {
            "ours": lambda: ours.hidden(ids)[0].sum().backward(),
            "transformers": lambda: theirs.backbone(ids).last_hidden_state.sum().backward(),
            "products": product_step,
        },
        max(1, repeats // 2),
    )
    rows = [
        [
            what,
            f"{t['ours']:.3f}",
            f"{t['transformers']:.3f}",
            f"{t['products']:.3f}",
            f"**{t['transformers'] / t['ours']:.1f}** (target {TARGETS[what]:.0f})",
            f"{t['ours'] / t['products']:.2f}",
        ]
        for what, t in (("forward", forward), ("forward + backward", step))
    ]
    header = ["pass", "ours (s)", "transformers (s)", "bare products (s)", "times as fast", "times the products"]
    note = (
        f"{layers} layers x 768, {length} tokens, batch 1, float32; logits differ by {difference:.1e} (allowed 1e-4)."
    )
    return f"{note}\n\n{table(header, rows)}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parser.parse_args()
    print(machine(), "\n")
    print(run(arguments.length, arguments.layers, arguments.repeats))
