"""The causal convolution: portable against its definition, gradients, and whole == chunks == steps == packed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scan_cases import HERE, assert_close, assert_within_budget, offsets

from anymamba import causal_conv1d, causal_conv1d_step

NAMES = ("x", "weight", "bias", "initial_state")


def conv_inputs(
    batch: int = 2,
    length: int = 11,
    d_inner: int = 5,
    width: int = 4,
    *,
    bias: bool = True,
    activation: str | None = "silu",
    initial: bool = True,
    lengths: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Arguments of `causal_conv1d`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(HERE, dtype)

    rows = batch if lengths is None else len(lengths)
    return {
        "x": normal(batch, length, d_inner),
        "weight": normal(d_inner, width),
        "bias": normal(d_inner) if bias else None,
        "activation": activation,
        "initial_state": normal(rows, width - 1, d_inner) if initial else None,
        "cu_seqlens": None if lengths is None else offsets(lengths),
    }


def run(inputs: dict[str, Any], backend: str) -> dict[str, torch.Tensor]:
    """y, last_state and every gradient, from fixed cotangents of both."""
    leaves = {k: v.detach().requires_grad_() if k in NAMES and v is not None else v for k, v in inputs.items()}
    y, last_state = causal_conv1d(**leaves, backend=backend)
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t) for t in (y, last_state)
    ]
    loss = (y * weights[0]).sum() + (last_state * weights[1]).sum()
    present = [k for k in NAMES if leaves[k] is not None]
    grads = torch.autograd.grad(loss, [leaves[k] for k in present], materialize_grads=True)
    found = {"y": y.detach(), "last_state": last_state.detach()}
    return found | {f"d{k}": g for k, g in zip(present, grads, strict=True)}


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if k in NAMES and v is not None else v for k, v in inputs.items()}


OPTIONS = {
    "all": {},
    "linear": {"activation": None},
    "no-bias": {"bias": False},
    "no-state": {"initial": False},
    "bare": {"activation": None, "bias": False, "initial": False},
    "packed": {"batch": 1, "lengths": [1, 0, 7, 3]},
    "packed-no-state": {"batch": 1, "lengths": [2, 9, 0], "initial": False},
    "packed-empty-first": {"batch": 1, "lengths": [0, 0, 11], "activation": None},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_portable_against_the_definition(options, dtype, fast):
    inputs = conv_inputs(**options, dtype=dtype)
    got, peer = run(inputs, fast), run(inputs, "reference")
    if dtype == torch.float64:
        assert_close(got, peer, 1e-14)
    else:
        assert_within_budget(got, peer, run(widened(inputs), "reference"))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [0, 1, 2, 6, 13])
@pytest.mark.parametrize("lengths", [False, True], ids=["batch", "packed"])
def test_widths_and_lengths(width, length, lengths, fast):
    packed = [0, length // 2, length - length // 2] if lengths else None
    inputs = conv_inputs(1, length, 3, width, lengths=packed)
    assert_close(run(inputs, fast), run(inputs, "reference"), 1e-14)


@pytest.mark.parametrize("options", [{"batch": 0}, {"d_inner": 1}, {"batch": 3, "d_inner": 17}], ids=str)
def test_sizes(options, fast):
    inputs = conv_inputs(**options)
    assert_close(run(inputs, fast), run(inputs, "reference"), 1e-14)


def test_nothing_has_gradients_of_zero(backend):
    """What is empty belongs to the graph."""
    inputs = conv_inputs(1, 0, 3, 4, initial=False)
    leaves = [inputs[k].requires_grad_() for k in ("x", "weight", "bias")]
    y, last_state = causal_conv1d(**inputs, backend=backend)
    gradients = torch.autograd.grad(y.sum() + last_state.sum(), leaves)
    assert all(g.shape == leaf.shape and not g.any() for g, leaf in zip(gradients, leaves, strict=True))


def test_against_torch():
    inputs = conv_inputs(activation=None, initial=False)
    want = torch.nn.functional.conv1d(
        inputs["x"].mT, inputs["weight"][:, None], inputs["bias"], padding=3, groups=5
    ).mT[:, :11]
    assert torch.allclose(causal_conv1d(**inputs).y, want)


def test_mixed_dtypes_sum_in_float32_and_return_the_input_dtype(fast):
    inputs = conv_inputs(dtype=torch.float32)
    mixed = inputs | {"x": inputs["x"].bfloat16(), "initial_state": inputs["initial_state"]}
    assert_within_budget(run(mixed, fast), run(mixed, "reference"), run(widened(mixed), "reference"), factor=2)
    y, last_state = causal_conv1d(**mixed)
    assert y.dtype == last_state.dtype == torch.bfloat16


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_by_finite_differences(options, fast):
    inputs = conv_inputs(**options)
    names = [k for k in NAMES if inputs[k] is not None]
    leaves = [inputs[k].requires_grad_() for k in names]

    def call(*values):
        return causal_conv1d(**inputs | dict(zip(names, values, strict=True)), backend=fast)

    torch.autograd.gradcheck(call, leaves)


def test_second_derivatives_by_the_reference():
    inputs = conv_inputs(1, 4, 2, 3)
    leaves = [inputs[k].requires_grad_() for k in NAMES]

    def call(*values):
        return causal_conv1d(**inputs | dict(zip(NAMES, values, strict=True)), backend="reference")

    torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_step_gradients(backend):
    inputs = conv_inputs(2, 1)
    leaves = [inputs["initial_state"], inputs["x"][:, 0], inputs["weight"], inputs["bias"]]

    def call(*values):
        return causal_conv1d_step(*values, activation="silu", backend=backend)

    torch.autograd.gradcheck(call, [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_whole_equals_chunks_equals_steps(width, backend):
    inputs = conv_inputs(width=width)
    whole = causal_conv1d(**inputs, backend="portable")
    for cuts in ([1, 11], [5, 6, 11], list(range(1, 12))):
        ys, state = [], inputs["initial_state"]
        for start, stop in itertools.pairwise([0, *cuts]):
            piece = inputs | {"x": inputs["x"][:, start:stop], "initial_state": state}
            y, state = causal_conv1d(**piece, backend=backend)
            ys.append(y)
        assert_close({"y": torch.cat(ys, 1), "s": state}, {"y": whole.y, "s": whole.last_state}, 1e-14)
    ys, state = [], inputs["initial_state"]
    for t in range(11):
        y, state = causal_conv1d_step(
            state, inputs["x"][:, t], inputs["weight"], inputs["bias"], activation="silu", backend=backend
        )
        ys.append(y)
    assert_close({"y": torch.stack(ys, 1), "s": state}, {"y": whole.y, "s": whole.last_state}, 1e-14)


@pytest.mark.parametrize("initial", [True, False])
def test_packed_equals_one_by_one(backend, initial):
    lengths = [3, 0, 1, 7]
    inputs = conv_inputs(1, 11, lengths=lengths, initial=initial)
    y, last_state = causal_conv1d(**inputs, backend=backend)
    for i, (start, stop) in enumerate(itertools.pairwise(inputs["cu_seqlens"].tolist())):
        state = inputs["initial_state"][i : i + 1] if initial else None
        alone = causal_conv1d(**inputs | {"x": inputs["x"][:, start:stop], "initial_state": state, "cu_seqlens": None})
        got = {"y": y[:, start:stop], "s": last_state[i : i + 1]}
        assert_close(got, {"y": alone.y, "s": alone.last_state}, 1e-14)


def test_causality_and_nan(backend):
    inputs = conv_inputs()
    before = causal_conv1d(**inputs, backend=backend).y
    inputs["x"] = inputs["x"].clone()
    inputs["x"][:, 5] = torch.nan
    after = causal_conv1d(**inputs, backend=backend).y
    assert torch.equal(before[:, :5], after[:, :5]) and torch.equal(before[:, 9:], after[:, 9:])
    assert after[:, 5:9].isnan().all()


def test_a_nan_stays_in_its_packed_sequence(backend):
    inputs = conv_inputs(1, 11, lengths=[3, 4, 0, 4])
    clean = run(inputs, backend)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][:, 3:7] = torch.nan
    results = run(inputs, backend)
    others, rows = [0, 1, 2, 7, 8, 9, 10], [0, 2, 3]
    for name in ("y", "dx"):
        assert torch.equal(results[name][:, others], clean[name][:, others]), name
    for name in ("last_state", "dinitial_state"):
        assert torch.equal(results[name][rows], clean[name][rows]), name


def test_the_same_bits_for_any_number_of_threads(fast):
    inputs = conv_inputs(3, 301, 127, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run(inputs, fast)
        for n in (1, 2, 4, 7):
            torch.set_num_threads(n)
            again = run(inputs, fast)
            assert [name for name in first if not torch.equal(first[name], again[name])] == [], f"{n} threads"
    finally:
        torch.set_num_threads(threads)
