"""whole == chunks == steps == packed == padded, causality, freezing, NaN, invariance to the batch, determinism."""

from __future__ import annotations

import itertools

import pytest
import torch
from scan_cases import TENSORS, assert_close, offsets, run_scan, scan_inputs

from anymamba import selective_scan, selective_scan_step

OPTIONS = {
    "real": {},
    "complex-zoh": {"is_complex": True, "rule": "zoh"},
    "constant": {"B": "constant", "C": 2, "rule": "zoh"},
}
ALONG_TIME = ("u", "delta", "z", "B", "C")


def part(inputs: dict, start: int, stop: int, **changes) -> dict:
    """A stretch of time of the inputs of a scan."""
    cut = {k: inputs[k][:, start:stop] for k in ALONG_TIME if inputs[k] is not None and inputs[k].ndim > 2}
    return inputs | cut | changes


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cuts", [[1], [16], [17, 18], [5, 5, 30], list(range(1, 37))], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_whole_equals_chunks(options, cuts, batch, fast):
    inputs = scan_inputs(batch, 37, **options)
    whole = selective_scan(**inputs, backend=fast)
    ys, state = [], inputs["initial_state"]
    for start, stop in zip([0, *cuts], [*cuts, 37], strict=True):
        y, state = selective_scan(**part(inputs, start, stop, initial_state=state), backend=fast)
        ys.append(y)
    assert_close({"y": torch.cat(ys, 1), "state": state}, {"y": whole.y, "state": whole.last_state}, 1e-13)


def test_gradients_of_the_whole_equal_those_through_chunks(fast):
    inputs = scan_inputs(2, 40)
    gradients = []
    for cuts in ([40], [7, 23, 40]):
        leaves = {k: v.detach().requires_grad_() if k in TENSORS else v for k, v in inputs.items()}
        total, state, start = 0.0, leaves["initial_state"], 0
        for stop in cuts:
            y, state = selective_scan(**part(leaves, start, stop, initial_state=state), backend=fast)
            total, start = total + y.square().sum(), stop
        (total + state.square().sum()).backward()
        gradients.append({k: leaves[k].grad for k in TENSORS})
    assert_close(gradients[1], gradients[0], 1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_whole_equals_steps(options, backend):
    inputs = scan_inputs(2, 21, **options)
    whole = selective_scan(**inputs, backend="portable")
    fixed = {k: inputs[k] for k in ("A", "D", "delta_bias", "delta_softplus", "b_discretization")}
    ys, state = [], inputs["initial_state"]
    for t in range(21):
        now = {k: inputs[k][:, t] for k in ("u", "delta", "z")}
        for name in ("B", "C"):
            M = inputs[name]
            now[name] = M if M.ndim == 2 else M[:, t] if M.ndim == 4 else M[:, t, None]
        y, state = selective_scan_step(state, **now, **fixed, backend=backend)
        ys.append(y)
    assert_close({"y": torch.stack(ys, 1), "state": state}, {"y": whole.y, "state": whole.last_state}, 1e-13)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("initial", [True, False], ids=["state", "no state"])
def test_packed_equals_one_by_one(options, initial, backend):
    lengths = [5, 0, 1, 16, 33]
    packed = scan_inputs(1, sum(lengths), lengths=lengths, initial=initial, **options)
    y, last_state = selective_scan(**packed, backend=backend)
    cuts = offsets(lengths).tolist()
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        state = packed["initial_state"][i : i + 1] if initial else None
        alone = selective_scan(**part(packed, start, stop, initial_state=state, cu_seqlens=None), backend=backend)
        got = {"y": y[:, start:stop], "state": last_state[i : i + 1]}
        assert_close(got, {"y": alone.y, "state": alone.last_state}, 1e-13)


def test_packed_equals_batched(fast):
    batched = scan_inputs(3, 18, dtype=torch.float64)
    flat = {k: batched[k].flatten(0, 1)[None] for k in ALONG_TIME}
    packed = batched | flat | {"cu_seqlens": offsets([18, 18, 18])}
    want, got = run_scan(batched, fast), run_scan(packed, fast, gradients=False)
    assert_close(
        {"y": got["y"].view(3, 18, 6), "s": got["last_state"]}, {"y": want["y"], "s": want["last_state"]}, 1e-13
    )


def test_int64_offsets_serve_too():
    inputs = scan_inputs(1, 20, lengths=[7, 13])
    wide = inputs | {"cu_seqlens": inputs["cu_seqlens"].long()}
    assert torch.equal(selective_scan(**wide).y, selective_scan(**inputs).y)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_masked_steps_freeze_the_state_with_zero_gradient(options, backend):
    """delta = -inf before the softplus is exactly 0 after it, in whatever place: the state is that without the step."""
    inputs = scan_inputs(2, 20, **options)
    masked = torch.zeros(20, dtype=torch.bool)
    masked[[0, 1, 7, 15, 16, 17, 19]] = True
    delta = inputs["delta"].clone()
    delta[:, masked] = -torch.inf
    leaves = {k: v.detach().requires_grad_() for k, v in (inputs | {"delta": delta}).items() if k in TENSORS}
    y, last_state = selective_scan(**inputs | leaves, backend=backend)
    kept = {k: inputs[k][:, ~masked] for k in ALONG_TIME if inputs[k].ndim > 2}
    alone = selective_scan(**inputs | kept, backend="reference")
    assert_close({"y": y[:, ~masked], "s": last_state}, {"y": alone.y, "s": alone.last_state}, 1e-13)
    (y[:, ~masked].square().sum() + last_state.abs().square().sum()).backward()
    assert leaves["delta"].grad[:, masked].eq(0).all()
    assert leaves["u"].grad[:, masked].eq(0).all()
    assert all(t.grad.isfinite().all() for t in leaves.values())


def test_all_steps_masked_return_the_state_bit_for_bit(backend):
    inputs = scan_inputs(2, 35, dtype=torch.float32)
    inputs["delta"].fill_(-torch.inf)
    assert torch.equal(selective_scan(**inputs, backend=backend).last_state, inputs["initial_state"])


@pytest.mark.parametrize("name", ["u", "delta", "z", "B", "C"])
@pytest.mark.parametrize(("batch", "length", "t"), [(2, 40, 17), (1, 600, 170)])
def test_causality(backend, name, batch, length, t):
    inputs = scan_inputs(batch, length, 3, 2, dtype=torch.float32)
    changed = inputs | {name: inputs[name].clone()}
    changed[name][:, t] += 1
    before, after = (selective_scan(**i, backend=backend).y for i in (inputs, changed))
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t:], after[:, t:])


