"""The Triton kernels in Triton's interpreter, against the reference: test_triton.py runs it in a process of its own."""

from __future__ import annotations

import pytest
import torch
from scan_backends import arguments, check_summaries
from scan_cases import assert_close, assert_within_budget, offsets, run_scan, scan_inputs, widened
from test_conv import conv_inputs
from test_conv import run as run_conv
from test_conv import widened as widened_conv

from anymamba import selective_scan, selective_scan_step
from anymamba.kernels.selective_scan import triton as scan_triton
from anymamba.kernels.selective_scan.triton import plan
from anymamba.ops import dispatch

SMALL = {"batch": 1, "length": 6, "d_inner": 3, "d_state": 2}

SCANS = {
    "all": {"batch": 2, "d_state": 4},
    "plain": {"D": False, "z": False, "bias": False, "softplus": False, "initial": False},
    "zoh": {"rule": "zoh", "length": 4},
    "constant": {"B": "constant", "C": "constant", "rule": "zoh", "length": 3},
    "groups": {"B": 3, "C": "constant"},
    "two chunks": {"length": 69, "d_state": 1, "d_inner": 1},
    "packed": {"lengths": [3, 0, 1, 2]},
    "packed, two chunks": {"length": 70, "lengths": [2, 0, 66, 1, 1], "d_state": 1, "d_inner": 1, "initial": False},
    "two slabs": {"length": 2, "d_state": 17},
    "two blocks": {"length": 2, "d_inner": 33},
}


@pytest.mark.parametrize("options", SCANS.values(), ids=SCANS)
def test_the_scan_in_float64(options):
    inputs = scan_inputs(**SMALL | options)
    assert_close(run_scan(inputs, "triton"), run_scan(inputs, "reference"), 1e-13)


@pytest.mark.parametrize("name", ["all", "constant", "two chunks", "packed", "packed, two chunks", "two slabs"])
def test_summaries(name):
    check_summaries(scan_triton, arguments(scan_inputs(**SMALL | SCANS[name])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [None, [4, 0, 3]], ids=["batch", "packed"])
def test_the_scan_in_other_dtypes(dtype, lengths):
    inputs = scan_inputs(1, 7, 3, 4, lengths=lengths, dtype=dtype)
    exact = run_scan(widened(inputs), "reference")
    assert_within_budget(run_scan(inputs, "triton"), run_scan(inputs, "reference"), exact)


SPLIT = {"batch": 1, "length": 5, "d_inner": 8, "d_state": 16, "dtype": torch.float32}

SPLIT_SCANS = {
    "all": {"batch": 2},
    "plain": {"D": False, "z": False, "bias": False, "softplus": False, "initial": False},
    "no gate": {"z": False, "d_inner": 16},
    "one token": {"length": 1, "initial": False},
    "groups": {"B": 2, "C": 2, "d_inner": 16, "length": 9},
    "bfloat16": {"batch": 2, "dtype": torch.bfloat16, "D": False},
    "bfloat16, groups of two tiles": {"dtype": torch.bfloat16, "length": 17, "B": 2, "C": 2, "d_inner": 16},
    "one number a word": {"dtype": torch.float16, "bias": False},
    "two saved states": {"length": 67},
}


@pytest.mark.parametrize("options", SPLIT_SCANS.values(), ids=SPLIT_SCANS)
def test_states_split_over_lanes(options):
    inputs = scan_inputs(**SPLIT | options)
    assert plan.splits(arguments(inputs))
    exact = run_scan(widened(inputs), "reference")
    assert_within_budget(run_scan(inputs, "triton"), run_scan(inputs, "reference"), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [64, 130])
def test_states_split_over_lanes_and_long(dtype, length):
    """Both forward kernels save the same states, but for roundings."""
    a = arguments(scan_inputs(**SPLIT | {"length": length, "dtype": dtype}))
    y, *states = scan_triton.forward(a, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "splits", lambda a: False)
        y_of_other, *states_of_other = scan_triton.forward(a, True)
    assert_close({"y": y}, {"y": y_of_other}, 4 * torch.finfo(dtype).eps)
    assert_close(dict(enumerate(states)), dict(enumerate(states_of_other)), 1e-6)


@pytest.mark.parametrize("rule", ["euler", "zoh"])
def test_one_token(rule):
    inputs = scan_inputs(2, 1, 6, 5, B=2, C="constant", rule=rule)
    state, _ = inputs.pop("initial_state"), inputs.pop("cu_seqlens")
    now = {k: v[:, 0] if k in ("u", "delta", "z", "B") else v for k, v in inputs.items()}
    got, want = (
        dict(zip("yh", selective_scan_step(state, **now, backend=b), strict=True)) for b in ("triton", "reference")
    )
    assert_close(got, want, 1e-13)


def test_wrong_offsets_are_clamped():
    inputs = scan_inputs(**SMALL, lengths=[4, 1, 1])
    wrong = inputs | {"cu_seqlens": torch.tensor([5, 4, 2, 900], dtype=torch.int32)}
    meant = inputs | {"cu_seqlens": torch.tensor([0, 5, 5, 6], dtype=torch.int32)}
    assert_close(run_scan(wrong, "triton"), run_scan(meant, "reference"), 1e-13)


def test_nan_and_infinity_are_kept():
    inputs = scan_inputs(**SMALL, initial=False)
    inputs["u"][0, 2, 0], inputs["u"][0, 3, 1] = torch.nan, torch.inf
    got, want = (selective_scan(**inputs, backend=b).y for b in ("triton", "reference"))
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


def test_a_complex_A_goes_to_another_backend():
    inputs = scan_inputs(**SMALL, is_complex=True)
    with pytest.raises(RuntimeError, match=r"'triton' cannot serve .*: it supports only real A; .*portable"):
        selective_scan(**inputs, backend="triton")


CONVS = {
    "all": {},
    "plain": {"activation": None, "bias": False, "initial": False},
    "one tap": {"width": 1},
    "wide": {"width": 7, "length": 3},
    "long": {"batch": 1, "length": 530, "d_inner": 1},
    "packed": {"batch": 1, "lengths": [1, 0, 7, 3]},
    "packed, from zeros": {"batch": 1, "lengths": [2, 9, 0], "initial": False},
}


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
def test_the_convolution_in_float64(options):
    inputs = conv_inputs(**options)
    assert_close(run_conv(inputs, "triton"), run_conv(inputs, "reference"), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_convolution_in_other_dtypes(dtype):
    inputs = conv_inputs(dtype=dtype)
    exact = run_conv(widened_conv(inputs), "reference")
    assert_within_budget(run_conv(inputs, "triton"), run_conv(inputs, "reference"), exact)


def test_triton_ran():
    before = dispatch.calls["selective_scan", "triton", "backward"]
    run_scan(scan_inputs(**SMALL | {"length": 2}), "triton")
    assert dispatch.calls["selective_scan", "triton", "backward"] == before + 1
    assert offsets([1]).device.type == "cpu"
