"""The portable scan against the recurrence itself: values and gradients, over every option and awkward size."""

from __future__ import annotations

import pytest
import torch
from scan_cases import HERE, assert_close, assert_within_budget, run_scan, scan_inputs, widened

from anymamba import selective_scan
from anymamba.kernels.selective_scan import portable
from anymamba.kernels.selective_scan.portable import splitting

PLAIN = {"D": False, "z": False, "bias": False, "softplus": False, "initial": False}

OPTIONS = {
    "plain": PLAIN,
    "plain-zoh": {**PLAIN, "rule": "zoh"},
    "all": {},
    "zoh": {"rule": "zoh"},
    "complex": {"is_complex": True},
    "complex-zoh": {"is_complex": True, "rule": "zoh"},
    "complex-plain": {**PLAIN, "is_complex": True},
    "constant-B": {"B": "constant"},
    "constant-C": {"C": "constant", "rule": "zoh"},
    "constant-both": {"B": "constant", "C": "constant"},
    "constant-both-complex-zoh": {"B": "constant", "C": "constant", "is_complex": True, "rule": "zoh"},
    "constant-B-groups-C": {"B": "constant", "C": 2},
    "groups": {"B": 3, "C": 3},
    "groups-complex": {"B": 3, "C": 3, "is_complex": True, "rule": "zoh"},
    "one-group-B": {"B": 1, "C": 2},
    "selective-B-groups-C": {"B": "selective", "C": 3, "rule": "zoh"},
    "groups-B-selective-C": {"B": 6, "C": "selective"},
    "no-D": {"D": False},
    "no-z": {"z": False},
    "no-bias": {"bias": False},
    "no-softplus": {"softplus": False},
    "bias-without-softplus": {"softplus": False, "bias": True, "rule": "zoh"},
    "no-initial-state": {"initial": False},
    "packed": {"batch": 1, "lengths": [7, 0, 11, 1]},
    "packed-zoh-zeros": {"batch": 1, "lengths": [0, 1, 1, 17, 0], "rule": "zoh", "initial": False},
    "packed-complex": {"batch": 1, "lengths": [3, 16, 0], "is_complex": True, "rule": "zoh"},
    "packed-groups-constant-B": {"batch": 1, "lengths": [18, 1], "B": "constant", "C": 2},
    "packed-one": {"batch": 1, "lengths": [19]},
}


def compare(inputs: dict, backend: str, factor: float = 2) -> None:
    """Within the budget in the precision of the inputs."""
    exact = run_scan(widened(inputs), "reference")
    assert_within_budget(run_scan(inputs, backend), run_scan(inputs, "reference"), exact, factor)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_in_float32(options, fast):
    compare(scan_inputs(**options, dtype=torch.float32), fast)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_in_float64(options, fast):
    inputs = scan_inputs(**options)
    assert_close(run_scan(inputs, fast), run_scan(inputs, "reference"), 1e-13)


BLOCK = portable.split(2, 6, 4)[1]  # steps of a block where there are several rows


@pytest.mark.parametrize("length", [0, 1, 2, 13, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 101])
@pytest.mark.parametrize(
    "options", [{}, {"rule": "zoh", "is_complex": True, "C": "constant"}, {"B": 2, "C": 2, **PLAIN}]
)
def test_lengths_around_the_block(length, options, fast):
    compare(scan_inputs(length=length, **options, dtype=torch.float32), fast)


