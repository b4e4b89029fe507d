"""The Triton kernels: in Triton's interpreter against the reference, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scan_backends import arguments, results
from scan_cases import scan_inputs
from test_conv import conv_inputs

from anymamba.kernels.causal_conv1d import triton as conv_triton
from anymamba.kernels.causal_conv1d.arguments import ConvArguments
from anymamba.kernels.selective_scan import triton as scan_triton
from anymamba.kernels.selective_scan.triton import plan
from anymamba.runtimes import triton

ROOT = Path(__file__).resolve().parents[2]
MISSING = importlib.util.find_spec("triton") is None
needs_triton = pytest.mark.skipif(MISSING, reason="the package triton is not installed (extra test)")
compiles = pytest.mark.skipif(MISSING or triton.interpreted(), reason="needs triton, without TRITON_INTERPRET")

TARGETS = {"sm_80": ("cuda", 80, 32), "gfx942": ("hip", "gfx942", 64)}
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}


@needs_triton
def test_the_interpreted_kernels():
    """In a process of its own: Triton decides when it is imported whether it compiles or interprets."""
    command = [sys.executable, "-m", "pytest", "tests/kernels/triton_interpreted.py", "-q", "-x"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def compile_for(kernel: Any, given: dict[str, Any], target: tuple[Any, ...]) -> Any:
    """Compile a kernel for a GPU, with the types that a launch gives."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants = {}, {}
    for parameter in kernel.params:
        value = given[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(kernel.arg_names.index(parameter.name),)] = value
        else:
            signature[parameter.name] = f"*{TYPES[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"
    return compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget(*target),
        options={"num_warps": given.get("num_warps", 4)},
    )


@pytest.fixture
def launches(monkeypatch):
    """Launches that are recorded and not done."""
    found: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(triton, "launch", lambda kernel, like, n, **given: found.append((kernel, given)))
    return found


@compiles
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_scan_compiles_without_a_gpu(launches, target):
    packed = scan_inputs(1, 130, 3, 2, lengths=[64, 0, 66], dtype=torch.bfloat16)
    results(scan_triton, arguments(packed))
    results(scan_triton, arguments(scan_inputs(1, 4, 32, 1, C="constant", rule="zoh", z=False, initial=False)))
    scan_triton.step(arguments(scan_inputs(1, 1, 3, 2)))
    assert {kernel.__name__ for kernel, _ in launches} == {"scan", "carry", "reverse_summary", "scan_backward", "step"}
    for kernel, given in launches:
        fast = {"FAST": target[0] == "cuda" and given["A"].dtype == torch.float32}
        assert compile_for(kernel, given | fast, target).asm


SPLIT = {"batch": 1, "length": 12, "d_inner": 32, "d_state": 16, "dtype": torch.bfloat16}
"""A scan for the kernel that splits the states of a channel over lanes."""


@compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("length", [12, 16])
def test_lanes_exchange_without_shared_memory(launches, dtype, length):
    scan_triton.forward(arguments(scan_inputs(**SPLIT | {"dtype": dtype, "length": length})), True)
    [(kernel, given)] = launches
    found = compile_for(kernel, given | {"FAST": True}, TARGETS["sm_80"])
    assert "shfl.sync.idx" in found.asm["ptx"] and "shfl.sync.bfly" in found.asm["ptx"]
    assert "convert_layout" not in found.asm["ttgir"] and found.metadata.shared == 0


@compiles
def test_the_split_scan_compiles_for_amd(launches):
    scan_triton.forward(arguments(scan_inputs(**SPLIT)), False)
    [(kernel, given)] = launches
    found = compile_for(kernel, given | {"BLOCK": 16}, TARGETS["gfx942"])
    assert "convert_layout" not in found.asm["ttgir"] and found.metadata.shared == 0


def test_which_scans_split_their_states(monkeypatch):
    a = arguments(scan_inputs(**SPLIT))
    assert plan.splits(a) and plan.splits(arguments(scan_inputs(**SPLIT | {"B": 2, "C": 2, "dtype": torch.float32})))
    others: list[dict[str, Any]] = [
        {"rule": "zoh"},
        {"lengths": [5, 7]},
        {"B": "constant"},
        {"C": "constant"},
        {"d_state": 15},
        {"d_inner": 36},
        {"dtype": torch.float64},
        {"B": 8, "C": 8},
    ]
    assert not any(plan.splits(arguments(scan_inputs(**SPLIT | other))) for other in others)
    monkeypatch.setattr(triton, "n_multiprocessors", lambda device: 1)
    assert not plan.splits(a) and plan.splits(arguments(scan_inputs(**SPLIT | {"batch": 2})))


@compiles
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_convolution_compiles_without_a_gpu(launches, target):
    inputs = conv_inputs(1, lengths=[4, 0, 7], dtype=torch.bfloat16)
    inputs["silu"] = inputs.pop("activation") == "silu"
    a = ConvArguments(**inputs)
    for each in (a, a._replace(cu_seqlens=None, initial_state=None, bias=None, silu=False)):
        y, last_state = conv_triton.forward(each)
        conv_triton.backward(y, last_state, each)
    for kernel, given in launches:
        assert compile_for(kernel, given, target).asm


@pytest.mark.skipif(triton.interpreted(), reason="TRITON_INTERPRET is set")
def test_the_reasons(monkeypatch):
    assert "NVIDIA, AMD or Intel" in str(triton.unavailable("mps"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton.unavailable("cuda") == "the package triton is not installed; pip install triton"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "TRITON_INTERPRET=1" in str(triton.unavailable("cpu"))
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "install gcc" in str(triton.unavailable("cuda"))
    monkeypatch.setattr(triton, "_not_importable", lambda: None)  # this process has imported it to compile
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.unavailable("cpu") is None and "unset it" in str(triton.unavailable("cuda"))


@pytest.mark.parametrize(
    ("capability", "dtype", "words"),
    [
        ((6, 1), torch.float32, "7.0 or newer, this one has 6.1"),
        ((7, 5), torch.bfloat16, "bfloat16 needs an NVIDIA GPU of compute capability 8.0"),
        ((7, 5), torch.float32, None),
    ],
)
def test_old_gpus(monkeypatch, capability, dtype, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = triton.refuses(torch.device("cuda"), (torch.zeros(1, dtype=dtype), None))
    assert found is None if words is None else words in str(found)
