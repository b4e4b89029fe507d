"""The operators inside torch: opcheck, compile, export, autocast, activation checkpointing, and their memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from scan_cases import HERE, TENSORS, assert_close, offsets, run_scan, scan_inputs
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from anymamba import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step
from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.ops import dispatch, observers
from anymamba.ops.causal_conv1d.registration import forward_op as conv_op
from anymamba.ops.selective_scan.registration import forward_op as scan_op

OPTIONS = {
    "real": {"B": 1, "C": 1},
    "groups-zoh": {"B": 2, "C": 2, "rule": "zoh"},
    "constant": {"B": "constant", "C": "constant"},
    "complex": {"B": 1, "C": 1, "is_complex": True},
    "complex-constant": {"B": "constant", "C": 2, "is_complex": True, "rule": "zoh"},
    "packed": {"batch": 1, "B": 1, "C": 1, "lengths": [3, 0, 16]},
    "packed-complex": {"batch": 1, "B": 1, "C": 1, "lengths": [3, 16], "is_complex": True},
    "bare": {"B": 1, "C": 1, "D": False, "z": False, "bias": False, "softplus": False, "initial": False},
    "half": {"B": 1, "C": 1, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_opcheck_of_the_scan(options, fast):
    inputs = scan_inputs(**{"dtype": torch.float32} | options)
    leaves = {k: v.requires_grad_() if k in TENSORS and v is not None else v for k, v in inputs.items()}
    torch.library.opcheck(scan_op, (*ScanArguments(**leaves), True, fast))


@pytest.mark.parametrize("cu_seqlens", [None, offsets([3, 0, 8])], ids=["batch", "packed"])
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("width", [1, 4])
def test_opcheck_of_the_convolution(cu_seqlens, state, width, fast):
    x = torch.randn(1, 11, 5, requires_grad=True)
    weight, bias = torch.randn(5, width, requires_grad=True), torch.randn(5, requires_grad=True)
    rows = 1 if cu_seqlens is None else 3
    initial = torch.randn(rows, width - 1, 5, requires_grad=True) if state else None
    torch.library.opcheck(conv_op, (x, weight, bias, initial, cu_seqlens, True, fast))


def both_ops(u, delta, A, B, C, D, z, delta_bias, initial_state, weight, conv_state, cu_seqlens):
    """A convolution and a scan, as a layer chains them."""
    conv = causal_conv1d(u, weight, activation="silu", initial_state=conv_state, cu_seqlens=cu_seqlens)
    scan = selective_scan(
        conv.y,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus=True,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    return scan.y, conv.last_state, scan.last_state


def arguments(length: int, lengths: list[int] | None = None, batch: int = 2) -> list:
    i = scan_inputs(batch, length, lengths=lengths, dtype=torch.float32)
    rows = batch if lengths is None else len(lengths)
    weight, state = torch.randn(6, 4), torch.randn(rows, 3, 6)
    values = [*(i[k] for k in TENSORS), weight, state, i["cu_seqlens"]]
    return [v.requires_grad_() if v is not None and v.is_floating_point() else v for v in values]


def gradients(function, values) -> list[torch.Tensor]:
    outputs = function(*values)
    sum(t.square().sum() for t in outputs).backward()
    found = [t.grad for t in values if t is not None and t.grad is not None]
    for t in values:
        if t is not None:
            t.grad = None
    return [*(t.detach() for t in outputs), *found]


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_compile_fullgraph_with_dynamic_length(packed):
    torch._dynamo.reset()
    compiled = torch.compile(both_ops, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (37, 21, 600):
            values = arguments(length, [5, 0, length - 5], batch=1) if packed else arguments(length)
            got, want = gradients(compiled, values), gradients(both_ops, values)
            assert_close(dict(enumerate(got)), dict(enumerate(want)), 1e-6)


def steps(ssm_state, conv_state, u, delta, A, B, weight):
    y, conv_state = causal_conv1d_step(conv_state, u, weight, activation="silu")
    y, ssm_state = selective_scan_step(ssm_state, y, delta, A, B[:, None], B[:, None], delta_softplus=True)
    return y, conv_state, ssm_state


def step_values(batch: int = 2) -> list[torch.Tensor]:
    shapes = [(batch, 6, 4), (batch, 3, 6), (batch, 6), (batch, 6), (6, 4), (batch, 4), (6, 4)]
    return [torch.randn(*shape) for shape in shapes]


def test_compile_of_the_steps():
    torch._dynamo.reset()
    values = step_values()
    got = torch.compile(steps, fullgraph=True, backend="aot_eager")(*values)
    assert_close(dict(enumerate(got)), dict(enumerate(steps(*values))), 1e-6)


def test_inductor():
    torch._dynamo.reset()
    values = arguments(19)
    got, want = gradients(torch.compile(both_ops, fullgraph=True), values), gradients(both_ops, values)
    assert_close(dict(enumerate(got)), dict(enumerate(want)), 1e-5)


class Steps(torch.nn.Module):
    def forward(self, *values):
        return steps(*values)


def test_export_of_the_steps_is_plain_torch():
    values = tuple(step_values())
    program = torch.export.export(Steps(), values)
    names = {str(n.target) for m in program.graph_module.modules() if hasattr(m, "graph") for n in m.graph.nodes}
    assert names and not [name for name in names if "anymamba" in name]
    got = program.module()(*values)
    assert_close(dict(enumerate(got)), dict(enumerate(steps(*values))), 1e-6)


class Both(torch.nn.Module):
    def forward(self, *values):
        return both_ops(*values)


def test_export_with_dynamic_length():
    values = tuple(v.detach() if v is not None else None for v in arguments(19))
    length = torch.export.Dim("length", min=1, max=4096)
    along_time = ("u", "delta", "B", "C", "z")
    shapes = tuple({1: length} if k in along_time else None for k in (*TENSORS, "weight", "conv_state", "cu_seqlens"))
    program = torch.export.export(Both(), values, dynamic_shapes={"values": shapes})
    for n in (19, 40):
        values = tuple(v.detach() if v is not None else None for v in arguments(n))
        got = program.module()(*values)
        assert_close(dict(enumerate(got)), dict(enumerate(both_ops(*values))), 1e-6)


def test_nothing_inside_the_scan_is_autocast(backend):
    inputs = scan_inputs(dtype=torch.float32)
    want = run_scan(inputs, backend, gradients=backend != "reference")
    with torch.autocast(HERE.type, torch.bfloat16):
        got = run_scan(inputs, backend, gradients=backend != "reference")
        step = [inputs["initial_state"], *(inputs[k][:, 0] for k in ("u", "delta")), inputs["A"]]
        matrices = [inputs[k][:, 0, None] for k in ("B", "C")]
        _, state = selective_scan_step(*step, *matrices, backend=backend)
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert torch.equal(state, selective_scan_step(*step, *matrices, backend=backend)[1])


def test_activation_checkpointing_gives_the_same_gradients():
    values = arguments(40)

    def recomputed(*inputs):
        return checkpoint(both_ops, *inputs, use_reentrant=False)

    best = dispatch.resolve("selective_scan", HERE.type, None)
    dispatch.calls.clear()
    got = gradients(recomputed, values)
    assert dispatch.calls["selective_scan", best, "forward"] == 2
    assert dispatch.calls["selective_scan", best, "backward"] == 1
    want = gradients(both_ops, values)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


MEMORY = """
import sys, torch
from anymamba import selective_scan
torch.set_num_threads(1)
def status(field):  # in kB
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))
length, d_inner, d_state = (int(a) for a in sys.argv[1:])
def run(length):
    u = torch.randn(1, length, d_inner)
    delta = torch.rand(1, length, d_inner)
    z = torch.randn(1, length, d_inner)
    B, C = torch.randn(1, length, d_state), torch.randn(1, length, d_state)
    A = -torch.rand(d_inner, d_state)
    D = torch.ones(d_inner)
    leaves = [t.requires_grad_() for t in (u, delta, A, B, C, D, z)]
    cotangent = torch.ones(1, length, d_inner)
    before = status("VmRSS:")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    selective_scan(*leaves, delta_softplus=True, backend="portable").y.backward(cotangent)
    return status("VmHWM:") - before, u.numel() * u.element_size() / 1024
