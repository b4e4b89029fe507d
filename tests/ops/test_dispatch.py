"""Which backend runs: the rule, the report, the counters, and that backends are interchangeable."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
from scan_cases import HERE, run_scan, scan_inputs
from test_conv import conv_inputs

from anymamba import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step
from anymamba.kernels.backends import BACKENDS
from anymamba.kernels.causal_conv1d.arguments import ConvArguments
from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.ops import dispatch
from anymamba.runtimes import native, nvrtc

OPS = sorted(BACKENDS)
FUSED = ("add_norm", "linear_cross_entropy")
"""Ops of one pass over memory, which have no step."""
NOT_COMPILED = ("linear_cross_entropy",)
"""Ops that on the CPU are torch's own operations."""
CONSTANT = ("packed_linear",)
"""Ops whose kernels have no backward pass and no step."""
WHOLE = [op for op in OPS if op not in FUSED + CONSTANT]


@pytest.fixture(autouse=True)
def fresh_counters():
    dispatch.calls.clear()


@pytest.mark.parametrize("op", OPS)
def test_absent_takes_the_first_that_serves(op):
    torch_operations = "reference" if op in CONSTANT else "portable"
    assert dispatch.resolve(op, "cpu", None) == (
        "cpu" if native.load() and op not in NOT_COMPILED else torch_operations
    )
    assert dispatch.resolve(op, "meta", None) == torch_operations


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["portable", "reference"])
def test_a_name_is_taken(op, name):
    if op in CONSTANT and name == "portable":
        name = "cpu" if native.load() else "reference"
    assert dispatch.resolve(op, "cpu", name) == name


@pytest.mark.parametrize("op", NOT_COMPILED)
def test_a_context_leaves_ops_without_that_backend_alone(op):
    with dispatch.backend("cpu"):
        assert dispatch.resolve(op, "cpu", None) == "portable"
    with dispatch.backend("reference"):
        assert dispatch.resolve(op, "cpu", None) == "reference"
    with pytest.raises(ValueError, match=f"unknown backend 'cpu' for {op}; the backends are cuda, portable, reference"):
        dispatch.resolve(op, "cpu", "cpu")


@pytest.mark.parametrize("op", WHOLE)
def test_a_named_backend_that_cannot_serve_says_why(op):
    words = f"backend 'cpu' cannot serve {op} on cuda: it serves tensors on the CPU; .*portable, reference"
    with pytest.raises(RuntimeError, match=words):
        dispatch.resolve(op, "cuda", "cpu")


def test_a_gpu_without_a_part_of_cuda_says_which_and_takes_the_next(monkeypatch):
    monkeypatch.setattr(nvrtc, "_reason", lambda: "the package cuda-bindings is not installed; pip install it")
    lines = {line.backend: line for line in dispatch.report("cuda") if line.op == "selective_scan"}
    assert not lines["cuda"].available and "cuda-bindings is not installed" in lines["cuda"].reason
    assert lines["triton"].chosen or lines["portable"].chosen
    with pytest.raises(RuntimeError, match=r"'cuda' cannot serve .*: the package cuda-b.* use one of .*portable"):
        dispatch.resolve("selective_scan", "cuda", "cuda")


def test_a_backend_may_refuse_arguments():
    arguments = ScanArguments(
        *(v for k, v in scan_inputs(is_complex=True).items() if k in ("u", "delta", "A", "B", "C"))
    )
    assert dispatch.resolve("selective_scan", "cpu", None, arguments) == "portable"
    if native.load():
        with pytest.raises(
            RuntimeError, match=r"'cpu' cannot serve selective_scan on cpu: it supports only real A; .* portable"
        ):
            dispatch.resolve("selective_scan", "cpu", "cpu", arguments)


def test_native_says_why_it_is_absent():
    assert (native.load() is None) == (native.reason() is not None)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_report(device):
    lines = dispatch.report(device)
    assert {(line.op, line.backend) for line in lines} == {(op, m.NAME) for op in OPS for m in BACKENDS[op]}
    for line in lines:
        assert line.device == device and line.reason
        assert line.chosen == (dispatch.resolve(line.op, device, None) == line.backend)
        assert line.available == (dispatch.kernel(line.op, line.backend).unavailable(device) is None)
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
    expected = {(op, backend, p): 1 for op in WHOLE for p in ("forward", "step")}
    if backend != "reference":  # it is differentiated by torch
        expected |= {(op, backend, "backward"): 1 for op in WHOLE}
    assert dict(dispatch.calls) == expected


