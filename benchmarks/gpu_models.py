"""Training steps of whole models on a GPU: tokens per second, peak memory, and where the time goes.

python -m benchmarks.gpu_models [--original FOLDER] [--models mamba-130m ...]

A step is forward, loss, backward and fused AdamW under autocast to bfloat16, with random tokens. It is compared with
mamba-ssm's MambaLMHeadModel and its fused paths, with our Transformer++ of the size and torch's flash attention, and
with the matrix products of our step alone. FOLDER holds the packages `mamba_ssm` and `causal_conv1d` and their compiled
modules; without it the columns of the original are empty. A part that fails leaves its cells empty; its error goes to
stderr.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from anymamba.kernels.linear_cross_entropy.cuda import MOST_LOGITS
from anymamba.models.language_model import LanguageModel
from anymamba.models.presets import preset
from anymamba.ops.linear_cross_entropy import linear_cross_entropy
from anymamba.parts.state import without_last_states
from anymamba.runtimes import nvrtc
from benchmarks.gpu import machine
from benchmarks.gpu_profile import GROUPS, profile
from benchmarks.timing import table

MODELS = {"mamba-130m": "transformer++-125m", "mamba-370m": "transformer++-350m"}
"""Presets, and the Transformer++ of the same size."""
SHAPES = ((16, 2048), (1, 32768))
"""Batch and length."""
WARM_UP, STEPS = 3, 8
SPEED_TARGET, SHARE_LIMIT = 1.3, 15
"""Times the original's tokens per second, at least; percent of a step in anything but products and scans, at most."""

BF16 = torch.bfloat16
Loss = Callable[[Tensor, Tensor], Tensor]
"""The mean loss of ids (batch, length) and labels."""
Result = tuple[float, float]
"""Tokens per second, and peak memory in GiB."""
Row = tuple[str, int, int]
"""Model, batch and length."""
Found = dict[Row, dict[str, Result]]
"""What each candidate reaches in each row; candidates that failed are missing."""


# ------------------------------------------------------------------------------------------ the models


def ours(name: str) -> tuple[nn.Module, Loss]:
    """A preset of this package, and its loss."""
    model = LanguageModel(preset(name), device="cuda")

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        with without_last_states():
            output = model.loss(ids, labels)
        return output.loss / output.n_tokens

    return model, loss


def transformer(name: str) -> tuple[nn.Module, Loss]:
    """The same, and an error instead of another attention than the faster of torch's and cuDNN's flash attention."""
    model, loss = ours(name)

    def with_flash(ids: Tensor, labels: Tensor) -> Tensor:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
            return loss(ids, labels)

    return model, with_flash


def original(name: str) -> tuple[Any, Loss]:
    """mamba-ssm's model of the size, and the usual loss of its logits."""
    config = importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig(
        d_model=preset(name).d_model, n_layer=preset(name).n_layers, vocab_size=preset(name).vocab_size
    )
    model = importlib.import_module("mamba_ssm.models.mixer_seq_simple").MambaLMHeadModel(config, device="cuda")

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())

    return model, loss


def original_with_our_loss(name: str) -> tuple[Any, Loss]:
    """The same without whole logits, which compares the layers alone."""
    model, _ = original(name)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        hidden = model.backbone(ids).flatten(0, 1)
        return linear_cross_entropy(hidden, model.lm_head.weight, labels.flatten()) / labels.numel()

    return model, loss


# ------------------------------------------------------------------------------------------ measuring