run(64)  # code and workspaces that do not depend on the length
peak, of_u = run(length)
print(peak / of_u)
"""


def peak_in_units_of_u(length: int, d_inner: int, d_state: int) -> float:
    """Peak resident memory of forward and backward above the inputs over the bytes of u, in a fresh process."""
    command = [sys.executable, "-c", MEMORY, *map(str, (length, d_inner, d_state))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_has_no_factor_d_state():
    """A (batch, length, d_inner, d_state) tensor alone would be 64 times u."""
    assert peak_in_units_of_u(8192, 128, 64) < 24


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_at_length_65536_is_linear_and_below_16_times_u():
    whole, half = (peak_in_units_of_u(length, 256, 16) for length in (65536, 32768))
    assert whole < 16, f"{whole:.1f} times u"
    assert whole < 1.1 * half + 1, f"{whole:.1f} times u at 65,536, {half:.1f} at 32,768: it is not linear"


# ------------------------------------------------------------------------------ past torch's dispatcher, and not


def plain_inputs() -> dict[str, torch.Tensor]:
    inputs = scan_inputs(batch=2, length=7, dtype=torch.float32)
    return {name: inputs[name] for name in ("u", "delta", "A", "B", "C", "z")}


def test_eager_inference_is_unobserved_and_gives_the_same_bits():
    values = plain_inputs()
    assert observers.way(*values.values()) == "kernel"
    got = selective_scan(**values)
    tensors = [values[name] for name in ("u", "delta", "A")] + [values[name][:, :, None] for name in ("B", "C")]
    backend = dispatch.resolve("selective_scan", HERE.type, None)
    want = scan_op(*tensors, None, values["z"], None, None, None, False, "euler", False, backend)
    assert torch.equal(got.y, want[0])
    assert torch.equal(got.last_state, want[1])
    assert observers.way(values["u"].requires_grad_()) == "function"
    assert observers.way(torch.ones(2).as_subclass(Marked)) == "op"


class Marked(torch.Tensor):
    """Any subclass."""


class CallNames(TorchDispatchMode):
    """The ops that reach the dispatcher."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), str(func)]
        return func(*args, **(kwargs or {}))


