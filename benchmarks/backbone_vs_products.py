"""The 130m backbone (no head) against only the F.linear calls of its layers: forward and a training step.

python -m benchmarks.backbone_vs_products [--layers 24]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from benchmarks.timing import interleaved, machine, table

FORWARD = {torch.float32: 1.15, torch.bfloat16: 1.4}
STEP = {torch.float32: 1.4, torch.bfloat16: 1.8}


def products(model: LanguageModel, length: int) -> tuple[Callable[[], list[Tensor]], Callable[[], None]]:
    """Functions that run only the matrix products of every layer: forward, and forward with backward."""
    layers = [(b.mixer.in_proj, b.mixer.x_proj, b.mixer.dt_proj, b.mixer.out_proj) for b in model.blocks]
    dtype = layers[0][0].weight.dtype
    inputs = [torch.randn(1, length, linear.in_features, dtype=dtype, requires_grad=True) for linear in layers[0]]

    def forward() -> list[Tensor]:
        return [F.linear(x, linear.weight) for linears in layers for x, linear in zip(inputs, linears, strict=True)]

    def step() -> None:
        model.zero_grad()
        outputs = forward()
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    return forward, step


def measured(dtype: torch.dtype, length: int, layers: int, repeats: int) -> list[list[str]]:
    """Rows of the table: forward, training step, optimizer."""
    model = LanguageModel(ModelConfig(d_model=768, n_layers=layers, vocab_size=512)).to(dtype)
    ids = torch.randint(0, 512, (1, length))
    products_forward, products_step = products(model, length)

    def step() -> None:
        model.zero_grad()
        hidden = model.hidden(ids)[0]
        hidden.backward(torch.ones_like(hidden))

    with torch.no_grad():
        forward = interleaved({"ours": lambda: model.hidden(ids), "products": products_forward}, repeats)
    both = interleaved({"ours": step, "products": products_step}, max(2, repeats // 2))
    step()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    update = interleaved({"ours": optimizer.step}, 2)["ours"]
    name = f"{str(dtype).removeprefix('torch.')}, {length} tokens"
    rows = []
    for what, times, limit in (("forward", forward, FORWARD[dtype]), ("training step", both, STEP[dtype])):
        ratio = f"**{times['ours'] / times['products']:.2f}** (limit {limit})"
        rows.append([name, what, f"{times['ours']:.3f}", f"{times['products']:.3f}", ratio])
    return [*rows, [name, "AdamW beside it", f"{update:.3f}", "", ""]]


def run(layers: int = 24, repeats: int = 8) -> str:
    """Measure and return the Markdown of the results."""
    rows = [row for dtype in FORWARD for length in (512, 2048) for row in measured(dtype, length, layers, repeats)]
    header = ["backbone", "pass", "ours (s)", "F.linear alone (s)", "ratio"]
    return f"{layers} layers x 768, batch 1.\n\n{table(header, rows)}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=8)
    arguments = parser.parse_args()
    print(machine(), "\n")
    print(run(arguments.layers, arguments.repeats))
