"""The CUDA kernels of the selective scan, run on the processor: their values, races, and how they are called."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from emulation import emulate
from scan_backends import arguments, check_summaries, contract, results, same_bits
from scan_cases import assert_close, assert_within_budget, scan_inputs, widened
from scan_parts import check_parts

from anymamba.kernels.selective_scan import cuda, reference
from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.kernels.selective_scan.cuda import call, plan
from anymamba.runtimes import nvrtc, replaying

if emulate.missing():
    pytest.skip(f"kernels cannot be emulated: {emulate.missing()}", allow_module_level=True)

MULTIPROCESSORS = 4
SMALL = nvrtc.Device(86, MULTIPROCESSORS, 99 << 10, 100 << 10)
"""A GPU with less shared memory."""


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate.patch(monkeypatch, MULTIPROCESSORS)


def check(**options: Any) -> None:
    """Errors against float64 are at most twice those of the reference and one rounding; in float64 they are tiny."""
    check_contract(arguments(scan_inputs(**options)))


def check_contract(a: ScanArguments, factor: float = 2) -> None:
    got, peer = (results(module, a) for module in (cuda, reference))
    if a.real_dtype == torch.float64:
        assert_close(got, peer, 1e-12)
    else:
        assert_within_budget(got, peer, results(reference, ScanArguments(**widened(a._asdict()))), factor)


FAST = {
    "one token": {"length": 1},
    "a tile and one": {"length": 65, "d_inner": 33},
    "a prime, some states": {"length": 31, "d_state": 5},
    "bare": {"length": 70, "D": False, "z": False, "bias": False, "softplus": False, "initial": False},
    "groups": {"batch": 1, "length": 67, "d_inner": 120, "B": 3, "C": 3},
    "chunks": {"batch": 1, "length": 320, "d_inner": 8},
    "packed": {"batch": 1, "length": 70, "d_inner": 33, "lengths": [0, 1, 3, 0, 40, 26, 0]},
    "packed chunks": {"batch": 1, "length": 400, "d_inner": 8, "lengths": [0, 40, 3, 0, 260, 50, 47, 0]},
}


@pytest.mark.parametrize("case", FAST)
def test_fast_kernels(case):
    check(**{"d_state": 16, "dtype": torch.float32} | FAST[case])


def test_sums_over_a_long_chunk(monkeypatch):
    """They are added to others after 1,024 tokens; on one multiprocessor a row is one chunk."""
    monkeypatch.setattr(nvrtc, "device", lambda index: SMALL._replace(n_multiprocessors=1))
    assert plan.LONG < 1100
    check(batch=1, length=1100, d_inner=3, d_state=16, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("case", FAST)
@pytest.mark.parametrize("d_state", [16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", [None, SMALL], ids=["", "small"])
def test_fast_kernels_of_every_variant(case, d_state, dtype, device, monkeypatch):
    if device:
        monkeypatch.setattr(nvrtc, "device", lambda index: device)
    check(**{"dtype": dtype} | FAST[case] | {"d_state": d_state})


GENERAL = {
    "constant B": {"length": 37, "d_inner": 35, "B": "constant"},
    "packed": {"batch": 1, "length": 70, "d_inner": 8, "C": "constant", "lengths": [0, 1, 3, 0, 40, 26, 0]},
    "chunks": {"batch": 1, "length": 600, "d_inner": 8, "d_state": 3},
    "one token": {"length": 1, "B": "constant", "C": "constant"},
}


@pytest.mark.parametrize("case", GENERAL)
def test_general_kernels(case):
    check(**{"dtype": torch.float32, "is_complex": True, "rule": "zoh"} | GENERAL[case])


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_general_kernels_on_a_gpu_with_less_shared_memory(dtype, is_complex, monkeypatch):
    monkeypatch.setattr(nvrtc, "device", lambda index: SMALL)
    check(dtype=dtype, is_complex=is_complex, length=70, d_inner=5, rule="zoh")


def test_errors_of_general_kernels_do_not_add_up_over_time():
    """They would with an exponential that errs to one side, as a GPU's own does."""
    inputs = scan_inputs(batch=1, length=2048, d_inner=16, d_state=4, B="constant", C="constant", dtype=torch.float32)
    inputs["delta"] = 1e-3 * 100 ** torch.rand(1, 2048, 16, generator=torch.Generator().manual_seed(0))
    inputs |= {"A": -torch.arange(1.0, 5.0).repeat(16, 1), "delta_softplus": False}
    a = arguments(inputs)
    exact = results(reference, ScanArguments(**widened(a._asdict())))
    got, peer = results(cuda, a), results(reference, a)
    for name in ("y", "last_state", "du", "ddelta", "dA", "dB", "dC"):
        error, of_peer = ((found[name] - exact[name]).square().mean().sqrt() for found in (got, peer))
        assert error < 2 * of_peer, name