def training_step(model: nn.Module, loss_of: Loss, batch: int, length: int) -> Callable[[], None]:
    """A function that does one step on tokens drawn once."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(50000, (batch, length + 1), device="cuda")
    ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        with torch.autocast("cuda", BF16):
            loss = loss_of(ids, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_of(step: Callable[[], None]) -> float:
    """The median over steps that are queued one after the other, as in training."""
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) / 1e3


def measured(build: Callable[[str], tuple[Any, Loss]], name: str, batch: int, length: int) -> Result:
    """Tokens per second and peak memory of a model."""
    torch.manual_seed(0)
    seconds = seconds_of(training_step(*build(name), batch, length))
    return batch * length / seconds, torch.cuda.max_memory_allocated() / 2**30


@torch.no_grad()
def products(name: str, batch: int, length: int) -> Result:
    """Tokens per second of the products of a step alone: one forward and two backward for each linear map."""
    model, n_tokens = LanguageModel(preset(name), device="meta"), batch * length
    shapes = [m.weight.shape for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    weights = [torch.randn(shape, device="cuda", dtype=BF16) for shape in shapes]
    sides = {n: torch.randn(n_tokens, n, device="cuda", dtype=BF16) for shape in shapes for n in shape}
    head = torch.randn(model.embedding.weight.shape, device="cuda", dtype=BF16)
    logits = torch.randn(MOST_LOGITS // len(head), len(head), device="cuda", dtype=BF16)

    def of(x: Tensor, weight: Tensor, dy: Tensor) -> None:
        x @ weight.T
        dy @ weight
        dy.T @ x

    def step() -> None:
        for weight in weights:
            of(sides[weight.shape[1]], weight, sides[weight.shape[0]])
        for x in sides[head.shape[1]].split(len(logits)):
            of(x, head, logits[: len(x)])

    return n_tokens / seconds_of(step), float("nan")


def attempt(name: str, run: Callable[[], Any]) -> Any:
    """The result of `run`, or None if it fails."""
    try:
        result = run()
        print(name, result, file=sys.stderr)
    except Exception as error:  # the other parts go on
        print(f"{name} failed: {type(error).__name__}: {error}"[:2000], file=sys.stderr)
        result = None
    gc.collect()
    torch.cuda.empty_cache()
    return result


# ------------------------------------------------------------------------------------------ tables

CANDIDATES: dict[str, Callable[..., Result]] = {
    "ours": lambda name, *shape: measured(ours, name, *shape),
    "original": lambda name, *shape: measured(original, name, *shape),
    "original, our loss": lambda name, *shape: measured(original_with_our_loss, name, *shape),
    "Transformer++": lambda name, *shape: measured(transformer, MODELS[name], *shape),
    "products": products,
}


def results(names: list[str], with_original: bool) -> Found:
    """Measure every candidate in every row."""
    found: Found = {(name, *shape): {} for name in names for shape in SHAPES}
    for candidate, run in CANDIDATES.items():
        for row, cells in found.items():
            if with_original or not candidate.startswith("original"):
                result = attempt(f"{candidate}, {title(row)}", lambda run=run, row=row: run(*row))  # type: ignore[misc]
                if result is not None:
                    cells[candidate] = result
    return found


def title(row: Row) -> str:
    name, batch, length = row
    return f"{name}, {batch} x {length}"


def speeds(found: Found) -> str:
    """Thousands of tokens per second."""
    rows = []
    for row, cells in found.items():
        shown = [f"{cells[c][0] / 1e3:.1f}" if c in cells else "" for c in CANDIDATES]
        ratios = {c: f"{cells['ours'][0] / cells[c][0]:.2f}" if {c, "ours"} <= cells.keys() else "" for c in CANDIDATES}
        if ratios["original"]:
            ratios["original"] = f"**{ratios['original']}** (target {SPEED_TARGET})"
        rows.append([title(row), *shown, *list(ratios.values())[1:]])
    header = ["thousand tokens a second", *CANDIDATES, *(f"ours / {c}" for c in list(CANDIDATES)[1:])]
    return table(header, rows)


def memories(found: Found) -> str:
    """Peak GiB, with weights, gradients and the optimizer's state."""
    shown = [c for c in CANDIDATES if c != "products"]
    rows = []
    for row, cells in found.items():
        values = [f"{cells[c][1]:.2f}" if c in cells else "" for c in shown]
        both = {"ours", "original"} <= cells.keys()
        ratio = f"**{cells['ours'][1] / cells['original'][1]:.2f}** (limit 1)" if both else ""
        rows.append([title(row), *values, ratio])
    return table(["peak memory (GiB)", *shown, "ours / original"], rows)


def shares(found: Found) -> str:
    """Percent of the time of a step of ours in each group of kernels, and in which the GPU waits."""
    rows = []
    for row, cells in found.items():
        if "ours" not in cells:
            continue
        seconds = row[1] * row[2] / cells["ours"][0]
        times = attempt(
            f"profile, {title(row)}",
            lambda row=row, seconds=seconds: profile(training_step(*ours(row[0]), *row[1:]), seconds),  # type: ignore[misc]
        )
        if times is not None:
            shown = [f"{times[group] / (10 * seconds):.1f}" for group in (*GROUPS, "idle")]
            rows.append([title(row), f"{1e3 * seconds:.1f}", *shown])
    limit = f"Anything but products and scan should take at most {SHARE_LIMIT}."
    return table(["percent of a step", "step (ms)", *GROUPS, "idle"], rows) + f"\n\n{limit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--original", metavar="FOLDER", help="where mamba-ssm and causal-conv1d are, with their modules"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="defaults to all")
    options = parser.parse_args()
    if nvrtc.reason():
        sys.exit(f"the kernels do not run here: {nvrtc.reason()}")
    if options.original:
        sys.path.insert(0, options.original)
    print(machine())
    found = results(options.models, bool(options.original))
    print("\n\n".join(["", speeds(found), memories(found), shares(found)]))


if __name__ == "__main__":
    main()