@pytest.mark.parametrize("name", ["u", "delta", "B"])
@pytest.mark.parametrize(("length", "t"), [(40, 17), (600, 170)])
def test_a_nan_reaches_the_output_and_only_later_positions(backend, name, length, t):
    inputs = scan_inputs(1, length, 3, 2, dtype=torch.float32)
    inputs[name] = inputs[name].clone()
    inputs[name][:, t] = torch.nan
    y, last_state = selective_scan(**inputs, backend=backend)
    assert y[:, :t].isfinite().all()
    assert y[:, t:].isnan().all() and last_state.isnan().all()


@pytest.mark.parametrize("first", [20, 200])
def test_a_nan_stays_in_its_packed_sequence(backend, first):
    lengths = [first, 30, 0, 40]
    inputs = scan_inputs(1, sum(lengths), 3, 2, lengths=lengths, dtype=torch.float32)
    clean = run_scan(inputs, backend)
    inputs["u"] = inputs["u"].clone()
    inputs["u"][:, first + 7] = torch.nan
    results = run_scan(inputs, backend)
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[first : first + 30] = False
    for name in ("y", "du", "ddelta", "dz", "dB"):
        assert torch.equal(results[name][:, others], clean[name][:, others]), name
    assert results["y"][:, first + 7 : first + 30].isnan().all()
    rows = torch.tensor([0, 2, 3])
    for name in ("last_state", "dinitial_state"):
        assert torch.equal(results[name][rows], clean[name][rows]), name


def test_a_row_does_not_depend_on_the_others(backend):
    inputs = scan_inputs(4, 37, dtype=torch.float64)
    together = run_scan(inputs, backend, gradients=False)
    for row in range(4):
        alone = {k: inputs[k][row : row + 1] for k in (*ALONG_TIME, "initial_state")}
        got = run_scan(inputs | alone, backend, gradients=False)
        assert_close(got, {k: v[row : row + 1] for k, v in together.items()}, 1e-13)


@pytest.mark.parametrize(
    "options", [{}, {"rule": "zoh"}, {"B": "constant", "C": "constant"}, {"packed": True}], ids=str
)
def test_the_same_bits_for_any_number_of_threads(options, fast):
    """Odd sizes, large enough that torch shares one operation among threads."""
    options = dict(options)
    batch, lengths = (1, [200, 0, 1, 700]) if options.pop("packed", False) else (3, None)
    inputs = scan_inputs(batch, 901 // batch, 127, 5, dtype=torch.float32, lengths=lengths, **options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run_scan(inputs, fast)
        for n in (1, 2, 4, 7):
            torch.set_num_threads(n)
            again = run_scan(inputs, fast)
            assert [name for name in first if not torch.equal(first[name], again[name])] == [], f"{n} threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("options", [{}, {"lengths": [3, 0, 300, 300]}, {"is_complex": True, "rule": "zoh"}], ids=str)
def test_the_same_bits_twice(options, fast):
    inputs = scan_inputs(1, 603, 5, 4, dtype=torch.float32, **options)
    first, again = run_scan(inputs, fast), run_scan(inputs, fast)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_step_returns_a_new_state_and_leaves_the_old_one():
    inputs = scan_inputs(2, 1, z=False)
    state = inputs["initial_state"]
    before = state.clone()
    now = {k: inputs[k][:, 0] for k in ("u", "delta")} | {k: inputs[k] for k in ("A", "B", "C")}
    _, new = selective_scan_step(state, **now)
    assert torch.equal(state, before) and new.data_ptr() != state.data_ptr()


def test_inputs_are_left_as_they_were(fast):
    inputs = scan_inputs(1, 40, lengths=[11, 29], rule="zoh")
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    run_scan(inputs, fast)
    assert all(torch.equal(inputs[k], v) for k, v in before.items())