@pytest.mark.slow
@pytest.mark.parametrize("case", GENERAL)
@pytest.mark.parametrize("rule", ["euler", "zoh"])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_general_kernels_of_every_variant(case, rule, is_complex, dtype):
    check(**{"rule": rule, "is_complex": is_complex, "dtype": dtype} | GENERAL[case])


@pytest.mark.parametrize("largest", [1.0, 700.0, 1e6])
def test_complex_decays(largest):
    """One step of a state of ones leaves exp(delta A), to a few units in the last place at any phase."""
    n = 64
    delta = torch.linspace(-largest, largest, 32 * n).reshape(1, n, 32).float()  # of either sign, without softplus
    A, none = torch.full((32, 1), 0.7j, dtype=torch.complex64), torch.zeros(n, 1, 1, 1, dtype=torch.complex64)
    ones = torch.ones(n, 32, 1, dtype=torch.complex64)
    step = delta.reshape(n, 1, 32)
    a = arguments({"u": torch.zeros(n, 1, 32), "delta": step, "A": A, "B": none, "C": none, "initial_state": ones})
    got = cuda.forward(a, False)[1][..., 0].to(torch.complex128)
    want = torch.exp(1j * (step[:, 0] * A.imag.flatten()).double())
    assert (got - want).abs().max() < 2e-7


@pytest.mark.parametrize("case", ["bare", "groups", "packed", "packed chunks"])
def test_fast_summaries(case):
    check_summaries(cuda, arguments(scan_inputs(**{"d_state": 16, "dtype": torch.float32} | FAST[case])))


@pytest.mark.parametrize("case", ["packed", "chunks"])
def test_general_summaries(case):
    options = {"dtype": torch.float64, "is_complex": True, "rule": "zoh"} | GENERAL[case]
    check_summaries(cuda, arguments(scan_inputs(**options)))


PARTS = {
    "three": ((700, 640, 900), {"batch": 1, "d_inner": 8}),
    "short, empty": ((20, 0, 700, 1), {"batch": 1, "d_inner": 5, "initial": False}),
    "groups": ((700, 700), {"batch": 1, "d_inner": 40, "B": 2, "C": 2}),
    "packed": ((640, 700, 700), {"batch": 1, "d_inner": 8, "lengths": [30, 0, 1500, 20, 490]}),
    "an end at the edge": ((640, 700), {"batch": 1, "d_inner": 8, "lengths": [640, 699, 1]}),
    "ends near the edges": ((640, 640), {"batch": 1, "d_inner": 8, "lengths": [1, 638, 2, 638, 1]}),
}


@pytest.fixture
def chunks_everywhere(monkeypatch):
    """Rows are cut into chunks that would not pay."""
    monkeypatch.setattr(plan, "START_FORWARD", 1)
    monkeypatch.setattr(plan, "NARROW_TIME", 100)
    for forget in (plan.forward_plan.cache_clear, plan.split.cache_clear):
        forget()
    yield
    plan.forward_plan.cache_clear()


QUICK = ("three", "packed")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in PARTS]
)
def test_parts_of_fast_scans(case, chunks_everywhere):
    """Those of long parts are begun before the state arrives, and go on from there."""
    lengths, options = PARTS[case]
    a = arguments(scan_inputs(**{"length": sum(lengths), "d_state": 16, "dtype": torch.float32} | options))
    had_phases = check_parts(a, lengths, "cuda", 3e-5)
    assert had_phases == [length >= 600 for length in lengths]
    if case == "three":  # once more, by the plans of the calls before
        known = len(replaying._plans)
        check_parts(a._replace(u=a.u * 0.5), lengths, "cuda", 3e-5)
        assert len(replaying._plans) == known and None not in replaying._plans.values()


@pytest.mark.slow
def test_parts_of_general_scans():
    a = arguments(scan_inputs(1, 600, 8, 3, is_complex=True, rule="zoh", dtype=torch.float64))
    assert not any(check_parts(a, (250, 0, 350), "cuda", 1e-12))


