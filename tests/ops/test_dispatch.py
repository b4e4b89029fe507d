"""Which backend runs: the rule, the report, the counters, and that backends are interchangeable."""

from __future__ import annotations

import ast
import inspect
import itertools
from pathlib import Path

import pytest
import torch
from scan_cases import run_scan, scan_inputs

from anymamba import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step
from anymamba.kernels import native
from anymamba.ops import dispatch

OPS = sorted(dispatch.KERNELS)


@pytest.fixture(autouse=True)
def fresh_counters():
    dispatch.calls.clear()


@pytest.mark.parametrize("op", OPS)
def test_absent_takes_the_first_that_serves(op):
    assert dispatch.resolve(op, "cpu", None) == ("cpu" if native.load() else "portable")
    assert dispatch.resolve(op, "meta", None) == "portable"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["portable", "reference"])
def test_a_name_is_taken(op, name):
    assert dispatch.resolve(op, "cpu", name) == name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("name", "device", "why"),
    [
        ("cpu", "cuda", "it serves tensors on the CPU"),
        ("triton", "cpu", "it serves tensors on a GPU"),
        ("triton", "cuda", "this version has no Triton kernels"),
    ],
)
def test_a_named_backend_that_cannot_serve_says_why(op, name, device, why):
    with pytest.raises(
        RuntimeError, match=f"backend '{name}' cannot serve {op} on {device}: {why}; .*portable, reference"
    ):
        dispatch.resolve(op, device, name)


def test_native_says_why_it_is_absent():
    assert (native.load() is None) == (native.reason() is not None)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_report(device):
    lines = dispatch.report(device)
    assert {(line.op, line.backend) for line in lines} == set(itertools.product(OPS, dispatch.ORDER))
    for line in lines:
        assert line.device == device and line.reason
        assert line.chosen == (dispatch.resolve(line.op, device, None) == line.backend)
        assert line.available == (dispatch.unavailable(line.op, line.backend, device) is None)
    assert sum(line.chosen for line in lines) == len(OPS)


def test_report_without_a_device_is_that_of_the_best():
    assert dispatch.report() == dispatch.report("cuda" if torch.cuda.is_available() else "cpu")


def test_counters_say_which_backend_ran(backend):
    run_scan(scan_inputs(), backend)
    x, weight = torch.randn(2, 5, 6, requires_grad=True), torch.randn(6, 4)
    causal_conv1d(x, weight, backend=backend).y.sum().backward()
    causal_conv1d_step(torch.zeros(2, 3, 6), torch.zeros(2, 6), weight, backend=backend)
    now, matrix = torch.zeros(2, 6), torch.zeros(6, 4)
    selective_scan_step(torch.zeros(2, 6, 4), now, now, matrix, matrix, matrix, backend=backend)
    expected = {(op, backend, p): 1 for op in OPS for p in ("forward", "step")}
    if backend != "reference":  # it is differentiated by torch
        expected |= {(op, backend, "backward"): 1 for op in OPS}
    assert dict(dispatch.calls) == expected


def test_the_best_backend_ran():
    selective_scan(**scan_inputs())
    assert dict(dispatch.calls) == {("selective_scan", dispatch.resolve("selective_scan", "cpu", None), "forward"): 1}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["forward", "backward", "step"])
def test_backends_of_an_op_have_the_same_signatures(op, name):
    signatures = {
        backend: [
            (p.name, p.annotation, p.default) for p in inspect.signature(getattr(module, name)).parameters.values()
        ]
        for backend, module in dispatch.KERNELS[op].items()
    }
    assert len(signatures) >= 2
    first = next(iter(signatures.values()))
    for backend, signature in signatures.items():
        assert signature == first, backend
    returns = {inspect.signature(getattr(m, name)).return_annotation for m in dispatch.KERNELS[op].values()}
    assert len(returns) == 1


@pytest.mark.parametrize("op", OPS)
def test_backends_never_import_each_other(op):
    for backend, module in dispatch.KERNELS[op].items():
        assert backend == module.NAME
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        modules = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        modules |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        relative = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
        ours = ("anymamba.kernels.elementwise", "anymamba.kernels.native", f"{module.__name__}.")
        others = {m for m in modules if m.startswith("anymamba.kernels.") and not m.startswith(ours)}
        assert not relative and not others, backend


@pytest.mark.parametrize("op", OPS)
def test_backward_of_the_reference_module_agrees_with_autograd(op):
    """`reference.backward` is not on the path of autograd; other backends may be compared with it all the same."""
    reference, portable = dispatch.KERNELS[op]["reference"], dispatch.KERNELS[op]["portable"]
    if op == "selective_scan":
        i = scan_inputs(2, 9, B=1, C=1)
        arguments = list(i.values())
        outputs = portable.forward(*arguments)
        cotangents, saved = [torch.randn_like(t) for t in outputs[:2]], [outputs[2]]
    else:
        arguments = [torch.randn(2, 9, 6), torch.randn(6, 4), torch.randn(6), True, torch.randn(2, 3, 6), None]
        cotangents, saved = [torch.randn_like(t) for t in portable.forward(*arguments)], []
    got = portable.backward(*cotangents, *arguments, *saved)
    want = reference.backward(*cotangents, *arguments, *saved)
    assert len(got) == len(want) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))
