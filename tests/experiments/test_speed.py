"""Speed: the unfused scan, how times are taken, what is read from them, a toy run, and the report's text."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from anymamba.experiments import load_experiment
from anymamba.experiments.experiment import SCALES as SCALE_NAMES
from anymamba.experiments.experiment import Record, Results
from anymamba.experiments.results import as_json
from anymamba.experiments.running import run_experiment
from anymamba.experiments.speed import timing, whole_models
from anymamba.experiments.speed.arms import OPERATORS, PAPER, PASSES, SCALES, TOY, OperatorSettings
from anymamba.experiments.speed.operators import UNFUSED_COPIES, associative_scan, operators, scan, unfused_scan
from anymamba.experiments.speed.reading import Crossing, crossings, faster_from, slope
from anymamba.experiments.speed.report import duel, number, paper_ratio, within
from anymamba.experiments.speed.timing import Candidate, compare, estimated, take_turns
from anymamba.models.language_model import LanguageModel
from anymamba.ops.selective_scan import selective_scan

EXPERIMENT = load_experiment("speed")
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 31, 32, 33])
def test_the_associative_scan_is_the_recurrence(length):
    decay, drive = torch.rand(2, length, 3, 4, dtype=torch.float64), torch.randn(2, length, 3, 4, dtype=torch.float64)
    h, wanted = torch.zeros(2, 3, 4, dtype=torch.float64), []
    for t in range(length):
        h = decay[:, t] * h + drive[:, t]
        wanted.append(h)
    got = associative_scan(decay, drive)
    assert got.shape == drive.shape
    if length:
        torch.testing.assert_close(got, torch.stack(wanted, 1), rtol=1e-12, atol=1e-12)


def test_the_unfused_and_the_fused_scan_are_the_same_function():
    u, delta = torch.randn(2, 2, 37, 6)
    B, C = torch.randn(2, 2, 37, 4)
    A, D = -torch.rand(6, 4), torch.randn(6)
    wanted = selective_scan(u, delta, A, B, C, D, delta_softplus=True).y
    torch.testing.assert_close(unfused_scan(u, delta, A, B, C, D), wanted, rtol=1e-4, atol=1e-5)
    settings = OperatorSettings(19, 8, "float32", TOY, d_state=4, d_head=4)
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        out = scan(settings, 19, CPU, fused=fused)()
        results.append(out.y if fused else out)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_every_operator_gives_what_it_was_given_in_shape_and_dtype():
    settings = OperatorSettings(0, 8, "bfloat16", TOY, d_state=4, d_head=4)
    with torch.no_grad():
        for name, candidate in operators(settings, CPU).items():
            out: Any = candidate.prepare(24)()
            y = getattr(out, "y", out)
            assert y.dtype == torch.bfloat16 and y.isfinite().all()
            assert tuple(y.shape) == ((1, 2, 24, 4) if name == "attention" else (1, 24, 8))


def test_memory_estimates_grow_with_the_length_and_the_states():
    by_name = operators(OperatorSettings(0, 256, "float32", TOY), CPU)
    assert set(by_name) == set(OPERATORS)
    for candidate in by_name.values():
        assert candidate.n_bytes(1 << 16) - candidate.n_bytes(1 << 15) == candidate.n_bytes(
            1 << 15
        ) - candidate.n_bytes(0)
    assert by_name["unfused"].n_bytes(1 << 17) == UNFUSED_COPIES * 2 * 2**30


def test_the_unfused_scan_holds_what_is_said():
    """Its tensors of (length, channels, states), counted while they live."""
    shape = (1, 1024, 4, 8)
    decay, drive = torch.rand(shape), torch.rand(shape)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        associative_scan(decay, drive)
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 1 * drive.nbytes < peak <= (UNFUSED_COPIES - 2) * drive.nbytes  # decay and drive are the other two


# ------------------------------------------------------------------------------------------------- timing


class Clock:
    """A clock that stands still but for what calls take."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.log = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name, seconds):
        def run():
            self.log.append(name)
            self.now += next(seconds) if hasattr(seconds, "__next__") else seconds

        return run

    def candidate(self, name, seconds_at, exponent=1.0, n_bytes=lambda length: 0):
        return Candidate(lambda length: self.call((name, length), seconds_at(length)), n_bytes, exponent)


