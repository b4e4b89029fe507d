"""Associative recall: its settings, recall of right and wrong predictors, a toy run, and the report."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from anymamba.data.synthetic.recall import Recall, recall_batch
from anymamba.experiments import load_experiment
from anymamba.experiments.associative_recall.arms import (
    CHOSEN,
    MAMBA_BY_STATE,
    SLOW,
    SYSTEMS,
    TIME_INVARIANT,
    WITHOUT_ATTENTION,
    Settings,
    build_config,
)
from anymamba.experiments.associative_recall.measure import bytes_after_a_row, measure, mixed_batch
from anymamba.experiments.experiment import SCALES, Context, Record, Results
from anymamba.experiments.results import as_json
from anymamba.experiments.running import run_experiment
from anymamba.experiments.synthetic_task import build_model, evaluate
from anymamba.models.mixers import MIXERS

EXPERIMENT = load_experiment("associative-recall")
CONTEXT = Context(torch.device("cpu"), 0, lambda *told: None)


# ------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("scale", SCALES)
def test_arms_of_one_task_differ_in_the_model_alone(scale):
    arms, shared = EXPERIMENT.arms(scale), {}
    for arm in arms:
        settings, system = arm.settings, SYSTEMS[arm.settings.system]
        assert arm.name.startswith(settings.system)
        assert settings.model.layer_mixers == system.mixers and set(system.mixers) <= set(MIXERS)
        assert settings.model.mamba.d_state == system.d_state
        assert settings.model.vocab_size == settings.tasks[0].vocab_size
        assert settings.model.hyena.max_length >= settings.tasks[0].length
        assert (settings.model.attention.positions, settings.model.attention.d_conv) == ("rotary", 4)
        rates = () if scale == "toy" else settings.more_learning_rates
        same = replace(settings, system="", model=arms[0].settings.model, more_learning_rates=rates)
        shared.setdefault((settings.model.d_model, settings.tasks), set()).add(str(same))
    assert all(len(found) == 1 for found in shared.values())


def test_sizes_of_the_scales():
    cpu = EXPERIMENT.arms("cpu")
    assert [arm.name for arm in cpu] == list(SYSTEMS) and {arm.seeds for arm in cpu if arm.name not in SLOW} == {3}
    assert [task.n_pairs for task in cpu[0].settings.tasks][-3:] == [4, 8, 16]
    for scale, widths in (("gpu", {64, 128}), ("paper", {64, 128, 256})):
        arms = EXPERIMENT.arms(scale)
        assert len(arms) == len(SYSTEMS) * 4 * len(widths)
        assert {arm.settings.model.d_model for arm in arms} == widths
        sizes = {(t.length, t.n_pairs, t.vocab_size) for arm in arms for t in arm.settings.tasks}
        assert sizes == {(64, 4, 8192), (128, 8, 8192), (256, 16, 8192), (512, 64, 8192)}


def test_the_systems():
    assert [SYSTEMS[name].d_state for name in MAMBA_BY_STATE] == [4, 16, 64]
    for hybrid, pure in WITHOUT_ATTENTION.items():
        assert SYSTEMS[hybrid].mixers.count("attention") == int(hybrid[-1]) and "attention" not in SYSTEMS[pure].mixers
        assert len(SYSTEMS[hybrid].mixers) == len(SYSTEMS[pure].mixers)
    assert set(TIME_INVARIANT) < set(SYSTEMS)


def test_tasks_that_cannot_be_learned_together():
    settings = EXPERIMENT.arms("toy")[0].settings
    with pytest.raises(ValueError, match="one length and one vocabulary; make an arm for each"):
        replace(settings, tasks=(Recall(1, 16, 16), Recall(1, 32, 16)))


# --------------------------------------------------------------------------------------------------- batches


def test_a_batch_has_about_as_many_queries_of_each_task():
    tasks = (Recall(2, 64, 64), Recall(4, 64, 64), Recall(8, 64, 64), Recall(16, 64, 64))
    ids, labels = mixed_batch(tasks, torch.Generator().manual_seed(0), 30)
    assert ids.shape == labels.shape == (30, 64)
    assert [int((row != -100).sum()) for row in labels] == [2] * 16 + [4] * 8 + [8] * 4 + [16] * 2
    again, _ = mixed_batch(tasks, torch.Generator().manual_seed(0), 30)
    assert torch.equal(ids, again)
    with pytest.raises(ValueError, match="batch_size must give each of 4 tasks a row, got 3; raise it"):
        mixed_batch(tasks, torch.Generator().manual_seed(0), 3)


# ---------------------------------------------------------------------------------------------------- recall


class Reads(nn.Module):
    """Looks the value of each key up in the row itself, for the share of keys that `knows` names."""

    config = SimpleNamespace(vocab_size=64)

    def __init__(self, n_pairs, knows) -> None:
        super().__init__()
        self.n_pairs, self.knows = n_pairs, knows

    def hidden(self, ids):
        said = torch.zeros_like(ids)
        for row, out in zip(ids.tolist(), said, strict=True):
            pairs = dict(zip(row[0 : 2 * self.n_pairs : 2], row[1 : 2 * self.n_pairs : 2], strict=True))
            known = dict(list(pairs.items())[: self.knows])
            out[:] = torch.tensor([known.get(token, 0) for token in row])
        return nn.functional.one_hot(said, 64).float(), None

    def logits(self, x):
        return x


def test_recall_of_a_perfect_and_of_wrong_predictors():
    rows = recall_batch(Recall(4, 64, 64), torch.Generator().manual_seed(0), 50)
    perfect, half, none = (evaluate(Reads(4, knows), rows) for knows in (4, 2, 0))
    assert (perfect.tokens, perfect.sequences, perfect.n_tokens) == (1, 1, 200)
    assert (half.tokens, half.sequences) == (0.5, 0) and none.tokens == 0


def test_bytes_of_state():
    task = Recall(2, 16, 16)

    def size(name, task=task):
        return bytes_after_a_row(build_model(build_config(SYSTEMS[name], 8, task), CONTEXT), task, CONTEXT)

    assert size("mamba-n16") == 2 * 4 * (16 * 16 + 16 * 3)  # scan and convolution, float32, two blocks
    assert size("mamba-n64") - size("mamba-n4") == 2 * 4 * 16 * 60
    assert size("mamba-n16", Recall(2, 64, 16)) == size("mamba-n16")
    assert size("attention", Recall(2, 64, 16)) - size("attention") == 2 * 4 * 2 * 8 * 48  # keys and values
    assert size("mamba-n16") < size("hybrid-2") and size("hyena", Recall(2, 64, 16)) > size("hyena")


# --------------------------------------------------------------------------------------------------- running


def test_the_best_rate_counts_and_a_good_one_ends_the_search(monkeypatch):
    base = EXPERIMENT.arms("toy")[0].settings
    settings = replace(base, more_learning_rates=(2e-3, 4e-3, 5e-3))
    reached, weights = {3e-3: 0.2, 2e-3: 0.1, 4e-3: 0.999}, []

    def learned(model, rate, settings, context):
        weights.append(model.embedding.weight.detach().clone())
        return {"accuracy": reached[rate], "parameters": 1}

    module = importlib.import_module("anymamba.experiments.associative_recall.measure")
    monkeypatch.setattr(module, "learn_at_rate", learned)
    values = measure(settings, CONTEXT)
    assert values["sweep"] == [[3e-3, 0.2], [2e-3, 0.1], [4e-3, 0.999]] and values["learning_rate"] == 4e-3
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    reached[4e-3] = 0.05
    reached[5e-3] = 0.15
    assert measure(settings, CONTEXT)["learning_rate"] == 3e-3


def test_a_toy_run_and_its_resumption(tmp_path, monkeypatch):
    only, measured = ["attention", "mamba-n4", "hybrid-1"], []
    whole = type(EXPERIMENT).measure

    def counted(self, arm, context):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(arm.name)
        return whole(self, arm, context)

    with monkeypatch.context() as patch:
        patch.setattr(type(EXPERIMENT), "measure", counted)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(EXPERIMENT, "toy", tmp_path, only=only)
        measured[:] = []
        results = run_experiment(EXPERIMENT, "toy", tmp_path, only=only)
        assert measured == ["hybrid-1"]
    charts = {f"{n}.{s}" for n in ("state", "pairs") for s in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == {"arms", "results.json", "report.md"} | charts
    assert [test["n_pairs"] for test in results.values("hybrid-1", "tests")[0]] == [1, 2]
    again = run_experiment(EXPERIMENT, "toy", tmp_path / "again", only=["mamba-n4"])
    numbers = [{**r.of("mamba-n4")[0].values, "training_seconds": 0} for r in (results, again)]
    assert numbers[0] == numbers[1]  # the same settings and seed give the same numbers


# ---------------------------------------------------------------------------------------------------- report

STATE_BYTES = {"mamba-n4": 4096, "mamba-n16": 16_384, "mamba-n64": 65_536, "attention": 32_768}


def made_up(recalls: dict[str, list[float]], scale="cpu", seeds=1) -> Results:
    """Results in which a system recalls these shares of its tasks; the others are planned and missing."""
    arms = EXPERIMENT.arms(scale)
    records = []
    for arm in arms:
        settings: Settings = arm.settings
        for seed in range(seeds if settings.system in recalls else 0):
            tests = [
                {"n_pairs": t.n_pairs, "length": t.length, "vocab_size": t.vocab_size, "tokens": recall}
                for t, recall in zip(settings.tasks, recalls[settings.system], strict=False)
            ]
            values = {
                "tests": tests,
                "parameters": 70_000,
                "steps": 6000,
                "learning_rate": 6e-3,
                "state_bytes": STATE_BYTES.get(settings.system, 20_000),
            }
            records.append(Record(arm.name, seed, as_json(settings), values, 60.0, "abacus", "2026-01-01"))
    return Results("associative-recall", scale, tuple(records), tuple(f"{arm.name}-seed0" for arm in arms))


GOOD = {
    "attention": [1.0, 1.0, 1.0, 0.995],
    "mamba-n4": [0.99, 0.8, 0.5, 0.20],
    "mamba-n16": [1.0, 0.95, 0.8, 0.40],
    "mamba-n64": [1.0, 0.99, 0.92, 0.70],
    "mamba-deep": [1.0, 0.99, 0.9, 0.50],
    "h3": [0.8, 0.5, 0.2, 0.1],
    "hyena": [0.9, 0.6, 0.3, 0.05],
    "hybrid-1": [1.0, 1.0, 1.0, 0.99],
    "hybrid-2": [1.0, 1.0, 1.0, 0.98],
}


def test_the_report_of_a_success():
    text = EXPERIMENT.report(made_up(GOOD))
    assert text.startswith("**8 of 8 thresholds hold.**")
    assert "fails" not in text and "not judged" not in text
    assert "| Mamba, N = 4 | 70,000 | 4,096 | 0.006 | 6,000 | 99.0 | 80.0 | 50.0 | 20.0 |" in text
    assert "| attention: recall at its worst | at least 99 | 99.5 | holds |" in text
    assert "| Hyena: points below attention at the most pairs | at least 25 | 94.5 | holds |" in text
    assert (
        "| Mamba with 2 attentions, 4 blocks: points below attention at its worst | at most 2 | 1.5 | holds |" in text
    )
    assert "Mamba, N = 16 recalls less than 90 % from 8 pairs on: 40.0 % of 16." in text
    assert "Hyena recalls less than 90 % from 4 pairs on: 5.0 % of 16, no better than one that knows only" in text
    assert "attention recalls at least 90 % at every number of pairs asked." in text
    assert "with 16 pairs: 16.0 times the bytes of state change recall by +50.0 points, from 20.0 % to 70.0 %" in text
    assert "Mamba with 1 attention, against Mamba, N = 16, with 16 pairs: +59.0 points of recall, 20,000 bytes" in text
    assert CHOSEN["cpu"] in text
    assert "2 in 64, 4 in 64, 8 in 64, 16 in 64" in text and "50.0 % of 2, 25.0 % of 4" in text


def test_the_report_of_a_failure():
    bad = {**GOOD, "attention": [1, 1, 1, 0.85], "mamba-n64": [1, 1, 1, 0.30], "hyena": [1, 1, 0.8, 0.9]}
    text = EXPERIMENT.report(made_up({**bad, "hybrid-1": [0.9, 1, 1, 0.2]}))
    assert text.startswith("**4 of 8 thresholds hold.** These fail: attention: recall at its worst; Mamba with 1 att")
    assert "| attention: recall at its worst | at least 99 | 85.0 | **fails** |" in text
    assert "| Hyena: points below attention at the most pairs | at least 25 | -5.0 | **fails** |" in text
    assert "| Mamba with 1 attention: points below attention at its worst | at most 2 | 65.0 | **fails** |" in text
    assert "to the next larger, at the most pairs | at least -1 | -10.0 | **fails** |" in text
    assert "Hyena recalls less than 90 % from 8 pairs on (but not at 16): 80.0 % of 8." in text
    assert "Mamba with 1 attention, against Mamba, N = 16, with 16 pairs: -20.0 points of recall" in text


def test_the_worst_seed_counts():
    results = made_up(GOOD, seeds=2)
    results.of("attention")[1].values["tests"][0]["tokens"] = 0.9
    text = EXPERIMENT.report(results)
    assert "| attention: recall at its worst | at least 99 | 90.0 | **fails** |" in text
    assert "| 95.0 (90.0 to 100.0) |" in text


def test_the_report_of_half_a_run():
    text = EXPERIMENT.report(made_up({"hyena": [0.5, 0.4, 0.3, 0.2]}))
    assert text.startswith("**0 of 8 thresholds hold.** 8 cannot be judged")
    assert "| attention: recall at its worst | at least 99 |  | not judged |" in text
    assert EXPERIMENT.report(made_up({})) == "Nothing has been measured yet."
    assert EXPERIMENT.figures(made_up({})) == {}


def test_arms_of_several_widths_and_sizes():
    results = made_up({"attention": [1.0], "hyena": [0.5], "mamba-n4": [0.99]}, scale="gpu")
    text = EXPERIMENT.report(results)
    assert text.startswith("**4 of 16 thresholds hold.** These fail: width 64: Mamba, N = 4: points below attention")
    assert "## Recall, %, width 64" in text and "## Recall, %, width 128" in text
    assert "| Hyena | 70,000 | 20,000 | 0.006 | 6,000 | 50.0 | 50.0 | 50.0 | 50.0 |" in text
    assert "4 in 64, 8 in 128, 16 in 256, 64 in 512 (an arm for each)" in text
    panels = EXPERIMENT.figures(results)
    assert [len(panels[name].axes) for name in ("state", "pairs")] == [4, 2]


def test_the_figures_show_what_was_measured():
    figures = EXPERIMENT.figures(made_up(GOOD))
    (lines,) = figures["pairs"].axes
    curves = [line for line in lines.get_lines() if line.get_label() in {s.label for s in SYSTEMS.values()}]
    assert [[round(y / 100, 3) for y in line.get_ydata()] for line in curves] == list(GOOD.values())
    assert lines.get_xlabel() and lines.get_ylabel()
    marks = [axes.get_lines() for axes in figures["state"].axes]
    assert all(len(found) == len(SYSTEMS) + 1 for found in marks)  # and what knows the values, not whose
    assert all(axes.get_xscale() == "log" and axes.get_xlabel() for axes in figures["state"].axes)
