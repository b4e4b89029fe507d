"""Associative recall: its settings, recall of right and wrong predictors, thresholds, tables and charts."""

from __future__ import annotations

import importlib
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from anymamba.data.synthetic.recall import Recall, recall_batch
from anymamba.experiments import load_experiment
from anymamba.experiments.associative_recall.arms import (
    MAMBA_BY_STATE,
    SLOW,
    SYSTEMS,
    TIME_INVARIANT,
    WITHOUT_ATTENTION,
    build_config,
)
from anymamba.experiments.associative_recall.measure import (
    bytes_after_a_row,
    flops_per_token,
    measure,
    mixed_batch,
    sources,
)
from anymamba.lab.experiment import SCALES, Context, Results
from anymamba.lab.learning import build_model, evaluate
from anymamba.lab.saving import SUFFIX, OutOfTime, Saving
from anymamba.models.mixers import MIXERS
from tests.experiments.conftest import made_up, measured, rows, verdicts

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
        assert settings.model.hyena.max_length >= max(task.length for task in settings.tasks)
        assert (settings.model.attention.positions, settings.model.attention.d_conv) == ("rotary", 4)
        rates = () if scale == "toy" else settings.more_learning_rates
        same = replace(settings, system="", model=arms[0].settings.model, more_learning_rates=rates)
        shared.setdefault((settings.model.d_model, settings.tasks), set()).add(str(same))
    assert all(len(found) == 1 for found in shared.values())


def test_sizes_of_the_scales():
    cpu = EXPERIMENT.arms("cpu")
    assert [arm.name for arm in cpu] == list(SYSTEMS) and {arm.seeds for arm in cpu if arm.name not in SLOW} == {3}
    assert [task.n_pairs for task in cpu[0].settings.tasks][-3:] == [4, 8, 16]
    for scale, count in (("gpu", 1), ("paper", 4)):
        arms = EXPERIMENT.arms(scale)
        assert len(arms) == len(SYSTEMS) * count * 3
        assert {arm.settings.model.d_model for arm in arms} == {64, 128, 256}
        assert not any(task.random_filler for arm in arms for task in arm.settings.tasks)
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
    with pytest.raises(ValueError, match="must have one vocabulary; make an arm for each"):
        replace(settings, tasks=(Recall(1, 16, 16), Recall(1, 16, 32)))


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


TURNS = (Recall(1, 16, 64), Recall(2, 32, 64), Recall(4, 32, 64))


def test_tasks_of_different_lengths_take_turns_with_as_many_queries():
    settings = replace(EXPERIMENT.arms("toy")[0].settings, tasks=TURNS)
    found = sources(replace(settings, optimization=replace(settings.optimization, batch_size=16)))
    assert [(source.rows, source.labels_a_row) for source in found] == [(16, 1), (8, 2), (4, 4)]
    for source, task in zip(found, TURNS, strict=True):
        ids, labels = source.make(torch.Generator().manual_seed(0), source.rows)
        assert ids.shape == (source.rows, task.length)
        assert ((labels != -100).sum(1) == task.n_pairs).all()
    assert len(sources(settings)) == 3 and len(sources(replace(settings, tasks=TURNS[1:]))) == 1
    small = replace(settings, optimization=replace(settings.optimization, batch_size=3))
    with pytest.raises(ValueError, match="batch_size must give the task with the most pairs a row, got 3; raise it"):
        sources(small)


