"""The CUDA kernels of the causal convolution, run on the processor: their values, races, and how they are called."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from emulation import emulate
from scan_backends import same_bits
from scan_cases import assert_close, assert_within_budget
from test_conv import conv_inputs, widened
from torch import Tensor

from anymamba.kernels.causal_conv1d import cuda, reference
from anymamba.kernels.causal_conv1d.arguments import ConvArguments
from anymamba.kernels.causal_conv1d.cuda import call
from anymamba.runtimes import nvrtc, replaying

if emulate.missing():
    pytest.skip(f"kernels cannot be emulated: {emulate.missing()}", allow_module_level=True)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate.patch(monkeypatch)
    monkeypatch.setattr(call, "FORWARD_PIECES", (8,))  # many pieces of small tensors
    monkeypatch.setattr(call, "BACKWARD_PIECES", (8,))


def arguments(**options: Any) -> ConvArguments:
    inputs = conv_inputs(**{"dtype": torch.float32} | options)
    return record(inputs)


def record(inputs: dict[str, Any]) -> ConvArguments:
    return ConvArguments(**{k: v for k, v in inputs.items() if k != "activation"}, silu=inputs["activation"] == "silu")


def results(module: Any, a: ConvArguments) -> dict[str, Tensor]:
    y, last_state = module.forward(a)
    generator = torch.Generator().manual_seed(1)
    dy, dlast = (torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (y, last_state))
    gradients = module.backward(dy, dlast, a)
    found = {f"d{k}": g for k, g in zip(a._fields, gradients, strict=False) if g is not None}
    return {"y": y, "last_state": last_state} | found


def check(**options: Any) -> None:
    """Errors against float64 are at most twice those of the reference and one rounding; in float64 they are tiny."""
    inputs = conv_inputs(**{"dtype": torch.float32} | options)
    got, peer = (results(module, record(inputs)) for module in (cuda, reference))
    if inputs["weight"].dtype == torch.float64:
        assert_close(got, peer, 1e-13)
    else:
        assert_within_budget(got, peer, results(reference, record(widened(inputs))))


CASES: dict[str, dict[str, Any]] = {
    "pieces and blocks": {"length": 67, "d_inner": 132},
    "bare": {"length": 33, "d_inner": 8, "activation": None, "bias": False, "initial": False},
    "odd channels": {"length": 19, "d_inner": 131},
    "one token": {"length": 1, "d_inner": 8},
    "packed": {"batch": 1, "length": 70, "d_inner": 12, "lengths": [0, 1, 3, 0, 2, 38, 26, 0, 0]},
    "packed, wide": {"batch": 1, "length": 9, "d_inner": 520, "lengths": [4, 0, 5]},
    "packed, no state": {"batch": 1, "length": 40, "d_inner": 5, "lengths": [1] * 20 + [20], "initial": False},
    "many sequences": {"batch": 1, "length": 150, "d_inner": 4, "lengths": [0, 1, 2, 1] * 37 + [2]},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 6])
def test_values(case, width):
    check(**CASES[case], width=width)


@pytest.mark.parametrize("width", [5, 7, 8, 9, 15, 16, 17, 24, 64])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 63, 64, 65, 520])
def test_runs_of_tokens_and_taps(width, length):
    """Around the lengths of runs, and around that of a part of the weights' gradients."""
    for initial in (True, False):
        check(length=length, d_inner=6, width=width, initial=initial, dtype=torch.float64)


