"""What calls of CUDA kernels cost in Python: each planned anew, and repeated by `runtimes.replaying`.

No GPU is needed: the kernels are replaced by ones that do nothing, and tensors are tiny, on the CPU.

python -m benchmarks.planning [--layers 8] [--repeats 30]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import anymamba
from anymamba import causal_conv1d, selective_scan
from anymamba.kernels.backends import BACKENDS
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.ops.add_norm import add_norm
from anymamba.parts import recipes
from anymamba.runtimes import nvrtc, replaying
from benchmarks.timing import interleaved, machine, table

GPU = nvrtc.Device(90, 132, 227 << 10, 228 << 10)
CALLS = 20
"""Calls of an operator in one measurement."""


class Nothing:
    """A kernel that is not launched."""

    def launch(self, *arguments: Any) -> None:
        pass


@contextmanager
def without_kernels() -> Iterator[None]:
    """Have the backend `cuda` take tensors of the CPU and compute nothing."""
    nothing = Nothing()
    with ExitStack() as stack:
        patches: list[tuple[Any, str, Any]] = [
            (nvrtc, "kernel", lambda variant, index: nothing),
            (nvrtc, "prepare", lambda variants, index: None),
            (nvrtc, "device", lambda index: GPU),
            (recipes, "DEVICES", ("cuda", "cpu")),
            (recipes, "LEAST_SIZE", 0),
        ]
        for module in {m for modules in BACKENDS.values() for m in modules if m.NAME == "cuda"}:
            patches += [(module, "unavailable", lambda kind: None), (module, "refuses", lambda arguments: None)]
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(anymamba.backend("cuda"))
        yield


def planned(run: Callable[[], object]) -> Callable[[], object]:
    """The same as if no call could be repeated."""

    def anew() -> object:
        with mock.patch.object(replaying, "_plan", lambda *call: None), mock.patch.object(replaying, "_plans", {}):
            return run()

    return anew


def operators() -> dict[str, Callable[[], Tensor]]:
    """Calls of the operators as a layer makes them; each returns y."""
    batch, length, channels, states = 2, 16, 64, 16

    def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    u, delta, z = (numbers(batch, length, channels) for _ in range(3))
    B, C = (numbers(batch, length, states) for _ in range(2))
    A, D, bias = (numbers(*shape, dtype=torch.float32) for shape in ((channels, states), (channels,), (channels,)))
    weight, residual = numbers(channels, 4, dtype=torch.float32), numbers(batch, length, channels, dtype=torch.float32)
    return {
        "selective_scan": lambda: selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True).y,
        "causal_conv1d": lambda: causal_conv1d(u, weight, bias, activation="silu").y,
        "add_norm": lambda: add_norm(u, D, residual=residual, dtype=torch.bfloat16).y,
    }


def forward_and_backward(forward: Callable[[], Tensor]) -> Callable[[], object]:
    dy = torch.ones(2, 16, 64, dtype=torch.bfloat16)

    def run() -> None:
        for _ in range(CALLS):
            forward().backward(dy)

    return run


def repeated(forward: Callable[[], Tensor]) -> Callable[[], object]:
    def run() -> None:
        for _ in range(CALLS):
            forward()

    return run


def training_step(n_layers: int) -> Callable[[], object]:
    """Forward, loss and backward of a language model under autocast."""
    model = LanguageModel(ModelConfig(d_model=32, n_layers=n_layers, vocab_size=256))
    ids = torch.randint(0, 256, (2, 17))

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(ids[:, :-1], ids[:, 1:]).loss
        loss.backward()
        model.zero_grad()

    return run


def run(n_layers: int = 8, repeats: int = 30) -> str:
    """Measure and return the Markdown of the results."""
    torch.set_num_threads(1)
    measured: dict[str, tuple[Callable[[], object], int]] = {}
    for name, forward in operators().items():
        measured[f"{name}, forward"] = repeated(forward), CALLS
        measured[f"{name}, forward and backward"] = forward_and_backward(forward), CALLS
    measured["a training step, for each layer"] = training_step(n_layers), n_layers
    rows = []
    with without_kernels():
        for name, (call, count) in measured.items():
            best = interleaved({"planned": planned(call), "repeated": call}, repeats, warm_up=2)
            each = {how: seconds / count * 1e6 for how, seconds in best.items()}
            rows.append(
                [name, f"{each['planned']:.0f}", f"{each['repeated']:.0f}", f"{each['planned'] / each['repeated']:.2f}"]
            )
    return table(["call", "planned each time (µs)", "repeated (µs)", "times as fast"], rows) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    print(machine(), "\n")
    print(run(arguments.layers, arguments.repeats))