@pytest.mark.parametrize("rest", ["nothing", "one step", "segments", "segments and steps", "less than a block"])
@pytest.mark.parametrize(
    "options",
    [
        {"rule": "zoh"},
        {"is_complex": True, "B": "constant"},
        {"packed": True},
        {"packed": True, "is_complex": True, "rule": "zoh"},
    ],
    ids=["real", "complex", "packed", "packed-complex"],
)
def test_a_single_narrow_row_is_cut_into_segments(rest, options):
    d_inner, d_state = 3, 2
    segments, steps = portable.split(1, d_inner, d_state)
    assert segments > 1, "the shape no longer reaches the code that this test is for"
    block = segments * steps
    length = {
        "nothing": block,
        "one step": block + 1,
        "segments": block + 2 * steps,
        "segments and steps": block + 3 * steps + 5,
        "less than a block": block - 1,
    }[rest]
    options = dict(options)
    if options.pop("packed", False):
        first = [steps - 1, 1, 0, steps, steps + 1, 2 * steps]
        options["lengths"] = [*first, length - sum(first)]
    inputs = scan_inputs(1, length, d_inner, d_state, **options)
    assert_close(run_scan(inputs, "portable"), run_scan(inputs, "reference"), 1e-12)


@pytest.mark.parametrize("segments_left", [0, 1])
def test_a_packed_sequence_that_spans_blocks_of_segments(segments_left):
    segments, steps = portable.split(1, 3, 2)
    lengths = [2 * segments * steps + 7, 0, 1, segments_left * steps + 3]
    inputs = scan_inputs(1, sum(lengths), 3, 2, lengths=lengths)
    assert_close(run_scan(inputs, "portable"), run_scan(inputs, "reference"), 1e-12)


@pytest.mark.parametrize("d_state", [1, 5, 16, 300])
@pytest.mark.parametrize("d_inner", [1, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_sizes(batch, d_inner, d_state, fast):
    compare(scan_inputs(batch, 37, d_inner, d_state, dtype=torch.float32), fast)


@pytest.mark.parametrize("d_state", [5, 40])
def test_many_rows_are_worked_on_in_slices(monkeypatch, d_state):
    monkeypatch.setattr(splitting, "BLOCK", 2 * 70 * d_state * portable.split(5, 70, d_state)[1])  # two rows at a time
    inputs = scan_inputs(5, 33, 70, d_state, z=False, dtype=torch.float32)
    compare(
        inputs, "portable", factor=4
    )  # sums over many states run in the order of the matrix product, not in a tree's


@pytest.mark.parametrize(("batch", "length"), [(1, 1100), (3, 90)])
@pytest.mark.parametrize("options", [{}, {"is_complex": True, "rule": "zoh", "B": "constant"}], ids=["real", "complex"])
def test_several_spans(monkeypatch, batch, length, options):
    segments, steps = portable.split(batch, 3, 2)
    monkeypatch.setattr(splitting, "SPAN", 2 * segments * steps * batch * 3)  # two blocks in a span
    inputs = scan_inputs(batch, length, 3, 2, **options)
    assert_close(run_scan(inputs, "portable"), run_scan(inputs, "reference"), 1e-12)


@pytest.mark.parametrize("options", [{}, {"is_complex": True, "rule": "zoh", "B": "constant"}, {"B": 2, "C": 2}])
def test_empty_batch(options, fast):
    results = run_scan(scan_inputs(batch=0, **options, dtype=torch.float32), fast)
    assert results["y"].shape == (0, 19, 6) and results["last_state"].shape == (0, 6, 4)
    assert results["dA"].abs().max() == 0 and results["dD"].abs().max() == 0


def test_empty_length_returns_the_initial_state(backend):
    inputs = scan_inputs(length=0)
    results = run_scan(inputs, backend)
    assert torch.equal(results["last_state"], inputs["initial_state"])
    assert results["y"].shape == (2, 0, 6)
    assert results["dA"].abs().max() == 0


def test_nothing_has_gradients_of_zero(backend):
    """Also without an initial state: what is empty belongs to the graph."""
    inputs = scan_inputs(length=0, initial=False, dtype=torch.float32)
    leaves = [inputs[k].requires_grad_() for k in ("u", "delta", "A", "B", "C")]
    y, last_state = selective_scan(**inputs, backend=backend)
    assert y.requires_grad and y.shape == (2, 0, 6)
    gradients = torch.autograd.grad(y.sum() + last_state.sum(), leaves)
    assert all(g.shape == leaf.shape and not g.any() for g, leaf in zip(gradients, leaves, strict=True))


@pytest.mark.parametrize("lengths", [[0], [0, 0]])
def test_empty_sequences_only(backend, lengths):
    inputs = scan_inputs(batch=1, length=0, lengths=lengths)
    results = run_scan(inputs, backend)
    assert torch.equal(results["last_state"], inputs["initial_state"])
    assert results["y"].shape == (1, 0, 6)
    generator = torch.Generator().manual_seed(1)  # that of run_scan, where y takes none of its numbers
    dlast_state = torch.randn(results["last_state"].shape, generator=generator, dtype=torch.float64, device="cpu")
    assert torch.equal(results["dinitial_state"].cpu(), dlast_state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"is_complex": True, "rule": "zoh"}, {"B": "constant", "C": 2}, {"batch": 1, "lengths": [7, 0, 12]}]
)
def test_half_precision_inputs_keep_a_float32_state(dtype, options, fast):
    inputs = scan_inputs(**options, dtype=dtype)
    compare(inputs, fast)
    results = run_scan(inputs, fast)
    assert results["last_state"].dtype == (torch.complex64 if options.get("is_complex") else torch.float32)
    assert results["y"].dtype == dtype == results["du"].dtype == results["dz"].dtype


