"""Calls of CUDA kernels that repeat an earlier one of their kind do what a planned call does."""

from __future__ import annotations

import struct
import threading
from typing import Any

import pytest
import scan_backends
import test_cuda_conv_emulated as conv_cases
import test_cuda_norm_emulated as norm_cases
import torch
from emulation import emulate
from scan_backends import same_bits
from scan_cases import scan_inputs
from torch import Tensor

from anymamba.kernels.causal_conv1d import cuda as conv
from anymamba.kernels.gated import cuda as gates
from anymamba.kernels.rotary import cuda as rotary
from anymamba.kernels.selective_scan import cuda as scan
from anymamba.runtimes import launching, nvrtc, replaying
from anymamba.runtimes.replaying import Plan, replayed

if emulate.missing():
    pytest.skip(f"kernels cannot be emulated: {emulate.missing()}", allow_module_level=True)


@pytest.fixture(autouse=True)
def repeated(monkeypatch) -> list[Plan]:
    """The plans that have been repeated."""
    emulate.patch(monkeypatch)
    run, found = Plan.run, list[Plan]()
    monkeypatch.setattr(Plan, "run", lambda plan, tensors: found.append(plan) or run(plan, tensors))
    return found


def plans() -> list[Plan]:
    return [plan for plan in replaying._plans.values() if plan is not None]


def check(results: Any, module: Any, first: Any, second: Any, repeated: list[Plan], expected: int) -> None:
    """The second call repeats `expected` passes of the first one, with the same bits as if it were planned."""
    before = results(module, first)
    assert len(plans()) == expected and not repeated
    got = results(module, second)
    assert len(repeated) == expected
    kept = dict(replaying._plans)
    replaying._plans.clear()
    assert same_bits(got, results(module, second)) and not same_bits(got, before)
    replaying._plans.update(kept)
    assert same_bits(before, results(module, first)), "what a repeated call is given is its own"


def others(arguments: Any) -> Any:
    """Arguments with other numbers."""

    def other(value: Any) -> Any:
        return value * 0.5 if isinstance(value, Tensor) and value.is_floating_point() | value.is_complex() else value

    return type(arguments)(*map(other, arguments))


SCANS: dict[str, tuple[dict[str, Any], int]] = {
    "one chunk": ({"length": 65, "d_inner": 33}, 2),
    "chunks": ({"batch": 1, "length": 320, "d_inner": 8}, 2),
    "bare": ({"length": 9, "D": False, "z": False, "bias": False, "softplus": False, "initial": False}, 2),
    "short numbers": ({"length": 9, "d_inner": 32, "dtype": torch.bfloat16}, 2),
    "float64": ({"length": 9, "d_inner": 8, "d_state": 3, "dtype": torch.float64}, 2),
    "complex, chunks": ({"length": 300, "d_inner": 8, "d_state": 3, "is_complex": True, "rule": "zoh"}, 2),
    "packed": ({"batch": 1, "length": 20, "d_inner": 8, "lengths": [0, 12, 8]}, 0),
    "no tokens": ({"length": 0, "d_inner": 8}, 0),
}


@pytest.mark.parametrize("case", SCANS)
def test_scans(case, repeated):
    options, expected = SCANS[case]
    inputs = scan_backends.arguments(scan_inputs(**{"d_state": 16, "dtype": torch.float32} | options))
    if case == "no tokens":
        scan_backends.results(scan, inputs)
        assert not plans()
        return
    if case == "packed":  # offsets are made monotone first, so the kernels read a tensor that no caller has given
        assert same_bits(scan_backends.results(scan, inputs), scan_backends.results(scan, inputs)) and not plans()
        return
    check(scan_backends.results, scan, inputs, others(inputs), repeated, expected)