LIMITS = replace(TOY, call_seconds=10.0, candidate_seconds=3.0, most_turns=4, turn_seconds=0.0)


def test_candidates_take_turns_and_the_smallest_time_counts(monkeypatch):
    clock = Clock(monkeypatch)
    slow, fast = clock.call("slow", iter([2.0, 1.5, 9.0])), clock.call("fast", iter([0.4, 0.3, 0.2, 0.3, 9.0]))
    turns = {name: lambda call=call: timing.seconds_of(call, 1, CPU) for name, call in (("a", slow), ("b", fast))}
    found = take_turns(turns, LIMITS)
    assert clock.log == ["slow", "fast", "slow", "fast", "fast", "fast"]  # 3.5 s are spent; four turns are the most
    assert (found["a"].seconds, found["a"].turns) == (1.5, 2)
    assert found["b"].seconds == pytest.approx(0.2) and found["b"].turns == 4


def test_short_calls_are_repeated_within_a_turn(monkeypatch):
    clock = Clock(monkeypatch)
    candidate = clock.candidate("x", lambda length: length * 1e-3)
    limits = replace(LIMITS, turn_seconds=1.0, least_turns=1, most_turns=1)
    found, calls = compare({"x": candidate}, 64, limits, CPU)
    assert found["x"].seconds == pytest.approx(0.064) and set(calls) == {"x"}
    assert clock.log.count(("x", 64)) == 15  # of 0.064 s


def test_what_would_take_too_long_never_runs_at_its_length(monkeypatch):
    clock = Clock(monkeypatch)
    quadratic = clock.candidate("x", lambda length: (length / 1024) ** 2, exponent=2)
    found = estimated(quadratic, 8192, LIMITS, CPU)  # 64 s
    assert found.missing == "over the time cap" and found.estimated_seconds == pytest.approx(64)
    assert max(length for _, length in clock.log) == 2048
    assert estimated(quadratic, 2048, LIMITS, CPU).missing is None
    clock.log.clear()
    estimated(quadratic, 1 << 20, LIMITS, CPU)
    assert clock.now < 100 and max(length for _, length in clock.log) == 1024  # the next would be 16 s


def test_a_first_call_that_compiles_does_not_put_it_over_the_cap(monkeypatch):
    clock, first = Clock(monkeypatch), itertools.chain([5.0], itertools.repeat(0.001))
    candidate = Candidate(lambda length: clock.call(length, first), lambda length: 0, 1)
    assert estimated(candidate, 4096, LIMITS, CPU).missing is None


def test_what_would_hold_too_much_is_never_made():
    def prepare(length):
        raise AssertionError("it was made")

    candidate = Candidate(prepare, lambda length: 2 * LIMITS.memory_bytes, 1)
    found, calls = compare({"x": candidate}, 64, LIMITS, CPU)
    assert (found["x"].seconds, found["x"].missing, calls) == (None, "over the memory cap", {})


def test_running_out_of_memory_costs_one_candidate_alone():
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = take_turns({"a": full, "b": lambda: 1.0}, replace(LIMITS, seconds_before=0.001))
    assert found["a"].missing == "out of memory" and found["b"].seconds == 1.0
    found, calls = compare({"a": Candidate(lambda length: full, lambda length: 0, 1)}, 64, LIMITS, CPU)
    assert found["a"].missing == "out of memory" and calls == {}


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
@pytest.mark.parametrize("longest", [1, 32])
def test_inputs_that_do_not_fit_cost_one_candidate_alone(error, longest):
    def prepare(length):
        if length > longest:
            raise error
        return lambda: None

    candidates = {"a": Candidate(prepare, lambda length: 0, 1), "b": Candidate(lambda n: lambda: None, lambda n: 0, 1)}
    found, calls = compare(candidates, 64, LIMITS, CPU)
    assert found["a"].missing == "out of memory" and found["a"].seconds is None
    assert found["b"].seconds is not None and set(calls) == {"b"}