def test_a_set_of_rows_of_different_lengths_is_filled_up_behind_their_end():
    ids, labels = mixed_batch(TURNS, torch.Generator().manual_seed(0), 7)
    assert ids.shape == labels.shape == (7, 32)
    assert (ids[:4, 16:] == 0).all() and (labels[:4, 16:] == -100).all()
    assert [int((row != -100).sum()) for row in labels] == [1] * 4 + [2] * 2 + [4]
    alone, wanted = recall_batch(TURNS[0], torch.Generator().manual_seed(0), 4)
    assert torch.equal(ids[:4, :16], alone) and torch.equal(labels[:4, :16], wanted)
    for name, system in SYSTEMS.items():
        model = build_model(build_config(system, 8, TURNS), CONTEXT)
        with torch.no_grad():
            short, long = model.hidden(alone)[0], model.hidden(ids[:4])[0][:, :16]
        torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_arms_whose_tasks_take_turns():
    settings = replace(EXPERIMENT.arms("toy")[0].settings, tasks=TURNS, more_learning_rates=())
    settings = replace(settings, model=build_config(SYSTEMS["mamba-n4"], 8, TURNS))
    settings = replace(settings, optimization=replace(settings.optimization, steps=5))
    values = measure(settings, CONTEXT)
    assert [test["length"] for test in values["tests"]] == [16, 32, 32] and values["steps"] == 5
    own, one = flops_per_token(settings), [flops_per_token(replace(settings, tasks=(task,))) for task in TURNS]
    assert min(one) < own < max(one)


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
        return bytes_after_a_row(build_model(build_config(SYSTEMS[name], 8, (task,)), CONTEXT), task, CONTEXT)

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
        return {"accuracy": reached[rate]}

    module = importlib.import_module("anymamba.experiments.associative_recall.measure")
    monkeypatch.setattr(module, "learn_at_rate", learned)
    values = measure(settings, CONTEXT)
    assert values["sweep"] == [[3e-3, 0.2], [2e-3, 0.1], [4e-3, 0.999]] and values["learning_rate"] == 4e-3
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    reached[4e-3] = 0.05
    reached[5e-3] = 0.15
    assert measure(settings, CONTEXT)["learning_rate"] == 3e-3


def test_an_interrupted_search_goes_on_with_the_rate_at_which_it_stopped(tmp_path, monkeypatch):
    base = EXPERIMENT.arms("toy")[0].settings
    settings = replace(base, more_learning_rates=(2e-3, 4e-3))

    def with_saving(folder, **more):
        return replace(CONTEXT, saving=Saving(folder / f"arm-seed0{SUFFIX}", {}, **more))

    def numbers(values):
        differs = {"training_seconds", "tokens_per_second"}
        return {key: value for key, value in values.items() if key not in differs}

    straight = with_saving(tmp_path)
    wanted = numbers(measure(settings, straight))
    assert len(list(tmp_path.iterdir())) == 3
    straight.saving.delete()
    assert not list(tmp_path.iterdir())
    starts, module = [], importlib.import_module("anymamba.lab.learning")
    step = module.TrainingStep.__call__
    monkeypatch.setattr(
        module.TrainingStep,
        "__call__",
        lambda self, batch, n, labels: (starts.append(n), step(self, batch, n, labels))[1],
    )
    late = with_saving(tmp_path, deadline=0.0)
    for _ in range(3):
        with pytest.raises(OutOfTime):
            measure(settings, late)
    assert numbers(measure(settings, late)) == wanted
    assert starts == [1, 2] * 3  # no step is taken twice


# --------------------------------------------------------------------------------------------------- results

STATE_BYTES = {"mamba-n4": 4096, "mamba-n16": 16_384, "mamba-n64": 65_536, "attention": 32_768}


def results_of(recalls: dict[str, list[float]], scale="cpu", seeds=1) -> Results:
    """Results in which a system recalls these shares of its tasks."""
    values = {}
    for arm in EXPERIMENT.arms(scale):
        system, tasks = arm.settings.system, arm.settings.tasks
        values[arm.name] = [
            {
                "tests": [
                    {"n_pairs": task.n_pairs, "vocab_size": task.vocab_size, "tokens": recall}
                    for task, recall in zip(tasks, recalls[system], strict=False)
                ],
                "parameters": 70_000,
                "steps": 6000 - 100 * seed,
                "learning_rate": 6e-3,
                "state_bytes": STATE_BYTES.get(system, 20_000),
            }
            for seed in range(seeds if system in recalls else 0)
        ]
    return made_up(EXPERIMENT, scale, values)


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


def test_thresholds_of_a_success():
    results = results_of(GOOD)
    assert verdicts(EXPERIMENT, results) == ["holds"] * 8
    wanted = [0.995, 0.795, 0.005, 0.015, 0.895, 0.945, 0.2, 0.5]
    assert list(chain.from_iterable(measured(EXPERIMENT, results))) == pytest.approx(wanted)