def test_the_best_backend_ran():
    selective_scan(**scan_inputs())
    assert dict(dispatch.calls) == {
        ("selective_scan", dispatch.resolve("selective_scan", HERE.type, None), "forward"): 1
    }


PROTOCOL = ("unavailable", "refuses", "description", "forward", "backward", "step")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", PROTOCOL)
def test_backends_of_an_op_have_the_same_signatures(op, name):
    have = [m for m in BACKENDS[op] if op in WHOLE or name not in ("backward", "step") or hasattr(m, name)]
    signatures = {m.NAME: inspect.signature(getattr(m, name), eval_str=True) for m in have}
    assert len(have) >= 2 or op in FUSED + CONSTANT
    if not have:
        return
    assert len(set(signatures.values())) == 1, signatures


USABLE = [(op, m.NAME) for op in WHOLE for m in BACKENDS[op] if m.unavailable(HERE.type) is None]


@pytest.mark.parametrize(("op", "name"), USABLE)
def test_a_last_state_that_is_not_used_has_a_gradient_of_zeros(op, name, monkeypatch):
    """Backends are not given zeros then, but None."""

    make, function = (scan_inputs, selective_scan) if op == "selective_scan" else (conv_inputs, causal_conv1d)
    given, module = [], dispatch.kernel(op, name)
    if hasattr(module, "backward"):
        backward = module.backward
        monkeypatch.setattr(module, "backward", lambda dy, last, *rest: given.append(last) or backward(dy, last, *rest))
    inputs = make(dtype=torch.float32)
    leaves = [t.requires_grad_() for t in inputs.values() if isinstance(t, torch.Tensor)]

    def gradients(use: bool) -> list[torch.Tensor]:
        y, last_state = function(**inputs, backend=name)
        return list(torch.autograd.grad(y.square().sum() + (0 * last_state.sum() if use else 0), leaves))

    for got, want in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(got, want)
    if "forward" not in module.TRANSPARENT:
        assert given[0] is None and given[1] is not None


def test_every_fast_backend_of_the_scan_has_summaries():
    fast = [m for m in BACKENDS["selective_scan"] if "forward" not in m.TRANSPARENT]
    for name in ("summary", "reverse_summary"):
        assert len({inspect.signature(getattr(m, name), eval_str=True) for m in fast}) == 1


@pytest.mark.parametrize("op", OPS)
def test_every_backend_says_what_it_sees_through(op):
    for module in BACKENDS[op]:
        assert module.TRANSPARENT.issubset({"forward", "step"})
        if module.unavailable(HERE.type) is None:
            assert module.description()
    transparent = [m.NAME for m in BACKENDS[op] if "forward" in m.TRANSPARENT]
    assert transparent == (["portable", "reference"] if op in FUSED else ["reference"])


@pytest.mark.parametrize("op", OPS)
def test_backends_never_import_each_other(op):
    for module in BACKENDS[op]:
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        modules = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        modules |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        relative = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
        ours = (
            *(
                f"anymamba.kernels.{n}"
                for n in (
                    "elementwise",
                    "native",
                    "nvrtc",
                    "launching",
                    f"{op}.arguments",
                    f"{op}.formats",
                    f"{op}.chunks",
                )
            ),
            module.__name__,
        )
        ours = (*ours, module.__name__)
        others = {m for m in modules if m.startswith("anymamba.kernels.") and not m.startswith(ours)}
        assert not relative and not others, module.NAME


def test_the_ops_name_no_backend():
    """Adding a backend is adding a module to one list."""
    for path in Path(dispatch.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        words = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        assert not words & {"portable", "reference"}, path  # "cpu" is a device, too


@pytest.mark.parametrize("op", WHOLE)
def test_backward_of_the_reference_module_agrees_with_autograd(op):
    """`reference.backward` is not on the path of autograd; other backends may be compared with it all the same."""
    portable, reference = (dispatch.kernel(op, name) for name in ("portable", "reference"))
    if op == "selective_scan":
        arguments = ScanArguments(**scan_inputs(2, 9, B=1, C=1))
        y, last_state, saved = portable.forward(arguments, True)
        rest = (arguments, saved)
    else:
        arguments = ConvArguments(
            torch.randn(2, 9, 6), torch.randn(6, 4), torch.randn(6), torch.randn(2, 3, 6), None, True
        )
        y, last_state = portable.forward(arguments)
        rest = (arguments,)
    cotangents = [torch.randn_like(t) for t in (y, last_state)]
    got = portable.backward(*cotangents, *rest)
    want = reference.backward(*cotangents, *rest)
    assert len(got) == len(want) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))