def test_a_half_precision_state_would_fade_where_ours_does_not():
    """At decay 0.999 a bfloat16 state stands still: 0.999 rounds to 1, and small inputs are lost."""
    length = 2000
    inputs = {
        "u": torch.full((1, length, 1), 0.01, dtype=torch.bfloat16),
        "delta": torch.ones(1, length, 1, dtype=torch.bfloat16),
        "A": torch.full((1, 1), -0.001),
        "B": torch.ones(1, 1),
        "C": torch.ones(1, 1),
    }
    u = inputs["u"][0, 0, 0].double()
    want = u * (1 - torch.exp(torch.tensor(-0.001 * length, dtype=torch.float64))) / -torch.expm1(torch.tensor(-0.001))
    _, state = selective_scan(**inputs)
    assert abs(state.item() - want.item()) < 1e-3 * want.item()


MIXED = {
    "autocast-like": {"u": torch.bfloat16, "delta": torch.bfloat16, "B": torch.float32, "z": torch.bfloat16},
    "delta wider": {"u": torch.float16, "delta": torch.float32},
    "A wider": {"A": torch.float64},
    "A narrow": {"A": torch.bfloat16, "D": torch.bfloat16, "delta_bias": torch.float16, "initial_state": torch.float16},
    "B and C differ": {"B": torch.bfloat16, "C": torch.float64},
    "state wider": {"initial_state": torch.float64},
}


@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("lengths", [None, [3, 0, 16]], ids=["batch", "packed"])
def test_mixed_dtypes(dtypes, lengths, fast):
    inputs = scan_inputs(batch=1, dtype=torch.float32, lengths=lengths)
    inputs |= {name: inputs[name].to(dtype) for name, dtype in dtypes.items()}
    compare(inputs, fast)
    results = run_scan(inputs, fast)
    for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"):
        assert results[f"d{name}"].dtype == inputs[name].dtype, name


def test_views_that_are_not_contiguous(fast):
    inputs = scan_inputs(dtype=torch.float32)
    strided = {
        k: v.transpose(-1, -2).contiguous().transpose(-1, -2) if isinstance(v, torch.Tensor) and v.ndim > 1 else v
        for k, v in inputs.items()
    }
    got = run_scan(strided, fast)
    assert_close(got, run_scan(inputs, fast), 1e-6)
    assert got["y"].is_contiguous() and got["last_state"].is_contiguous()