def test_convolutions(repeated):
    first = conv_cases.arguments(length=67, d_inner=132)
    check(conv_cases.results, conv, first, others(first), repeated, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_norms(repeated, dtype):
    first = norm_cases.arguments(dtype=dtype, size=12)
    check(norm_cases.results, norm_cases.cuda, first, others(first), repeated, 2)


@pytest.mark.parametrize("apart", [False, True], ids=["side by side", "apart"])
def test_gates(repeated, apart):
    """Also halves of one tensor, whose gradient is one tensor."""

    def results(module: Any, given: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        both, dy = given
        x, g = (t.clone() for t in both.chunk(2, -1)) if apart else both.chunk(2, -1)
        backward = module.gradients(dy, x, g, "silu") if apart else [module.gradient_of_halves(dy, both, "silu")]
        return {"y": module.multiply(x, g, "silu")} | dict(zip("xg", backward, strict=False))

    first, second = ((torch.randn(2, 5, 32), torch.randn(2, 5, 16)) for _ in range(2))
    check(results, gates, first, second, repeated, 2)


def test_rotary_positions(repeated):
    angles = torch.randn(1, 5, 8)

    def results(module: Any, packed: Tensor) -> dict[str, Tensor]:
        q, k = module.rotate(packed, 1, angles.cos(), angles.sin())
        dq, dk = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
        return {"q": q, "k": k, "packed": module.gradient(dq, dk, packed[:, :, 3:], angles.cos(), angles.sin())}

    first, second = (torch.randn(2, 5, 4, 16) for _ in range(2))
    check(results, rotary, first, second, repeated, 2)


def test_what_lies_otherwise_in_memory_is_planned_anew(repeated):
    first = norm_cases.arguments(size=12)
    moved = first._replace(x=torch.randn(11 * 12 + 1)[1:].view(11, 12))
    turned = first._replace(x=torch.randn(12, 11).T)
    for a in (first, moved, turned, first._replace(eps=1e-3)):
        norm_cases.cuda.forward(a, False)
    assert not repeated and len(replaying._plans) == 4
    assert len(plans()) == 2, "rows that are not aligned or not dense are copied"


def test_a_tensor_that_is_given_twice_is_not_recorded(repeated):
    """Later calls may give two: the recorded address would not tell which of them a kernel reads."""
    a = norm_cases.arguments(size=12)
    both = a._replace(residual=a.x)
    norm_cases.cuda.forward(both, False)
    assert not replaying._plans
    norm_cases.cuda.forward(a, False)
    got = norm_cases.cuda.forward(both, False)
    assert len(repeated) == 1 and torch.equal(got[1], 2 * a.x)


# ------------------------------------------------------------------------------------------ by hand


class Recorder:
    """A kernel that notes what it is launched with."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def launch(self, n_blocks: int, threads: int, shared: int, parameters: bytes, early: bool = False) -> None:
        self.seen.append((n_blocks, *struct.unpack("4q", parameters)))


LAYOUT = launching.layout({}, ("x", "y", "parts", "number"))
VARIANT = nvrtc.Variant(nvrtc.Source("none.cu", "", ()), "none")


@pytest.fixture
def kernel(monkeypatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(nvrtc, "kernel", lambda variant, index: found)
    return found


def call(x: Tensor) -> list[Any]:
    """Launches twice; the second time with another number and a scratch tensor."""
    y, todo = x.new_empty(3), launching.Call(LAYOUT, x)
    todo.dense(x=x, y=y)
    todo.set(number=5)
    todo.launch(VARIANT, 7, 32)
    todo.set(number=6)
    todo.scratch("parts", 100, dtype=torch.float64)
    todo.launch(VARIANT, 8, 32)
    return [y, 11, None]


def test_an_address_is_given_from_the_launch_on_that_had_it(kernel, repeated):
    for x in (torch.randn(4), torch.randn(4)):
        y, number, nothing = replayed("a", [x, None], (), lambda x=x: call(x))
        assert (number, nothing, y.shape, y.dtype) == (11, None, (3,), torch.float32)
        (first, second), kernel.seen = kernel.seen, []
        assert first == (7, x.data_ptr(), y.data_ptr(), 0, 5)
        assert second[:3] == (8, x.data_ptr(), y.data_ptr()) and second[3] % 64 == 0 < second[3] and second[4] == 6
    assert len(repeated) == 1


def test_results_that_no_kernel_writes_are_computed_each_time(kernel, repeated):
    for x in (torch.ones(4), torch.ones(4) * 2):
        _, doubled = replayed("a", [x], (), lambda x=x: [call(x)[0], 2 * x])
        assert torch.equal(doubled, 2 * x)
    assert not repeated


def test_a_call_that_fails_is_not_recorded(kernel, repeated):
    def fail() -> list[Any]:
        call(torch.randn(4))
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        replayed("a", [torch.randn(4)], (), fail)
    call(torch.randn(4))  # not noted anywhere
    assert not replaying._plans and replaying._thread.launches is None


def test_other_threads_are_not_recorded(kernel, repeated):
    x = torch.randn(4)

    def compute() -> list[Any]:
        other = threading.Thread(target=call, args=(torch.randn(4),))
        other.start()
        other.join()
        return call(x)

    replayed("a", [x], (), compute)
    assert len(plans()[0].steps) == 2


def test_so_many_plans_are_kept(kernel, monkeypatch):
    monkeypatch.setattr(replaying, "MOST_PLANS", 3)
    for n in range(1, 9):
        x = torch.randn(n)
        replayed("a", [x], (), lambda x=x: call(x))
        assert len(replaying._plans) <= 3
