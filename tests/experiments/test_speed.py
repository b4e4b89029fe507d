"""Speed: the unfused scan, how times are taken, what is read from them, thresholds, tables and charts."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from anymamba.experiments import load_experiment
from anymamba.experiments.speed import timing, whole_models
from anymamba.experiments.speed.arms import (
    OPERATORS,
    PAPER,
    PAPER_MEMORY,
    PAPER_THROUGHPUT,
    PASSES,
    SCALES,
    TOY,
    OperatorSettings,
)
from anymamba.experiments.speed.findings import number, paper_ratios
from anymamba.experiments.speed.operators import UNFUSED_COPIES, associative_scan, operators, scan, unfused_scan
from anymamba.experiments.speed.reading import above_from, crossings, slope
from anymamba.experiments.speed.timing import Candidate, compare, estimated, take_turns
from anymamba.lab.experiment import SCALES as SCALE_NAMES
from anymamba.lab.experiment import Context, Results
from anymamba.models.language_model import LanguageModel
from anymamba.ops.selective_scan import selective_scan
from tests.experiments.conftest import made_up, measured, rows, verdicts

EXPERIMENT = load_experiment("speed")
CPU = torch.device("cpu")
CONTEXT = Context(CPU, 0, lambda *told: None)


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
    found = take_turns(turns, LIMITS, CONTEXT)
    assert clock.log == ["slow", "fast", "slow", "fast", "fast", "fast"]  # 3.5 s are spent; four turns are the most
    assert (found["a"].seconds, found["a"].turns) == (1.5, 2)
    assert found["b"].seconds == pytest.approx(0.2) and found["b"].turns == 4


def test_short_calls_are_repeated_within_a_turn(monkeypatch):
    clock = Clock(monkeypatch)
    candidate = clock.candidate("x", lambda length: length * 1e-3)
    limits = replace(LIMITS, turn_seconds=1.0, least_turns=1, most_turns=1)
    found, calls = compare({"x": candidate}, 64, limits, CONTEXT)
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
    found, calls = compare({"x": candidate}, 64, LIMITS, CONTEXT)
    assert (found["x"].seconds, found["x"].missing, calls) == (None, "over the memory cap", {})


def test_running_out_of_memory_costs_one_candidate_alone():
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = take_turns({"a": full, "b": lambda: 1.0}, replace(LIMITS, seconds_before=0.001), CONTEXT)
    assert found["a"].missing == "out of memory" and found["b"].seconds == 1.0
    found, calls = compare({"a": Candidate(lambda length: full, lambda length: 0, 1)}, 64, LIMITS, CONTEXT)
    assert found["a"].missing == "out of memory" and calls == {}


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
@pytest.mark.parametrize("longest", [1, 32])
def test_inputs_that_do_not_fit_cost_one_candidate_alone(error, longest):
    def prepare(length):
        if length > longest:
            raise error
        return lambda: None

    candidates = {"a": Candidate(prepare, lambda length: 0, 1), "b": Candidate(lambda n: lambda: None, lambda n: 0, 1)}
    found, calls = compare(candidates, 64, LIMITS, CONTEXT)
    assert found["a"].missing == "out of memory" and found["a"].seconds is None
    assert found["b"].seconds is not None and set(calls) == {"b"}


def test_other_errors_of_a_candidate_are_not_hidden():
    def prepare(length):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        compare({"a": Candidate(prepare, lambda length: 0, 1)}, 64, LIMITS, CONTEXT)


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
        tokens = whole_models.Tokens(prompt, 3)
        assert tokens.turn(None) > 0 and tokens.turn(None) > 0
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
    arms = [arm for arm in EXPERIMENT.arms(scale) if arm.name.startswith(("operators-", "models-"))]
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
    attention, convolution, unfused = map(paper_ratios, OPERATORS[:3])
    assert attention[1 << 15] == pytest.approx(7.1, abs=0.05)
    assert convolution[1 << 17] == pytest.approx(3.4, abs=0.05)
    assert unfused[1 << 14] == pytest.approx(36, abs=0.5)
    assert 1 << 18 not in unfused and paper_ratios("scan")[1 << 19] == 1


# ------------------------------------------------------------------------------------------------- reading


def test_crossings_of_power_laws_are_where_they_are():
    sizes = [1 << i for i in range(9, 16)]
    assert (
        crossings({n: n / 3000 for n in sizes})
        == crossings({n: (3000 / n) ** 2 for n in sizes})
        == [pytest.approx(3000)]
    )
    assert crossings(dict.fromkeys(sizes, 2.0)) == crossings(dict.fromkeys(sizes, 0.5)) == crossings({8: 1.0}) == []
    assert crossings({1: 0.5, 4: 2.0, 16: 0.5}) == [pytest.approx(2), pytest.approx(8)]
    assert crossings({512: 1.0, 1024: 2.0}) == [] and crossings({512: 0.25, 1024: 1.0}) == [pytest.approx(1024)]


def test_the_length_from_which_on_it_is_faster():
    assert above_from({512: 2.0, 1024: 3.0}) == 512
    assert above_from({512: 2.0, 1024: 0.5}) == math.inf
    assert above_from({512: 2.0, 1024: 0.5, 2048: 0.5, 4096: 2.0}) == pytest.approx(2048 * 2**0.5)


def test_the_slope():
    assert slope({n: 3 * n**1.5 for n in (8, 16, 64)}) == pytest.approx(1.5)
    assert slope({8: 1.0}) is None


def test_numbers_have_three_digits():
    assert [number(v) for v in (1234.5, 99.96, 12.34, 1.234, 0.01234)] == ["1,234", "100", "12.3", "1.23", "0.0123"]
    assert number(math.inf) == "never"


# ------------------------------------------------------------------------------------------------- results


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


def results_of(times, scale="cpu", only="", speeds=(1.0, 1.5, 2.0)) -> Results:
    """Results whose times are functions of the length; whole runs are slower by these factors."""

    def timing_of(key, size, speed):
        seconds = times[key](size)
        if seconds is not None:
            return {"seconds": speed * seconds, "turns": 3, "missing": None}
        caps = {"estimated_seconds": 100.0, "estimated_bytes": 11 * 2**30}
        missing = "over the memory cap" if key == "unfused" else "over the time cap"
        return {"seconds": None, "turns": 0, "missing": missing, **caps}

    def values(name, speed):
        kind, size = name.split("-")
        if kind == "operators":
            return {"times": {o: timing_of(o, int(size), speed) for o in OPERATORS}, "backend": "cpu"}
        both = ("mamba", "transformer")
        found = {p: {m: timing_of((p, m), int(size), speed) for m in both} for p in PASSES}
        return {"times": found, "backend": "cpu", "parameters": {"mamba": 1_050_000, "transformer": 1_000_000}}

    arms = [arm.name for arm in EXPERIMENT.arms(scale) if arm.name.startswith(only)]
    return made_up(EXPERIMENT, scale, {name: [values(name, speed) for speed in speeds] for name in arms})


BAD = {
    **GOOD,
    "scan": power(1e-8, 1.8),
    "attention": power(1e-9, 1.9),
    ("decoding", "mamba"): power(1e-3, 0.1),
    ("decoding", "transformer"): power(1e-3, 0.05),
}


def test_a_report_of_a_gpu_says_which_calls_came_from_python():
    results = results_of(GOOD, "gpu", only="operators", speeds=(1.0,))
    assert "Called from" not in EXPERIMENT.sections(results)["Operators"]
    for record in results.records:
        record.values["backend"] = "cuda"
    words = (
        "Called from Python, whose time is most of that of short rows: attention, FFT convolution, scan, unfused scan."
    )
    assert words in EXPERIMENT.sections(results)["Operators"]
    for record in results.records:
        for timing_of in record.values["times"].values():
            timing_of["recorded"] = True
    assert "Calls were replays of CUDA graphs" in EXPERIMENT.sections(results)["Operators"]


def test_thresholds_of_a_success():
    results = results_of(GOOD)
    assert verdicts(EXPERIMENT, results) == ["holds"] * 6
    for got, wanted in zip(measured(EXPERIMENT, results), [1.0, 20.0, 5.0, 1000, 1.0, 256**0.8], strict=True):
        assert got == pytest.approx([wanted] * 3)  # ratios are of one run: its speed does not count


def test_thresholds_of_a_failure():
    results = results_of(BAD)
    assert verdicts(EXPERIMENT, results) == ["fails"] * 6
    got = [min(values) for values in measured(EXPERIMENT, results)]
    assert got[0] == pytest.approx(1.8) and got[3] == math.inf and got[4] == pytest.approx(256**0.1)


def test_the_worst_run_counts():
    results = results_of(GOOD)
    results.of("operators-4096")[1].values["times"]["unfused"]["seconds"] /= 4  # one run of three
    assert verdicts(EXPERIMENT, results) == ["holds", "fails", *["holds"] * 4]
    assert "20.0 (5.00 to 20.0)" in rows(EXPERIMENT.sections(results)["Operators"])[3]
    results = results_of(GOOD)
    for length, factor in ((2048, 3.0), (131072, 0.5)):
        results.of(f"operators-{length}")[1].values["times"]["scan"]["seconds"] *= factor
    assert verdicts(EXPERIMENT, results)[0] == "fails"


@pytest.mark.parametrize(
    ("only", "wanted"),
    [
        ("operators-1", [*["holds"] * 4, "not judged", "not judged"]),  # 1024, 16384, 131072
        ("operators-512", ["not judged"] * 6),
        ("models-512", ["not judged"] * 6),
        ("models-1", [*["not judged"] * 4, "holds", "holds"]),  # 128, 1024, 16384
    ],
)
def test_thresholds_of_half_a_run(only, wanted):
    assert verdicts(EXPERIMENT, results_of(GOOD, only=only)) == wanted


def test_contexts_too_close_together_are_not_judged():
    short = {**GOOD, ("decoding", "transformer"): power(1e-5, 0.8, 1024)}
    assert verdicts(EXPERIMENT, results_of(short, only="models-1"))[4:] == ["holds", "not judged"]


def test_the_tables_are_beside_the_papers():
    sections = EXPERIMENT.sections(results_of(GOOD))
    names = ("Operators", "Growth", "Models", "Where curves cross")
    operators, growth, models, crossing = (rows(sections[name]) for name in names)
    same = [f"{ratio} ({ratio} to {ratio})" for ratio in ("0.512", "5.00", "20.0")]
    # 2^9: 1.5e-9 * 2^18 s; ratios are of one run: the speeds cancel
    assert operators[0] == ["512", "0.393", "3.84", "15.4", "0.768", *same, "1.65", "3.00", "35.0"]
    assert operators[-1][1:6] == ["over the cap: about 100 s", "983", "over the cap: about 11.0 GiB", "197", ""]
    assert [row[:2] for row in growth] == [
        ["attention", "2.00"],
        *([name, "1.00"] for name in ("FFT convolution", "unfused scan", "scan")),
    ]
    assert models[0][:4] == ["128", "1.92", "0.0246", "0.0128 (0.0128 to 0.0128)"]
    assert crossing[0] == ["attention / scan", "0.512 at 512", "1,000", "65.5 at 65,536", "1,024, 2,116"]
    assert [row[2] for row in crossing[1:]] == ["none", "none", "10,000", "none", "316"]
    shown = EXPERIMENT.sections(results_of(GOOD, only="models-512"))
    assert [name for name, text in shown.items() if text] == ["Models", "Where curves cross"]


def test_the_charts_are_log_log_and_show_what_ran():
    charts = {name: draw(results_of(GOOD)) for name, draw in EXPERIMENT.figures.items()}
    for figure in charts.values():
        for axes in figure.axes:
            assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
            assert axes.get_xlabel() and axes.get_ylabel() and axes.get_legend()
    (axes,) = charts["operators"].axes
    assert "paper (A100, 1,024 channels)" in [text.get_text() for text in axes.get_legend().get_texts()]
    (attention,) = (line for line in axes.get_lines() if line.get_label() == "attention")
    assert list(attention.get_xdata()) == [1 << i for i in range(9, 17)]  # not what is over the cap
    assert len(charts["models"].axes) == 3
    half = {name: draw(results_of(GOOD, only="models")) for name, draw in EXPERIMENT.figures.items()}
    assert [name for name, figure in half.items() if figure is not None] == ["models"]


# ------------------------------------------------------------------------------------------------------ many rows


def with_rows(throughput: dict[str, list[float | None]], memory: dict[str, list[float | None]]):
    """Results at scale gpu with these values for 1, 2, 4, ... rows."""
    values = {}
    for i in range(8):
        values[f"rows-{1 << i}"] = [
            {
                "throughput": {m: {"tokens_per_second": throughput[m][i], "missing": None} for m in throughput},
                "memory": {m: memory[m][i] for m in memory},
                "parameters": {"mamba": 1, "transformer": 1},
                "backend": "cuda",
            }
        ]
    return made_up(EXPERIMENT, "gpu", values)


OF_ROWS: dict[str, list[float | None]] = {"mamba": [6.0] * 8, "transformer": [6.0] * 8}


def published_rows():
    memory = {name: [*own, None, None] for name, own in PAPER_MEMORY.items()}
    return with_rows({name: list(own) for name, own in PAPER_THROUGHPUT.items()}, memory)


def test_many_rows_of_the_paper_hold_and_are_shown():
    results = published_rows()
    assert verdicts(EXPERIMENT, results)[-2:] == ["holds", "holds"]
    sections = EXPERIMENT.sections(results)
    throughput, memory = (rows(sections[name]) for name in ("Generating with many rows", "Memory of a training step"))
    assert throughput[5] == ["32", "1,445", "364", "3.97", "1445", "364"]
    assert throughput[7] == ["128", "1,814", "out of memory", "", "1814", ""]
    assert memory[-1] == ["32", "38.2", "34.5", "38.2", "34.5"] and len(memory) == 6


def test_crossings_name_the_larger_models_and_the_rows_also_where_mamba_loses():
    larger = results_of(GOOD, scale="gpu", only="large-", speeds=(1.0,))
    (crossing,) = [text for name, text in EXPERIMENT.sections(larger).items() if name == "Where curves cross"]
    assert [row[:3] for row in rows(crossing)] == [
        ["reading a prompt, larger models: Transformer++ / Mamba", "0.0128 at 128", "10,000"],
        ["a training step, larger models: Transformer++ / Mamba", "0.500 at 128", "none"],
        ["a token after a context, larger models: Transformer++ / Mamba", "0.485 at 128", "316"],
    ]
    slower = with_rows(
        {"mamba": [50.0 * 4**i for i in range(8)], "transformer": [100.0 * 2**i for i in range(8)]}, OF_ROWS
    )
    crossing = rows(EXPERIMENT.sections(slower)["Where curves cross"])
    assert crossing == [["tokens a second by rows: Mamba / Transformer++", "0.500 at 1", "2.00", "64.0 at 128", ""]]


def test_many_rows_fail_when_mamba_is_slow_or_large():
    slow = {"mamba": [300.0] * 8, "transformer": [200.0] * 8}
    large = {"mamba": [6.0] + [None] * 7, "transformer": [4.0] + [None] * 7}
    assert verdicts(EXPERIMENT, with_rows(slow, large))[-2:] == ["fails", "fails"]
    assert verdicts(EXPERIMENT, made_up(EXPERIMENT, "gpu", {}))[-2:] == ["not judged"] * 2


def test_larger_models_and_rows_are_arms_of_the_gpu():
    names = [arm.name for arm in EXPERIMENT.arms("gpu")]
    assert {"large-2048", "rows-1", "rows-128"} <= set(names)
    assert not any(arm.name.startswith(("large-", "rows-")) for arm in EXPERIMENT.arms("cpu"))
