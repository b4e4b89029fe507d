"""Gradients of the scan by finite differences in float64: every input, through y and through last_state."""

from __future__ import annotations

import pytest
import torch
from scan_cases import TENSORS, scan_inputs

from anymamba import selective_scan, selective_scan_step
from anymamba.kernels.selective_scan import portable
from anymamba.kernels.selective_scan.portable import splitting

CASES = {
    "euler": {},
    "zoh": {"rule": "zoh"},
    "complex": {"is_complex": True},
    "complex-zoh": {"is_complex": True, "rule": "zoh"},
    "packed": {"lengths": [4, 0, 13, 1]},
    "packed-zoh": {"lengths": [0, 17, 1], "rule": "zoh"},
    "packed-complex-zoh": {"lengths": [16, 2], "is_complex": True, "rule": "zoh"},
    "no-softplus": {"softplus": False, "rule": "zoh"},
    "constant": {"B": "constant", "C": "constant", "rule": "zoh"},
    "constant-complex": {"B": "constant", "C": "constant", "is_complex": True},
    "groups": {"B": 1, "C": 2},
    "packed-groups": {"B": 2, "C": "constant", "lengths": [7, 11]},
}


def function_of_tensors(inputs: dict, function, output: int | None, **options):
    """The function of the tensors alone that gradcheck wants, and those tensors."""
    names = [k for k in TENSORS if inputs.get(k) is not None]
    leaves = [inputs[k].detach().requires_grad_() for k in names]

    def call(*values):
        outputs = function(**inputs | dict(zip(names, values, strict=True)), **options)
        return outputs if output is None else outputs[output]

    return call, leaves


@pytest.mark.parametrize("output", [0, 1], ids=["through y", "through last_state"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_scan(options, output, fast):
    inputs = scan_inputs(1, 18, 4, 2, **options)
    call, leaves = function_of_tensors(inputs, selective_scan, output, backend=fast)
    torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
def test_scan_entry_by_entry(is_complex, fast):
    inputs = scan_inputs(2, 3, 2, 2, is_complex=is_complex, rule="zoh")
    call, leaves = function_of_tensors(inputs, selective_scan, None, backend=fast)
    torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("options", [{}, {"lengths": [40, 0, 70]}, {"is_complex": True, "rule": "zoh"}])
def test_scan_with_segments(monkeypatch, options):
    monkeypatch.setattr(splitting, "N_STEPS", 8)
    monkeypatch.setattr(splitting, "STEP", 4 * 2 * 1)
    segments, steps = portable.split(1, 2, 1)
    assert 1 < segments < 110 / steps
    inputs = scan_inputs(1, 110, 2, 1, **options)
    call, leaves = function_of_tensors(inputs, selective_scan, None, backend="portable")
    torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize(
    "options", [{}, {"rule": "zoh"}, {"is_complex": True, "rule": "zoh"}, {"B": "constant", "C": 2}]
)
def test_step(options, backend):
    inputs = step_inputs(**options)
    names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor)]
    leaves = [inputs[k].detach().requires_grad_() for k in names]

    def call(*values):
        return selective_scan_step(**inputs | dict(zip(names, values, strict=True)), backend=backend)

    torch.autograd.gradcheck(call, leaves, fast_mode=True)


def step_inputs(**options) -> dict:
    """Arguments of `selective_scan_step`: those of a scan at length one without the length."""
    inputs = scan_inputs(2, 1, 4, 3, **options)
    inputs |= {k: inputs[k][:, 0] for k in ("u", "delta", "z")}
    inputs |= {k: inputs[k][:, 0] for k in ("B", "C") if inputs[k].ndim == 4}
    inputs["state"] = inputs.pop("initial_state")
    del inputs["cu_seqlens"]
    return inputs


def test_only_the_gradients_that_are_asked_for(fast):
    """Inputs that need no gradient get none, and the others are what they are with all of them."""
    inputs = scan_inputs()
    every, some = [], []
    for wanted, found in ((TENSORS, every), (("u", "z"), some)):
        leaves = {
            k: inputs[k].detach().requires_grad_(k in wanted) if isinstance(inputs[k], torch.Tensor) else inputs[k]
            for k in inputs
        }
        selective_scan(**leaves, backend=fast).y.square().sum().backward()
        found += [leaves["u"].grad, leaves["z"].grad]
        assert (leaves["A"].grad is not None) == ("A" in wanted)
    assert all(torch.equal(a, b) for a, b in zip(every, some, strict=True))