@pytest.mark.parametrize("width", [5, 8, 9, 17, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_runs_in_packed_sequences(width, dtype):
    check(batch=1, length=90, d_inner=6, width=width, lengths=[8, 0, 16, 1, 7, 9, 3, 46], dtype=dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_what_sees_it_and_no_more(value):
    """A run reads tokens and taps that some of its outputs do not see."""
    a, want = (arguments(batch=1, length=40, d_inner=4, width=11, activation=None, initial=False) for _ in range(2))
    a.x[0, 21, 1] = value
    (y, last_state), (plain, _) = cuda.forward(a), cuda.forward(want)
    seen = torch.zeros(40, 4, dtype=torch.bool)
    seen[21:32, 1] = True
    assert not y[0][seen].isfinite().any() and torch.equal(y[0][~seen], plain[0][~seen])
    dy = torch.ones_like(y)
    dy[0, 21, 1] = value
    dx, dweight = cuda.backward(dy, torch.zeros_like(last_state), want)[:2]
    assert torch.equal(~dx[0].isfinite(), seen.roll(-10, 0)) and not dweight[1].isfinite().any()
    assert dweight[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("width", [4, 5])
def test_calls_are_planned_once(width, monkeypatch):
    """Weights of wide convolutions are turned before a call is planned: a plan has no copies."""
    monkeypatch.setattr(replaying, "_plans", {})
    a = arguments(length=20, d_inner=8, width=width)
    first, again = results(cuda, a), results(cuda, a)
    assert len(replaying._plans) == 2 and None not in replaying._plans.values()
    assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", ["pieces and blocks", "packed"])
def test_dtypes(case, dtype):
    check(**CASES[case], dtype=dtype)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("width", [1, 3, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_step(dtype, width, batch):
    inputs = conv_inputs(batch, 1, 131, width, dtype=dtype)
    pairs = (m.step(record(i)) for m, i in ((cuda, inputs), (reference, inputs), (reference, widened(inputs))))
    assert_within_budget(*({"y": y, "last_state": state} for y, state in pairs))


def test_mixed_dtypes():
    a = arguments(length=20, d_inner=8)
    for mixed in (a._replace(x=a.x.bfloat16()), a._replace(weight=a.weight.double()), a._replace(bias=a.bias.half())):
        wide = ConvArguments(*(t if t is None else t.double() for t in mixed.tensors), mixed.silu)
        assert_within_budget(*(results(m, i) for m, i in ((cuda, mixed), (reference, mixed), (reference, wide))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_that_is_wider_than_the_rest(dtype):
    """The fast kernels would read its eight bytes as two."""
    a = arguments(length=20, d_inner=8, dtype=dtype)
    a = a._replace(bias=torch.linspace(-1, 1, 8, dtype=torch.float64))
    wide = ConvArguments(*(t if t is None else t.double() for t in a.tensors), a.silu)
    assert_within_budget(*(results(m, i) for m, i in ((cuda, a), (reference, a), (reference, wide))))
    one = a._replace(x=a.x[:, :1], cu_seqlens=None)
    assert torch.allclose(cuda.step(one)[0].float(), reference.step(one)[0].float(), rtol=1e-2, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_random_contracts(seed):
    rng = random.Random(seed)
    length, packed = rng.choice((1, 2, 7, 8, 9, 31, 33, 64, 65, 100)), rng.random() < 0.5
    cuts = sorted(rng.randint(0, length) for _ in range(rng.choice((0, 1, 2, 5, 40))))
    check(
        batch=1 if packed else rng.randint(1, 3),
        length=length,
        d_inner=rng.choice((1, 3, 4, 8, 32, 127, 128, 129, 260)),
        width=rng.choice((1, 2, 3, 4, 4, 4, 5, 8)),
        bias=rng.random() < 0.7,
        activation=rng.choice((None, "silu")),
        initial=rng.random() < 0.7,
        lengths=[b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)] if packed else None,
        dtype=rng.choice((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    )


@pytest.mark.parametrize("width", [4, 5])
def test_threads_may_run_in_any_order(width, monkeypatch):
    """Between synchronisations the lanes of a warp run the other way round: a race would change what comes out."""
    a = arguments(**CASES["packed"], width=width)
    forwards = results(cuda, a)
    monkeypatch.setattr(emulate.Kernel, "backwards", True)
    assert same_bits(results(cuda, a), forwards)


@pytest.mark.parametrize("width", [4, 5])
def test_tensors_lie_anywhere(width):
    dense = arguments(length=20, d_inner=12, width=width)
    padded = torch.cat([dense.x, torch.full_like(dense.x, torch.nan)], -1)[..., :12]
    turned = dense.x.transpose(0, 1).contiguous().transpose(0, 1)
    moved = torch.cat([torch.zeros(1), dense.x.flatten()])[1:].view(dense.x.shape)
    columns = dense.x.mT.contiguous().mT
    for x in (padded, turned, moved, columns):
        assert same_bits(results(cuda, dense._replace(x=x)), results(cuda, dense))
    weight = dense.weight.T.contiguous().T
    assert same_bits(results(cuda, dense._replace(weight=weight)), results(cuda, dense))


@pytest.mark.parametrize("width", [4, 5])
@pytest.mark.parametrize("wrong", [[0, 50, 20, 999], [-7, -3, 40, 70], [0, 0, 80, 70], [5, 60, 10, 3]])
def test_offsets_that_are_no_offsets_stay_inside(wrong, width):
    a = arguments(batch=1, length=70, d_inner=8, width=width, lengths=[20, 20, 30])
    found = results(cuda, a._replace(cu_seqlens=torch.tensor(wrong)))
    assert all(t.isfinite().all() for name, t in found.items() if name in ("y", "dx", "last_state"))


@pytest.mark.parametrize("width", [2, 4, 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_sequence(value, width):
    a = arguments(batch=1, length=70, d_inner=4, width=width, lengths=[30, 40])
    x = a.x.clone()
    x[0, 28] = value
    clean, dirty = results(cuda, a), results(cuda, a._replace(x=x))
    assert torch.equal(dirty["y"][:, 30:], clean["y"][:, 30:]) and torch.equal(dirty["y"][:, :28], clean["y"][:, :28])
    assert torch.equal(dirty["dx"][:, 30:], clean["dx"][:, 30:])
    assert torch.equal(dirty["last_state"][1], clean["last_state"][1])


@pytest.mark.parametrize("sizes", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 3)])
@pytest.mark.parametrize("initial", [False, True])
def test_nothing_to_do(sizes, initial):
    a = record(conv_inputs(*sizes, initial=initial, dtype=torch.float32))
    got, want = results(cuda, a), results(reference, a)
    assert got.keys() == want.keys() and all(got[k].shape == want[k].shape for k in got)
    assert same_bits(got, want)


def test_pieces_fill_the_machine():
    assert call.piece_of(1, 1, 132, 5, range(8, 65, 4)) == 8
    for length in (1, 100, 2048, 1 << 20):
        assert call.piece_of(length, 12, 132, 6, range(8, 65, 8)) in range(8, 65, 8)
    for held, pieces in ((5, range(8, 65, 4)), (3, range(8, 193, 4))):
        assert call.piece_of(2048, 12, 132, held, pieces) == 24  # 264 blocks, two for each multiprocessor
    assert call.piece_of(2048, 96, 132, 5, range(8, 65, 4)) == 40  # 1,248 blocks in two waves of 660
    assert call.piece_of(2048, 96, 132, 5, range(8, 33, 4)) == 28  # 1,824 in three


def test_python_and_cuda_agree_about_the_parameters():
    text = (call.HERE / "parameters.cuh").read_text()
    body = re.search(r"struct Parameters \{(.*?)\};", text, re.DOTALL)
    names = re.findall(r"(\w+)\s*[,;]", re.sub(r"//.*", "", body[1])) if body else []
    assert tuple(names) == (*call.TENSORS, *call.FIELDS)


def test_backends_have_the_same_functions():
    for name in ("unavailable", "refuses", "forward", "backward", "step"):
        ours, theirs = (getattr(module, name).__annotations__ for module in (cuda, reference))
        assert ours == theirs, name


def test_variants_are_found_by_dtype():
    assert len(call.variants()) == 5 and all(isinstance(v, nvrtc.Variant) for v in call.variants())


@pytest.mark.parametrize("options", [{"length": 19, "d_inner": 131}, {"width": 6}, {"lengths": [0, 1, 8], "batch": 1}])
def test_none_in_place_of_a_gradient_of_zeros(options):
    a = arguments(**{"length": 9, "d_inner": 8} | options)
    y, last_state = cuda.forward(a)
    want, got = (cuda.backward(torch.ones_like(y), d, a) for d in (torch.zeros_like(last_state), None))
    assert all(torch.equal(w, g) for w, g in zip(want, got, strict=True) if w is not None)