def test_other_errors_of_a_candidate_are_not_hidden():
    def prepare(length):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        compare({"a": Candidate(prepare, lambda length: 0, 1)}, 64, LIMITS, CPU)


def test_the_cap_of_memory_is_never_more_than_the_machine_has():
    candidate = Candidate(lambda length: lambda: None, lambda length: 1 << 60, 1)
    assert estimated(candidate, 64, replace(LIMITS, memory_bytes=1 << 61), CPU).missing == "over the memory cap"


def test_all_calls_of_a_turn_are_counted():
    seconds = timing.seconds_of(lambda: time.sleep(0.002), 5, CPU)
    assert 0.002 <= seconds < 0.02


# ------------------------------------------------------------------------------------------------- models


def test_decoding_starts_at_the_stated_context_each_turn(monkeypatch):
    model = LanguageModel(SCALES["toy"].models.transformer)
    with torch.no_grad():
        prompt = whole_models.prompt_of(model, 12)
        prompt()
        seen, step = [], model.step

        def spied(ids, state):
            seen.append(int(state.layers[0].n_seen[0]))
            return step(ids, state)

        monkeypatch.setattr(model, "step", spied)
        turn = whole_models.decoding_turn(prompt, 3, CPU)
        assert turn() > 0 and turn() > 0
    assert seen == [12, 13, 14, 15] * 2


def test_a_training_step_leaves_no_gradients_but_makes_them(monkeypatch):
    model, norms = LanguageModel(SCALES["toy"].models.mamba), []
    zero = model.zero_grad

    def spied(**options):
        norms.append(sum(p.grad.abs().sum().item() for p in model.parameters()))
        zero(**options)

    monkeypatch.setattr(model, "zero_grad", spied)
    with torch.no_grad():
        whole_models.training_step_of(model, 8)()
    assert norms[0] > 0 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("scale", SCALE_NAMES)
def test_models_of_equal_width_and_about_equal_parameters(scale):
    settings = SCALES[scale].models
    n = {}
    for name in ("mamba", "transformer"):
        config = getattr(settings, name)
        n[name] = sum(p.numel() for p in LanguageModel(config, device="meta").parameters())
        assert config.d_model == settings.mamba.d_model and config.vocab_size == settings.mamba.vocab_size
    assert n["mamba"] == pytest.approx(n["transformer"], rel=0.1)
    assert settings.transformer.mixers == ("attention", "mlp") and settings.transformer.attention.positions == "rotary"


# ------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("scale", "lengths", "contexts", "width"), [("cpu", 17, 15, 256), ("gpu", 19, 15, 1024), ("paper", 19, 15, 1024)]
)
def test_lengths_of_the_scales(scale, lengths, contexts, width):
    arms = EXPERIMENT.arms(scale)
    assert [a.name for a in arms] == [f"operators-{1 << i}" for i in range(9, lengths + 1)] + [
        f"models-{1 << i}" for i in range(7, contexts + 1)
    ]
    for arm in arms:
        kind, size = arm.name.split("-")
        assert (arm.settings.length if kind == "operators" else arm.settings.context) == int(size)
        assert arm.settings.dtype == ("float32" if scale == "cpu" else "bfloat16")
        if kind == "operators":
            assert (arm.settings.width, arm.settings.d_state) == (width, 16)
    assert {arm.seeds for arm in arms} == {3 if scale == "cpu" else 1}


def test_the_papers_numbers():
    assert list(PAPER) == [1 << i for i in range(9, 20)]
    assert paper_ratio("attention", 1 << 15) == pytest.approx(7.1, abs=0.05)
    assert paper_ratio("convolution", 1 << 17) == pytest.approx(3.4, abs=0.05)
    assert paper_ratio("unfused", 1 << 14) == pytest.approx(36, abs=0.5)
    assert paper_ratio("unfused", 1 << 18) is None and paper_ratio("attention", 100) is None


# ------------------------------------------------------------------------------------------------- reading


