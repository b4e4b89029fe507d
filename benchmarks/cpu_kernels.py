"""The compiled scan, convolution and norm against limits of the same machine: torch.exp of the expanded tensor, a copy
of the input, torch's own operations, and the same kernel on one thread. The two candidates of a pair run in turns.

python -m benchmarks.cpu_kernels
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anymamba import causal_conv1d, selective_scan
from anymamba.ops.add_norm import add_norm
from anymamba.runtimes import native
from benchmarks.timing import interleaved, machine, table

SHAPE = (1, 2048, 1536, 16)
EXP_TARGETS = {"x86-64-v4": 4.0, "x86-64-v3": 1.5}
THREAD_SHAPES = {SHAPE: 1.8, (1, 65536, 64, 16): 1.8, (1, 65536, 16, 16): 1.3}
REPEATS = 20


def scan(batch: int, length: int, d_inner: int, d_state: int, gradients: bool = False) -> Callable[[], Tensor]:
    """A call of the operator with z, D, bias and softplus."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_(gradients)

    u, delta, z = (normal(batch, length, d_inner) for _ in range(3))
    A = -torch.arange(1.0, d_state + 1).repeat(d_inner, 1)
    B, C, D = normal(batch, length, d_state), normal(batch, length, d_state), normal(d_inner)
    bias = torch.full((d_inner,), -3.0)  # gives steps of about 0.1
    return lambda: selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True, backend="cpu").y


def against_exp() -> str:
    """The forward scan with each instruction set against one torch.exp of the expanded tensor."""
    _, length, d_inner, d_state = SHAPE
    expanded = torch.randn(length, d_inner, d_state)
    out = torch.empty_like(expanded)
    run, rows = scan(*SHAPE), []
    best = native.module().instruction_set()
    for name in native.module().instruction_sets():
        native.module().choose_instruction_set(name)
        times = interleaved({"scan": run, "exp": lambda: torch.exp(expanded, out=out)}, REPEATS)
        target = f" (target {EXP_TARGETS[name]})" if name in EXP_TARGETS else ""
        nanoseconds = times["scan"] * 1e9 / length / d_inner
        ratio = f"**{times['exp'] / times['scan']:.2f}**{target}"
        rows.append([name, f"{times['scan'] * 1e3:.2f}", f"{nanoseconds:.2f}", f"{times['exp'] * 1e3:.2f}", ratio])
    native.module().choose_instruction_set(best)
    header = ["instruction set", "scan (ms)", "ns a token and channel", "torch.exp expanded (ms)", "times as fast"]
    return table(header, rows)


def forward_and_backward() -> str:
    """Forward and backward, with all gradients, against forward only."""
    run = scan(*SHAPE, gradients=True)
    cotangent = torch.ones(SHAPE[:3])
    times = interleaved({"forward": lambda: run().detach(), "both": lambda: run().backward(cotangent)}, REPEATS // 2)
    ratio = f"**{times['both'] / times['forward']:.2f}** (limit 5)"
    return table(
        ["forward (ms)", "forward + backward (ms)", "ratio"],
        [[f"{times['forward'] * 1e3:.2f}", f"{times['both'] * 1e3:.2f}", ratio]],
    )


def convolution() -> str:
    """The forward convolution against a copy of its input, in the cache and out of it."""
    flush = torch.zeros(1 << 25)  # 128 MiB
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows.append(convolution_row(dtype, "in the cache", lambda: None))
        rows.append(convolution_row(dtype, "from memory", lambda: flush.add_(1)))
    header = ["input", "conv + SiLU (ms)", "conv (ms)", "copy (ms)", "conv + SiLU / copy", "conv / copy"]
    return table(header, rows)


def convolution_row(dtype: torch.dtype, where: str, before: Callable[[], object]) -> list[str]:
    """`before` runs before every call and is not timed."""
    x = torch.randn(SHAPE[:3]).to(dtype)
    weight, bias, out = torch.randn(SHAPE[2], 4), torch.randn(SHAPE[2]), torch.empty_like(x)
    candidates: dict[str, Callable[[], object]] = {
        "silu": lambda: causal_conv1d(x, weight, bias, activation="silu", backend="cpu"),
        "linear": lambda: causal_conv1d(x, weight, bias, backend="cpu"),
        "copy": lambda: out.copy_(x),
    }
    times = dict.fromkeys(candidates, float("inf"))
    for _ in range(REPEATS):
        for name, candidate in candidates.items():
            before()
            times[name] = min(times[name], interleaved({name: candidate}, 1, warm_up=0)[name])
    ratios = [f"**{times['silu'] / times['copy']:.2f}** (limit 1.5)", f"{times['linear'] / times['copy']:.2f}"]
    return [f"{str(dtype).removeprefix('torch.')}, {where}", *(f"{t * 1e3:.3f}" for t in times.values()), *ratios]


def gradients(call: Callable[[], Any], tensors: list[Tensor]) -> object:
    """The gradients of all results, with the results as cotangents."""
    found = call()
    return torch.autograd.grad(found, tensors, [t.detach() for t in found])


def norm() -> str:
    """The norm of x + residual against torch's operations, forward and with all gradients."""
    rows = []
    for length, subtract_mean in ((512, False), (16384, False), (16384, True)):
        tensors = [torch.randn(shape).requires_grad_() for shape in ((length, 768), (length, 768), (768,))]
        x, residual, weight = tensors

        calls = {
            name: partial(add_norm, x, weight, residual=residual, subtract_mean=subtract_mean, backend=name)
            for name in ("cpu", "portable")
        }
        with torch.no_grad():
            forward = interleaved(calls, REPEATS)
        both = interleaved({name: partial(gradients, call, tensors) for name, call in calls.items()}, REPEATS // 2)
        for what, times in (("forward", forward), ("forward + backward", both)):
            ratio = f"**{times['portable'] / times['cpu']:.2f}**"
            name = f"{'layer' if subtract_mean else 'RMS'} norm, {length:,} x 768, {what}"
            rows.append([name, f"{times['cpu'] * 1e3:.3f}", f"{times['portable'] * 1e3:.3f}", ratio])
    return table(["", "compiled (ms)", "torch (ms)", "times as fast"], rows)


def threads() -> str:
    """The forward scan on one thread and on two."""
    rows = []
    before = torch.get_num_threads()
    for shape, target in THREAD_SHAPES.items():
        run = scan(*shape)

        def on(n: int, run: Callable[[], Tensor] = run) -> Callable[[], Tensor]:
            def call() -> Tensor:
                torch.set_num_threads(n)
                return run()

            return call

        times = interleaved({"one": on(1), "two": on(2)}, REPEATS)
        ratio = f"**{times['one'] / times['two']:.2f}** (target {target})"
        rows.append([str(shape), f"{times['one'] * 1e3:.2f}", f"{times['two'] * 1e3:.2f}", ratio])
    torch.set_num_threads(before)
    return table(["(batch, length, d_inner, d_state)", "one thread (ms)", "two threads (ms)", "times as fast"], rows)


def run() -> str:
    """Measure and return the Markdown of the results."""
    note = f"(batch, length, d_inner, d_state) = {SHAPE}, float32, with z, D, delta_bias and softplus."
    return "\n\n".join([note, against_exp(), forward_and_backward(), convolution(), norm(), threads()]) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(machine(), "\n")
    print(run())