@pytest.mark.parametrize("case", ["chunks", "packed", "one token", "constant B"])
def test_none_in_place_of_a_gradient_of_zeros(case):
    options = {"d_state": 16, **FAST[case]} if case in FAST else {"d_state": 3, "is_complex": True, **GENERAL[case]}
    a = arguments(scan_inputs(**{"dtype": torch.float32} | options))
    y, last_state, saved = cuda.forward(a, True)
    want, got = (cuda.backward(torch.ones_like(y), d, a, saved) for d in (torch.zeros_like(last_state), None))
    assert all(torch.equal(w, g) for w, g in zip(want, got, strict=True) if w is not None)


STEPS = {
    "fast": {"d_state": 16, "dtype": torch.float32},
    "fast, groups, odd channels": {"d_state": 12, "d_inner": 99, "B": 3, "C": 3, "dtype": torch.float32},
    "fast, bare": {"d_state": 128, "D": False, "z": False, "bias": False, "softplus": False, "dtype": torch.float32},
    "fast, short": {"d_state": 16, "d_inner": 33, "dtype": torch.bfloat16},
    "no state": {"d_state": 4, "initial": False, "dtype": torch.float32},
    "general": {"d_state": 5, "dtype": torch.float32},
    "many states": {"d_state": 300, "dtype": torch.float32},
    "complex": {"d_state": 3, "is_complex": True, "rule": "zoh", "C": "constant", "dtype": torch.float32},
}


@pytest.mark.parametrize("batch", [1, 3, 6])
@pytest.mark.parametrize("case", STEPS)
def test_a_step(case, batch):
    inputs = scan_inputs(**{"batch": batch, "length": 1} | STEPS[case])
    a = arguments(inputs)
    assert (plan.fast_step(a) is None) == (case in ("general", "many states", "complex"))
    pairs = (cuda.step(a), reference.step(a), reference.step(arguments(widened(inputs))))
    assert_within_budget(*({"y": y, "last_state": state} for y, state in pairs))


@pytest.mark.parametrize("d_state", [8, 16, 32])
def test_a_step_is_the_same_in_every_row(d_state):
    """Rows share a block, and each is summed by lanes of its own."""
    one = arguments(scan_inputs(1, 1, 5, d_state, dtype=torch.float32))
    per_row = {k: t for k, t in one._asdict().items() if k in ("u", "delta", "B", "C", "z", "initial_state")}
    many = one._replace(**{k: t.expand(7, *t.shape[1:]).contiguous() for k, t in per_row.items()})
    (y, state), (ys, states) = cuda.step(one), cuda.step(many)
    assert torch.equal(ys, y.expand_as(ys)) and torch.equal(states, state.expand_as(states))


@pytest.mark.parametrize("offset", [0, 1])
def test_a_step_reads_matrices_that_begin_anywhere(offset):
    a = arguments(scan_inputs(5, 1, 9, 16, dtype=torch.bfloat16))
    moved = {k: torch.nn.functional.pad(t, (offset, 3))[..., offset : offset + 16] for k, t in (("B", a.B), ("C", a.C))}
    for got, want in zip(cuda.step(a._replace(**moved)), cuda.step(a), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["delta", "B", "z"])
