"""Every message of the operators' checks: the kind of the error, what, got and wanted."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from scan_cases import HERE, scan_inputs

from anymamba import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step
from anymamba.ops import dispatch

INT = torch.zeros(2, 19, 6, dtype=torch.int64)
COMPLEX = torch.zeros(6, 4, dtype=torch.complex64)

LIKE_A = ("A", "B", "C", "initial_state")

SCAN = {
    "u-ndim": ({"u": torch.zeros(19, 6)}, ValueError, r"u must be \(batch, length, d_inner\), got \(19, 6\)"),
    "A-rows": (
        {"A": torch.zeros(5, 4)},
        ValueError,
        r"A must be \(d_inner, d_state\) = \(6, at least 1\), got \(5, 4\)",
    ),
    "A-no-state": ({"A": torch.zeros(6, 0)}, ValueError, r"A must be .* at least 1\), got \(6, 0\)"),
    "A-ndim": ({"A": torch.zeros(6)}, ValueError, r"A must be .* got \(6,\)"),
    "delta": ({"delta": torch.zeros(2, 18, 6)}, ValueError, r"delta must be .* = \(2, 19, 6\), got \(2, 18, 6\)"),
    "z": ({"z": torch.zeros(2, 19, 5)}, ValueError, r"z must be .* = \(2, 19, 6\), got \(2, 19, 5\)"),
    "D": ({"D": torch.zeros(5)}, ValueError, r"D must be \(d_inner,\) = \(6\), got \(5,\)"),
    "bias": ({"delta_bias": torch.zeros(6, 1)}, ValueError, r"delta_bias must be \(d_inner,\) = \(6\), got \(6, 1\)"),
    "u-int": ({"u": INT}, TypeError, "u must be floating point, got torch.int64"),
    "delta-int": ({"delta": INT}, TypeError, "delta must be floating point, got torch.int64"),
    "z-int": ({"z": INT}, TypeError, "z must be floating point, got torch.int64"),
    "D-int": ({"D": INT[0, 0]}, TypeError, "D must be floating point, got torch.int64"),
    "bias-int": ({"delta_bias": INT[0, 0]}, TypeError, "delta_bias must be floating point, got torch.int64"),
    "u-complex": ({"u": INT.to(torch.complex64)}, TypeError, "u must be floating point, got torch.complex64"),
    "A-int": ({"A": COMPLEX.real.int()}, TypeError, "A must be floating point or complex, got torch.int32"),
    "rule": ({"b_discretization": "bilinear"}, ValueError, '"euler" or "zoh", got \'bilinear\''),
    "B-complex": (
        {"B": COMPLEX},
        TypeError,
        "B must be complex exactly when A is, got torch.complex64 and A torch.float64",
    ),
    "A-complex": (
        {"A": COMPLEX},
        TypeError,
        "B must be complex exactly when A is, got torch.float64 and A torch.complex64",
    ),
    "state-complex": (
        {"initial_state": torch.zeros(2, 6, 4, dtype=torch.complex64)},
        TypeError,
        "initial_state must be complex exactly when A is",
    ),
    "state": (
        {"initial_state": torch.zeros(1, 6, 4)},
        ValueError,
        r"initial_state must be \(n_sequences, d_inner, d_state\) = \(2, 6, 4\), got \(1, 6, 4\)",
    ),
    "B-constant": ({"B": torch.zeros(6, 5)}, ValueError, r"B must be \(d_inner, d_state\) = \(6, 4\), got \(6, 5\)"),
    "C-selective": ({"C": torch.zeros(2, 19, 5)}, ValueError, r"C must be .* = \(2, 19, 4\), got \(2, 19, 5\)"),
    "B-groups": ({"B": torch.zeros(2, 18, 2, 4)}, ValueError, r"B must be .* = \(2, 19, any, 4\), got \(2, 18, 2, 4\)"),
    "B-ndim": ({"B": torch.zeros(4)}, ValueError, r"B must be .* got \(4,\)"),
    "group-size": (
        {"B": torch.zeros(2, 19, 4, 4)},
        ValueError,
        "d_inner must be a multiple of the n_groups of B, got 6 and 4; change either",
    ),
    "no-groups": ({"C": torch.zeros(2, 19, 0, 4)}, ValueError, "multiple of the n_groups of C, got 6 and 0"),
    "groups-differ": (
        {"B": torch.zeros(2, 19, 2, 4), "C": torch.zeros(2, 19, 3, 4)},
        ValueError,
        "B and C must have the same n_groups or one group, got 2 and 3",
    ),
    "device": (
        {"D": torch.zeros(6, device="meta")},
        ValueError,
        "needs all tensors on one device, got u on c.* D on meta",
    ),
    "backend": (
        {"backend": "fast"},
        ValueError,
        "unknown backend 'fast' for selective_scan; the backends are cpu, cuda, .*portable, reference",
    ),
    "cpu-backend": (
        {"backend": "cpu", **{k: v for k, v in scan_inputs(is_complex=True).items() if k in LIKE_A}},
        RuntimeError,
        "backend 'cpu' cannot serve selective_scan on c.*: it (supports only real A|serves tensors on the CPU)",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), SCAN.values(), ids=SCAN)
def test_scan(change, error, message):
    with pytest.raises(error, match=message):
        selective_scan(**scan_inputs() | change)


def here(offsets: list) -> torch.Tensor:
    return torch.tensor(offsets, device=HERE)


OFFSETS = {
    "dtype": (
        here([0.0, 19.0]),
        TypeError,
        r"cu_seqlens must be int32, got torch.float32; use cu_seqlens.int\(\)",
    ),
    "ndim": (
        here([[0, 19]]),
        ValueError,
        r"cu_seqlens must be a vector of n \+ 1 offsets .*got shape \(1, 2\)",
    ),
    "one": (here([0]), ValueError, r"n >= 1 sequences, got shape \(1,\)"),
    "first": (here([1, 19]), ValueError, r"cu_seqlens must rise from 0 to the length 19, got \[1, 19\]"),
    "last": (here([0, 18]), ValueError, r"must rise from 0 to the length 19, got \[0, 18\]"),
    "falls": (here([0, 12, 9, 19]), ValueError, r"must rise from 0 .* got \[0, 12, 9, 19\]"),
    "long": (here([*range(10), 20]), ValueError, r"must rise from 0 .* got \[0, 1, 2, 3, '...', 8, 9, 20\]"),
}


@pytest.mark.parametrize("op", ["scan", "conv"])
@pytest.mark.parametrize(("cu_seqlens", "error", "message"), OFFSETS.values(), ids=OFFSETS)
def test_offsets(cu_seqlens, error, message, op, backend):
    """What only values tell is clamped where nobody may wait for them."""
    name = "selective_scan" if op == "scan" else "causal_conv1d"
    clamped = "must rise" in message and dispatch.clamps_offsets(name, backend.partition(" ")[0])
    with nullcontext() if clamped else pytest.raises(error, match=message):
        if op == "scan":
            y, _ = selective_scan(**scan_inputs(1, initial=False) | {"cu_seqlens": cu_seqlens}, backend=backend)
        else:
            y, _ = causal_conv1d(torch.zeros(1, 19, 6), torch.zeros(6, 4), cu_seqlens=cu_seqlens, backend=backend)
        assert y.isfinite().all()


@pytest.mark.parametrize("op", ["scan", "conv"])
def test_offsets_want_one_row(op):
    message = r"got batch 2; flatten \(batch, length\) to \(1, batch \* length\) and shift the offsets"
    with pytest.raises(ValueError, match=message):
        if op == "scan":
            selective_scan(**scan_inputs(2) | {"cu_seqlens": here([0, 19])})
        else:
            causal_conv1d(torch.zeros(2, 19, 6), torch.zeros(6, 4), cu_seqlens=here([0, 19]))


def step_arguments() -> dict:
    state = torch.zeros(2, 6, 4)
    now = torch.zeros(2, 6)
    return {
        "state": state,
        "u": now,
        "delta": now,
        "A": -torch.ones(6, 4),
        "B": torch.zeros(2, 1, 4),
        "C": torch.ones(6, 4),
    }


STEP = {
    "u": ({"u": torch.zeros(2, 5)}, ValueError, r"u must be \(batch, d_inner\) = \(any, 6\), got \(2, 5\)"),
    "u-long": ({"u": torch.zeros(2, 1, 6)}, ValueError, r"u must be \(batch, d_inner\)"),
    "A-ndim": ({"A": torch.zeros(6)}, ValueError, r"A must be \(d_inner, d_state\).* got \(6,\)"),
    "state": ({"state": torch.zeros(1, 6, 4)}, ValueError, r"state must be .* = \(2, 6, 4\), got \(1, 6, 4\)"),
    "state-int": ({"state": torch.zeros(2, 6, 4).int()}, TypeError, "state must be floating point or complex"),
    "state-complex": (
        {"state": torch.zeros(2, 6, 4, dtype=torch.complex64)},
        TypeError,
        "state must be complex exactly when A is, got torch.complex64 and A torch.float32",
    ),
    "delta": ({"delta": torch.zeros(1, 6)}, ValueError, "delta must be"),
    "B-flat": (
        {"B": torch.zeros(4)},
        ValueError,
        r"B must be .* got \(4,\); for \(batch, d_state\) insert a dimension",
    ),
    "B-no-group": ({"B": torch.zeros(2, 4)}, ValueError, r"B must be \(d_inner, d_state\) = \(6, 4\), got \(2, 4\)"),
    "C-groups": ({"C": torch.zeros(2, 4, 4)}, ValueError, "multiple of the n_groups of C, got 6 and 4"),
    "rule": ({"b_discretization": ""}, ValueError, '"euler" or "zoh"'),
    "device": ({"state": torch.zeros(2, 6, 4, device="meta")}, ValueError, "on one device, got .*state on meta"),
    "backend": (
        {"backend": "fast"},
        ValueError,
        "unknown backend 'fast' for selective_scan; the backends are cpu, cuda, .*portable",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), STEP.values(), ids=STEP)
def test_scan_step(change, error, message):
    selective_scan_step(**step_arguments())
    with pytest.raises(error, match=message):
        selective_scan_step(**step_arguments() | change)


CONV = {
    "x": ({"x": torch.zeros(19, 6)}, ValueError, r"x must be \(batch, length, d_inner\), got \(19, 6\)"),
    "weight": (
        {"weight": torch.zeros(5, 4)},
        ValueError,
        r"weight must be \(d_inner, width\) = \(6, any\), got \(5, 4\)",
    ),
    "weight-3d": ({"weight": torch.zeros(6, 1, 4)}, ValueError, r"weight must be \(d_inner, width\)"),
    "width": ({"weight": torch.zeros(6, 0)}, ValueError, "weight must have a width of at least 1, got 0"),
    "bias": ({"bias": torch.zeros(5)}, ValueError, r"bias must be \(d_inner,\) = \(6\), got \(5,\)"),
    "activation": ({"activation": "gelu"}, ValueError, "activation must be None or \"silu\", got 'gelu'"),
    "state": (
        {"initial_state": torch.zeros(2, 4, 6)},
        ValueError,
        r"initial_state must be \(n_sequences, width - 1, d_inner\) = \(2, 3, 6\), got \(2, 4, 6\)",
    ),
    "x-int": ({"x": torch.zeros(2, 19, 6).int()}, TypeError, "x must be floating point, got torch.int32"),
    "weight-int": ({"weight": torch.zeros(6, 4).int()}, TypeError, "weight must be floating point, got torch.int32"),
    "bias-int": ({"bias": torch.zeros(6).int()}, TypeError, "bias must be floating point, got torch.int32"),
    "state-int": ({"initial_state": torch.zeros(2, 3, 6).int()}, TypeError, "initial_state must be floating point"),
    "device": ({"bias": torch.zeros(6, device="meta")}, ValueError, "causal_conv1d needs all tensors on one device"),
    "backend": ({"backend": "fast"}, ValueError, "unknown backend 'fast' for causal_conv1d"),
}


@pytest.mark.parametrize(("change", "error", "message"), CONV.values(), ids=CONV)
def test_conv(change, error, message):
    good = {"x": torch.zeros(2, 19, 6), "weight": torch.zeros(6, 4)}
    causal_conv1d(**good)
    with pytest.raises(error, match=message):
        causal_conv1d(**good | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 1, 6)}, ValueError, r"x must be \(batch, d_inner\), got \(2, 1, 6\)"),
        ({"state": torch.zeros(2, 4, 6)}, ValueError, r"state must be .* = \(2, 3, 6\), got \(2, 4, 6\)"),
        ({"weight": torch.zeros(5, 4)}, ValueError, "weight must be"),
    ],
)
def test_conv_step(change, error, message):
    good = {"state": torch.zeros(2, 3, 6), "x": torch.zeros(2, 6), "weight": torch.zeros(6, 4)}
    causal_conv1d_step(**good)
    with pytest.raises(error, match=message):
        causal_conv1d_step(**good | change)