def test_crossings_of_power_laws_are_where_they_are():
    sizes = [1 << i for i in range(9, 16)]
    (only,) = crossings({n: n / 3000 for n in sizes})
    assert only.length == pytest.approx(3000) and only.faster
    (only,) = crossings({n: (3000 / n) ** 2 for n in sizes})
    assert only.length == pytest.approx(3000) and not only.faster
    assert crossings(dict.fromkeys(sizes, 2.0)) == crossings(dict.fromkeys(sizes, 0.5)) == crossings({8: 1.0}) == []
    up_down = crossings({1: 0.5, 4: 2.0, 16: 0.5})
    assert [c.faster for c in up_down] == [True, False] and up_down[0].length == pytest.approx(2)
    assert crossings({512: 1.0, 1024: 2.0}) == []
    assert crossings({512: 0.25, 1024: 1.0}) == [Crossing(pytest.approx(1024), True)]


def test_the_length_from_which_on_it_is_faster():
    assert faster_from({512: 2.0, 1024: 3.0}) == 512
    assert faster_from({512: 2.0, 1024: 0.5}) == math.inf
    assert faster_from({512: 2.0, 1024: 0.5, 2048: 0.5, 4096: 2.0}) == pytest.approx(2048 * 2**0.5)


def test_the_slope():
    assert slope({n: 3 * n**1.5 for n in (8, 16, 64)}) == pytest.approx(1.5)
    assert slope({8: 1.0}) is None


def test_numbers_have_three_digits():
    assert [number(v) for v in (1234.5, 99.96, 12.34, 1.234, 0.01234)] == ["1,234", "100", "12.3", "1.23", "0.0123"]
    assert (number(None), number(math.inf)) == ("", "never")


def test_thresholds_hold_within_their_bounds():
    words = lambda got, least=0.9, most=1.1: within("x", least, most, [1.0, got]).verdict  # noqa: E731
    assert [words(v) for v in (0.89, 0.9, 1.1, 1.11, None)] == ["**fails**", "holds", "holds", "**fails**", "holds"]
    assert words(math.inf, None, 8192) == "**fails**" and words(5, 10, None) == "**fails**"
    assert within("x", 0.9, 1.1, [None, None]).verdict == "not judged"


# ------------------------------------------------------------------------------------------------- running