@pytest.mark.parametrize(("dtype", "other"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_mixed_dtypes(dtype, other, name):
    a = arguments(scan_inputs(1, 70, 33, 16, dtype=dtype))
    check_contract(a._replace(**{name: getattr(a, name).to(other)}))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_random_contracts(seed):
    """Of many small tensors some are those on which the reference is lucky: eight times its error."""
    check_contract(contract(seed), factor=8)


PACKED = FAST["packed chunks"] | {"d_state": 16, "dtype": torch.float32}


@pytest.mark.parametrize("general", [False, True])
def test_threads_may_run_in_any_order(general, monkeypatch):
    """Between synchronisations the lanes of a warp run the other way round: a race would change what comes out."""
    a = arguments(scan_inputs(**PACKED | ({"B": "constant"} if general else {})))
    forwards = results(cuda, a)
    monkeypatch.setattr(emulate.Kernel, "backwards", True)
    assert same_bits(results(cuda, a), forwards)


def test_strided_rows_are_read_where_they_are():
    dense = arguments(scan_inputs(1, 70, 33, 16, dtype=torch.float32))
    wide = {
        k: torch.cat([t, torch.full_like(t, torch.nan)], -1)[..., : t.shape[-1]]
        for k, t in (("u", dense.u), ("delta", dense.delta), ("B", dense.B), ("C", dense.C), ("z", dense.z))
    }
    assert all(call.readable(t) is t and not t.is_contiguous() for t in wide.values())
    assert same_bits(results(cuda, dense._replace(**wide)), results(cuda, dense))


def test_rows_of_any_strides_are_read():
    dense = arguments(scan_inputs(2, 40, 6, 16, dtype=torch.float32))
    turned = {k: t.transpose(0, -1).contiguous().transpose(0, -1) for k, t in dense._asdict().items() if k in "uBz"}
    one = dense._replace(u=dense.u[:, :1].expand(-1, 40, -1))  # strides of 0
    assert same_bits(results(cuda, dense._replace(**turned)), results(cuda, dense))
    assert same_bits(results(cuda, one), results(cuda, one._replace(u=one.u.contiguous())))


def test_vectors_may_begin_anywhere():
    a = arguments(scan_inputs(2, 20, 6, 16, dtype=torch.float32))
    moved = {
        k: torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape)
        for k, t in a._asdict().items()
        if k in ("u", "B", "A", "D", "delta_bias", "initial_state")
    }
    assert all(t.data_ptr() % 16 for t in moved.values())
    assert same_bits(results(cuda, a._replace(**moved)), results(cuda, a))


@pytest.mark.parametrize("name", ["u", "D", "initial_state", "cu_seqlens"])
def test_a_tensor_on_another_device_is_refused(name):
    """The op checks it; whoever calls torch's registered op has nobody else to tell."""
    a = arguments(scan_inputs(1, 9, 6, 16, lengths=[4, 5], dtype=torch.float32))
    with pytest.raises(ValueError, match=r"on one device, got u on .*meta"):
        cuda.forward(a._replace(**{name: getattr(a, name).to("meta")}), False)


@pytest.mark.parametrize("wrong", [[0, 50, 20, 999], [-7, -3, 40, 70], [0, 0, 80, 70]])
def test_offsets_that_are_no_offsets_are_clamped(wrong):
    a = arguments(scan_inputs(1, 70, 6, 16, lengths=[20, 20, 30], dtype=torch.float32))
    clamped = torch.tensor(wrong).cummax(0).values.clamp(0, 70)
    clamped[0], clamped[-1] = 0, 70
    got, want = (results(cuda, a._replace(cu_seqlens=o.int())) for o in (torch.tensor(wrong), clamped))
    assert same_bits(got, want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("general", [False, True])
def test_what_is_not_finite_stays_in_its_sequence(value, general):
    a = arguments(scan_inputs(1, 70, 6, 16, lengths=[30, 40], C="constant" if general else 1, dtype=torch.float32))
    u = a.u.clone()
    u[0, 10] = value
    clean, dirty = results(cuda, a), results(cuda, a._replace(u=u))
    for name in ("y", "du", "dz"):
        assert not dirty[name][:, 10:30].isfinite().all() or name == "du"
        assert torch.equal(dirty[name][:, 30:], clean[name][:, 30:])
    assert torch.equal(dirty["y"][:, :10], clean["y"][:, :10])
    assert not dirty["last_state"][0].isfinite().any() and torch.equal(dirty["last_state"][1], clean["last_state"][1])


@pytest.mark.parametrize("sizes", [(0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4), (0, 0, 3, 4)])
def test_nothing_to_do(sizes):
    a = arguments(scan_inputs(*sizes, dtype=torch.float32))
    got, want = results(cuda, a), results(reference, a)
    assert got.keys() == want.keys() and all(got[k].shape == want[k].shape for k in got)
    assert same_bits(got, want)


def test_states_are_saved_for_a_backward_pass_alone():
    a = arguments(scan_inputs(2, 65, 33, 16, dtype=torch.float32))
    _, _, saved = cuda.forward(a, True)
    assert saved.shape == cuda.saved_shape(a) == (2 * 2 * 16 * 64,)
    assert cuda.forward(a, False)[2].numel() == 0


def test_python_and_cuda_agree_about_the_parameters():
    text = (plan.HERE / "parameters.cuh").read_text()
    body = re.search(r"struct Parameters \{(.*?)\};", text, re.DOTALL)
    declared = re.sub(r"//.*", "", body[1]) if body else ""
    names = re.findall(r"(\w+)\s*[,;]", declared)
    assert tuple(names) == (*call.ROWS, *call.FIELDS)


def test_backends_have_the_same_functions():
    for name in ("unavailable", "refuses", "forward", "backward", "step"):
        ours, theirs = (getattr(module, name).__annotations__ for module in (cuda, reference))
        assert ours == theirs, name