class FunctionNames(TorchFunctionMode):
    """The functions that are called."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), str(func)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [CallNames, FunctionNames])
def test_a_mode_sees_the_ops(mode):
    values = plain_inputs()
    with mode() as seen:
        selective_scan(**values)
        causal_conv1d(values["u"], torch.ones(values["u"].shape[2], 4))
    for name in ("selective_scan", "causal_conv1d"):
        assert f"anymamba.{name}.default" in seen.names


def test_a_profiler_sees_the_ops():
    values = plain_inputs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        selective_scan(**values)
        causal_conv1d(values["u"], torch.ones(values["u"].shape[2], 4))
    names = {event.key for event in profile.key_averages()}
    assert {"anymamba::selective_scan", "anymamba::causal_conv1d"} <= names


def test_a_tracer_and_a_fake_mode_see_the_ops():
    values = plain_inputs()
    graph = make_fx(lambda u: selective_scan(**{**values, "u": u}).y)(values["u"])
    assert torch.ops.anymamba.selective_scan.default in {node.target for node in graph.graph.nodes}
    with FakeTensorMode() as mode:
        y = selective_scan(**{name: mode.from_tensor(value) for name, value in values.items()}).y
    assert isinstance(y, FakeTensor)
    assert y.shape == values["u"].shape


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop():
    values = plain_inputs()
    got = torch.func.vmap(lambda u: selective_scan(**{**values, "u": u}).y)(torch.stack([values["u"], 2 * values["u"]]))
    want = [selective_scan(**{**values, "u": u}).y for u in (values["u"], 2 * values["u"])]
    assert torch.equal(got, torch.stack(want))


def test_a_default_device_does_not_move_the_outputs():
    values = plain_inputs()
    want = selective_scan(**values)
    with torch.device("meta"):
        got = selective_scan(**values)
        conv = causal_conv1d(values["u"], torch.ones(values["u"].shape[2], 4, device=HERE))
    assert torch.equal(got.y, want.y)
    assert conv.y.device == conv.last_state.device == values["u"].device


def test_an_exported_step_is_not_autocast_either():
    """Where autocast is on later and was off at the export."""

    class Step(torch.nn.Module):
        def forward(self, state, u, delta, A, B, C):
            return selective_scan_step(state, u, delta, A, B, C, delta_softplus=True)

    values = plain_inputs()
    state = torch.randn(2, *values["A"].shape)
    arguments = (
        state,
        *(values[n][:, 0] for n in ("u", "delta")),
        values["A"],
        *(values[n][:, :1] for n in ("B", "C")),
    )
    graph = torch.export.export(Step(), arguments).graph
    assert torch.ops.higher_order.wrap_with_autocast in {node.target for node in graph.nodes}