def test_thresholds_of_a_failure():
    bad = {**GOOD, "attention": [1, 1, 1, 0.85], "mamba-n64": [1, 1, 1, 0.30], "hyena": [1, 1, 0.8, 0.9]}
    results = results_of({**bad, "hybrid-1": [0.9, 1, 1, 0.2]})
    assert verdicts(EXPERIMENT, results) == [
        *("fails", "holds", "fails", "holds"),
        *("holds", "fails", "fails", "holds"),
    ]
    got = measured(EXPERIMENT, results)
    assert [got[i][0] for i in (0, 2, 5, 6)] == pytest.approx([0.85, 0.65, -0.05, -0.10])


def test_the_worst_seed_counts():
    results = results_of(GOOD, seeds=2)
    results.of("attention")[1].values["tests"][0]["tokens"] = 0.9
    assert verdicts(EXPERIMENT, results)[0] == "fails" and measured(EXPERIMENT, results)[0] == [0.9]
    (table, _) = EXPERIMENT.sections(results).values()
    assert rows(table)[0][:6] == ["attention", "70,000", "32,768", "0.006", "5,900 to 6,000", "95.0 (90.0 to 100.0)"]


def test_thresholds_of_half_a_run():
    assert verdicts(EXPERIMENT, results_of({"hyena": [0.5, 0.4, 0.3, 0.2]})) == ["not judged"] * 8


def test_the_tables_have_baselines_and_what_state_and_attention_change():
    recall, differences = (rows(text) for text in EXPERIMENT.sections(results_of(GOOD)).values())
    assert recall[1] == ["Mamba, N = 4", "70,000", "4,096", "0.006", "6,000", "99.0", "80.0", "50.0", "20.0"]
    assert [row[5:] for row in recall[-2:]] == [["50.0", "25.0", "12.5", "6.2"], ["3.12"] * 4]
    assert [row[1:] for row in differences] == [
        ["32", "16", "+50.0", "65,536 for 4,096 (16.0 times)"],
        ["32", "16", "+59.0", "20,000 for 16,384 (1.2 times)"],
        ["32", "16", "+48.0", "20,000 for 20,000 (1.0 times)"],
    ]


def test_arms_of_several_widths_and_sizes():
    results = results_of({"attention": [1.0], "hyena": [0.5], "mamba-n4": [0.99]}, scale="paper")
    at_a_width = ["holds", "fails", "not judged", "not judged", "not judged", "holds", "not judged", "not judged"]
    assert verdicts(EXPERIMENT, results) == at_a_width * 3
    assert [t.what.startswith("width 64") for t in EXPERIMENT.thresholds(results)] == [True] * 8 + [False] * 16
    first, second, *_ = EXPERIMENT.sections(results).values()
    hyena = ["Hyena", "70,000", "20,000", "0.006", "6,000", "50.0", "50.0", "50.0", "50.0"]
    assert rows(first)[-3] == rows(second)[-3] == hyena
    panels = [draw(results) for draw in EXPERIMENT.figures.values()]
    assert [len(figure.axes) for figure in panels] == [4, 3]


def test_the_most_pairs_and_the_widths_are_those_of_the_plan():
    results = results_of(GOOD | {"mamba-n4": [0.99]}, scale="paper")
    few = replace(results, records=tuple(r for r in results.records if r.arm.endswith("-d64-4")))
    assert len(few.records) == len(SYSTEMS)
    judged = verdicts(EXPERIMENT, few)
    assert judged[:8] == ["holds", "not judged", "holds", "holds", *["not judged"] * 4]
    assert judged[8:] == ["not judged"] * 16


def test_the_charts_show_what_was_measured():
    state, pairs = (draw(results_of(GOOD)) for draw in EXPERIMENT.figures.values())
    (lines,) = pairs.axes
    curves = [line for line in lines.get_lines() if line.get_label() in {s.label for s in SYSTEMS.values()}]
    assert [[round(y / 100, 3) for y in line.get_ydata()] for line in curves] == list(GOOD.values())
    assert lines.get_xlabel() and lines.get_ylabel()
    marks = [axes.get_lines() for axes in state.axes]
    assert all(len(found) == len(SYSTEMS) + 1 for found in marks)  # and guesses among the row's values
    assert all(axes.get_xscale() == "log" and axes.get_xlabel() for axes in state.axes)
