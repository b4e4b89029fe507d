"""States that leave a row, without outputs: backends on the CPU against the reference."""

from __future__ import annotations

import pytest
import torch
from scan_backends import arguments, check_summaries
from scan_cases import scan_inputs

from anymamba.kernels.backends import BACKENDS
from anymamba.kernels.selective_scan import cpu

CASES = {
    "one token": {"length": 1},
    "short": {"length": 31, "d_inner": 33, "d_state": 5, "initial": False},
    "constant": {"length": 70, "B": "constant", "C": "constant", "rule": "zoh", "bias": False},
    "bare": {"batch": 1, "length": 65, "D": False, "z": False, "softplus": False},
    "groups": {"batch": 1, "length": 129, "d_inner": 12, "B": 3, "C": 3},
    "packed": {"batch": 1, "length": 70, "lengths": [0, 1, 3, 0, 40, 26, 0]},
    "one sequence": {"batch": 1, "length": 70, "lengths": [0, 70, 0, 0]},
}
MODULES = {m.NAME: m for m in BACKENDS["selective_scan"] if m.unavailable("cpu") is None and m.NAME != "reference"}


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", MODULES)
def test_summaries(backend, case, dtype, is_complex):
    a = arguments(scan_inputs(**CASES[case], dtype=dtype, is_complex=is_complex))
    if MODULES[backend].refuses(a) is None:
        check_summaries(MODULES[backend], a)


@pytest.mark.parametrize("lengths", [None, [3, 90, 0, 107], [200, 0], [170, 30]])
def test_chunks_of_time(lengths, monkeypatch):
    """A single task of a long row is split in time."""
    monkeypatch.setattr(cpu, "LONG", 64)
    a = arguments(scan_inputs(1, 200, 8, 3, lengths=lengths))
    assert cpu.task_steps(*a.u.shape, 1) < 100
    check_summaries(cpu, a)