def test_a_toy_run_and_its_resumption(tmp_path, monkeypatch):
    only, measured = ["operators-32", "operators-64", "models-16"], []
    whole = type(EXPERIMENT).measure

    def measure(self, arm, context):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(arm.name)
        return whole(self, arm, context)

    with monkeypatch.context() as patch:
        patch.setattr(type(EXPERIMENT), "measure", measure)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(EXPERIMENT, "toy", tmp_path, only=only)
        assert measured == ["operators-32", "operators-64"]
        measured[:] = []
        results = run_experiment(EXPERIMENT, "toy", tmp_path, only=only)
        assert measured == ["models-16"]
    charts = {f"{name}.{kind}" for name in ("operators", "ratios", "models") for kind in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == {"arms", "results.json", "report.md"} | charts
    for arm in only[:2]:
        (times,) = results.values(arm, "times")
        assert all(times[name]["seconds"] > 0 and times[name]["turns"] == 2 for name in OPERATORS)
    (times,) = results.values("models-16", "times")
    assert set(times) == set(PASSES)
    for name in PASSES:
        assert all(times[name][model]["seconds"] > 0 for model in ("mamba", "transformer"))


# ------------------------------------------------------------------------------------------------- report


def power(factor, exponent, most=math.inf):
    """A time by length, none beyond a length."""
    return lambda n: factor * n**exponent if n <= most else None


GOOD = {
    "attention": power(1e-9, 2, 1 << 16),
    "convolution": power(5e-6, 1),
    "unfused": power(2e-5, 1, 1 << 16),
    "scan": power(1e-6, 1),
    ("prefill", "mamba"): power(1e-5, 1),
    ("prefill", "transformer"): power(1e-9, 2),
    ("training", "mamba"): power(2e-5, 1),
    ("training", "transformer"): power(1e-5, 1),
    ("decoding", "mamba"): power(1e-3, 0),
    ("decoding", "transformer"): power(1e-5, 0.8),
}


def made_up(times, scale="cpu", backend="cpu", only="", speeds=(1.0, 1.5, 2.0)) -> Results:
    """Results whose times are functions of the length; whole runs are slower by these factors."""
    arms = [arm for arm in EXPERIMENT.arms(scale) if arm.name.startswith(only)]
    planned = tuple(f"{arm.name}-seed{seed}" for arm in arms for seed in range(len(speeds)))

    def timing_of(key, size, speed):
        seconds = times[key](size)
        if seconds is not None:
            return {"seconds": speed * seconds, "turns": 3, "missing": None}
        caps = {"estimated_seconds": 100.0, "estimated_bytes": 11 * 2**30}
        missing = "over the memory cap" if key == "unfused" else "over the time cap"
        return {"seconds": None, "turns": 0, "missing": missing, **caps}

    records = []
    for arm, (seed, speed) in itertools.product(arms, enumerate(speeds)):
        kind, size = arm.name.split("-")
        if kind == "operators":
            values = {"times": {name: timing_of(name, int(size), speed) for name in OPERATORS}}
        else:
            both = ("mamba", "transformer")
            values = {"times": {p: {m: timing_of((p, m), int(size), speed) for m in both} for p in PASSES}}
            values["parameters"] = {"mamba": 1_050_000, "transformer": 1_000_000}
        values["backend"] = backend
        records.append(Record(arm.name, seed, as_json(arm.settings), values, 60.0, "abacus", "2026-01-01"))
    return Results("speed", scale, tuple(records), planned)


def test_the_report_of_a_success():
    text = EXPERIMENT.report(made_up(GOOD))
    assert text.startswith("**6 of 6 thresholds hold.**")
    assert "fail" not in text and "not judged" not in text and "Not as wanted" not in text
    assert "plain torch in chunks" not in text and "Of 3 runs the median" in text
    # 2^9: 1.5e-9 * 2^18 s; ratios are of one run: the speeds cancel
    assert (
        "| 512 | 0.393 | 3.84 | 15.4 | 0.768 | 0.512 (0.512 to 0.512) | 5.00 (5.00 to 5.00) | 20.0 (20.0 to 20.0) |"
        in text
    )
    assert "| 1.65 | 3.00 | 35.0 |" in text  # the paper's at 512
    assert "| 131,072 | over the cap: about 100 s | 983 | over the cap: about 11.0 GiB | 197 |  |" in text
    assert "Mamba has 5.0 % more" in text and "more than 60 s for one call or to hold more than 6 GiB" in text
    assert "| scan: slope of log time over log length, from length 2,048 on | 0.9 to 1.1 | 1.00 | holds |" in text
    assert "faster than attention | at most 8,192 | 1,000 | holds |" in text
    assert "scan takes 1.95 times as long as attention at 512; at about 1,000 it becomes the faster one" in text
    assert (
        "The scan is faster than the unfused scan at every length measured, 512 to 65,536: 20.0 to 20.0 times." in text
    )
    assert (
        "Reading a prompt: Mamba takes 78.1 times as long as Transformer++ at 128; at about 10,000 it becomes" in text
    )
    assert "A training step: Mamba **loses** to Transformer++ at every length measured, 128 to 32,768" in text
    assert "attention: length to the power 2.00 (paper: 1.9" in text
    assert "faster than attention: 1,000 here, about 2,116 in the paper" in text
    assert "A token of Mamba after 32,768 takes 1.00 times as long as after 128." in text


def test_the_report_of_a_failure():
    bad = {
        **GOOD,
        "scan": power(1e-8, 1.8),
        "attention": power(1e-9, 1.9),
        ("decoding", "mamba"): power(1e-3, 0.1),
        ("decoding", "transformer"): power(1e-3, 0.05),
    }
    text = EXPERIMENT.report(made_up(bad))
    assert text.startswith("**0 of 6 thresholds hold.** These fail: scan: slope of log time")
    assert "| 0.9 to 1.1 | 1.80 | **fails** |" in text
    assert "faster than attention | at most 8,192 | never | **fails** |" in text
    assert "The scan **loses** to attention at every length measured, 512 to 131,072" in text
    assert "at about 2,364 it becomes the **slower** one" in text  # 5e-6 n = 1e-8 n^1.8
    assert "never up to 131,072 here" in text
    assert text.count("- Not as wanted: ") == 6
    assert "after the longest context over that after the shortest: 1.74, wanted at most 1.1" in text
    assert "A token after a context: Mamba **loses** to" in text
    text = EXPERIMENT.report(made_up({**GOOD, "attention": power(1e-5, 1)}))
    assert "faster than attention: 512 (the shortest measured) here" in text


def test_the_worst_run_counts():
    results = made_up(GOOD)
    for record in results.of("operators-4096")[1:2]:
        record.values["times"]["unfused"]["seconds"] /= 4  # one run of three: the median is as before
    text = EXPERIMENT.report(results)
    assert "| unfused scan over scan, from length 2,048 on, least | at least 10 | 5.00 to 20.0 | **fails** |" in text
    assert "20.0 (5.00 to 20.0)" in text
    results = made_up(GOOD)
    for length, factor in ((2048, 3.0), (131072, 0.5)):
        results.of(f"operators-{length}")[1].values["times"]["scan"]["seconds"] *= factor
    text = EXPERIMENT.report(results)
    assert "| scan: slope of log time over log length, from length 2,048 on | 0.9 to 1.1 | 0.7" in text
    assert "to 1.00 | **fails** |" in text and "every run must hold them" in text


def test_a_backend_that_is_not_fused_is_named():
    text = EXPERIMENT.report(made_up(GOOD, scale="gpu", backend="portable", speeds=(1.0,)))
    assert "'portable' is plain torch in chunks, not a fused kernel" in text and "Of 3 runs" not in text


def test_the_report_of_half_a_run():
    text = EXPERIMENT.report(made_up(GOOD, only="operators-1"))  # 1024, 16384, 131072
    assert text.startswith("**4 of 6 thresholds hold.** 2 cannot be judged") and "## Models" not in text
    text = EXPERIMENT.report(made_up(GOOD, only="models-512"))
    assert text.startswith("**0 of 6 thresholds hold.** 6 cannot be judged") and "## Operators" not in text
    assert "Mamba takes 19.5 times as long as" in text or "it takes 19.5 times as long" in text
    empty = Results("speed", "cpu", ())
    assert EXPERIMENT.report(empty) == "Nothing has been measured yet." and EXPERIMENT.figures(empty) == {}


def test_contexts_too_close_together_are_not_judged():
    text = EXPERIMENT.report(made_up(GOOD, only="models-1"))  # 128, 1024, 16384: far enough
    assert text.startswith("**2 of 6 thresholds hold.** 4 cannot be judged")
    short = {**GOOD, ("decoding", "transformer"): power(1e-5, 0.8, 1024)}
    text = EXPERIMENT.report(made_up(short, only="models-1"))
    assert text.startswith("**1 of 6 thresholds hold.** 5 cannot be judged")


def test_words_of_a_duel():
    assert duel("Ours", "theirs", {}) == []
    assert duel("Ours", "theirs", {64: 3.0}) == ["Ours is faster than theirs at 64: 3.00 times."]
    (line,) = duel("Ours", "theirs", {64: 2.0, 256: 0.5})
    assert line == (
        "Ours is faster than theirs at 64; at about 128 it becomes the **slower** one; "
        "at 256 it takes 2.00 times as long."
    )


def test_the_figures_are_log_log_and_name_what_they_show():
    figures = EXPERIMENT.figures(made_up(GOOD))
    assert set(figures) == {"operators", "ratios", "models"}
    for figure in figures.values():
        for axes in figure.axes:
            assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
            assert axes.get_xlabel() and axes.get_ylabel() and axes.get_legend()
    (axes,) = figures["operators"].axes
    assert "paper (A100, 1,024 channels)" in [text.get_text() for text in axes.get_legend().get_texts()]
    (attention,) = (line for line in axes.get_lines() if line.get_label() == "attention")
    assert list(attention.get_xdata()) == [1 << i for i in range(9, 17)]  # not what is over the cap
    assert len(figures["models"].axes) == 3
    assert set(EXPERIMENT.figures(made_up(GOOD, only="models"))) == {"models"}