@pytest.mark.parametrize("is_complex", [True])
def test_lazy_conjugate_and_negative_views(is_complex, backend):
    inputs = scan_inputs(is_complex=is_complex)
    lazy = inputs | {"B": inputs["B"].conj(), "A": inputs["A"].conj(), "u": inputs["B"].conj().imag[..., :1] * 0 + 1}
    lazy["u"] = torch.complex(inputs["u"], inputs["u"]).conj().imag  # a lazy negation
    assert lazy["B"].is_conj() and lazy["u"].is_neg()
    plain = lazy | {k: lazy[k].resolve_conj().resolve_neg() for k in ("A", "B", "u")}
    assert_close(run_scan(lazy, backend), run_scan(plain, "reference"), 1e-12)


def test_lazy_negative_views(backend):
    inputs = scan_inputs()
    lazy = inputs | {k: torch.complex(inputs[k], inputs[k]).conj().imag for k in ("u", "A", "B", "D", "initial_state")}
    assert all(lazy[k].is_neg() for k in ("u", "A", "B"))
    plain = {k: v.resolve_neg() if isinstance(v, torch.Tensor) else v for k, v in lazy.items()}
    assert_close(run_scan(lazy, backend), run_scan(plain, "reference"), 1e-12)


def test_complex_is_twice_the_real_part_of_the_conjugate_pair():
    """The implied partners made explicit: a complex scan of n states is one of 2n, B and C conjugate, without the 2."""
    inputs = scan_inputs(is_complex=True, z=False, D=False)
    y = run_scan(inputs, "portable", gradients=False)["y"]
    pair = {k: torch.cat([inputs[k], inputs[k].conj()], -1) for k in ("A", "B", "C", "initial_state")}
    doubled = run_scan(inputs | pair, "portable", gradients=False)["y"]
    assert torch.allclose(doubled, 2 * y, rtol=1e-12)


def test_the_recurrence_written_by_hand():
    """The oracle itself, against scalars: h = exp(delta A) h + delta B u, y = (C h + D u) silu(z)."""
    from math import exp, expm1, log1p

    u, delta, z = [0.5, -1.0], [0.2, -0.3], [1.0, -2.0]
    A, B, C, D, bias, h0 = -0.7, 1.5, 0.8, 0.3, 0.1, 0.25
    for rule in ("euler", "zoh"):
        h, ys = h0, []
        for t in range(2):
            step = log1p(exp(delta[t] + bias))
            weight = step if rule == "euler" else expm1(step * A) / A
            h = exp(step * A) * h + weight * B * u[t]
            ys.append((C * h + D * u[t]) * z[t] / (1 + exp(-z[t])))

        def tensor(values):
            return torch.tensor(values, dtype=torch.float64)

        for name in ("portable", HERE.type, "reference"):
            results = run_scan(
                {
                    "u": tensor(u).view(1, 2, 1),
                    "delta": tensor(delta).view(1, 2, 1),
                    "A": tensor([[A]]),
                    "B": tensor([[B]]),
                    "C": tensor([[C]]),
                    "D": tensor([D]),
                    "z": tensor(z).view(1, 2, 1),
                    "delta_bias": tensor([bias]),
                    "delta_softplus": True,
                    "b_discretization": rule,
                    "initial_state": tensor([[[h0]]]),
                    "cu_seqlens": None,
                },
                name,
                gradients=False,
            )
            assert torch.allclose(results["y"].flatten(), tensor(ys), rtol=1e-14)
            assert abs(results["last_state"].item() - h) < 1e-14


def test_zero_order_hold_near_zero_does_not_cancel():
    """(exp(x) - 1) / A at steps from 1e-12 to 1: relative error of the increment at one rounding's size."""
    steps = torch.logspace(-12, 0, 200, dtype=torch.float32).view(200, 1, 1)
    inputs = {"u": torch.ones_like(steps), "delta": steps, "A": torch.tensor([[-1.0]]), "B": torch.ones(1, 1)}
    inputs |= {"C": torch.ones(1, 1), "b_discretization": "zoh"}
    y, _ = selective_scan(**inputs)
    want = -torch.expm1(-steps.double())
    assert ((y.double() - want) / want).abs().max() < 4 * torch.finfo(torch.float32).eps
