"""Selective copying: its settings, its accuracy on right and wrong predictors, thresholds, tables and charts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from anymamba.data.synthetic.copying import Copying, copying_batch, histogram_accuracy
from anymamba.experiments import load_experiment
from anymamba.experiments.selective_copying.arms import BASES, CELL, CELLS
from anymamba.experiments.selective_copying.measure import measure, model_config
from anymamba.lab.experiment import SCALES, Context, Results
from anymamba.lab.learning import evaluate, fixed_set
from anymamba.models.mixers import MIXERS
from tests.experiments.conftest import made_up, measured, rows, verdicts

EXPERIMENT = load_experiment("selective-copying")
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------- settings


def test_the_cells_are_table_1():
    assert [(c.block, c.layer, round(100 * c.paper, 1)) for c in CELLS] == [
        ("no gate", "S4", 18.3),
        ("no gate", "S6", 97.0),
        ("H3", "S4", 57.0),
        ("H3", "Hyena", 30.1),
        ("H3", "S6", 99.7),
        ("Mamba", "S4", 56.4),
        ("Mamba", "Hyena", 28.4),
        ("Mamba", "S6", 99.8),
    ]
    for cell in CELLS:
        assert cell.mixer in MIXERS
        assert CELL[cell.selective].layer == "S6" and CELL[cell.selective].block == cell.block


@pytest.mark.parametrize(
    ("scale", "n_noise", "n_tokens", "n_cells"), [("cpu", 128, 8, 5), ("gpu", 1024, 16, 8), ("paper", 4096, 16, 8)]
)
def test_sizes_of_the_scales(scale, n_noise, n_tokens, n_cells):
    arms = EXPERIMENT.arms(scale)
    cells = [arm for arm in arms if not arm.name.startswith(("plain-", "long-"))]
    assert [arm.name for arm in arms[:n_cells]] == [arm.name for arm in cells] and len(cells) == n_cells
    assert all(arm.settings.task == Copying(n_noise, n_tokens, 16, True) for arm in cells)
    assert {arm.name: arm.seeds for arm in arms} == {
        arm.name: 3 if scale == "cpu" and arm.name in ("s6", "plain-s6") else 1 for arm in arms
    }


def test_the_papers_scale_is_the_papers():
    settings = BASES["paper"]
    how = settings.optimization
    assert (settings.d_model, settings.n_layers, how.steps, how.batch_size) == (64, 2, 400_000, 64)
    assert (how.learning_rate, how.weight_decay, how.warmup_steps, how.cosine) == (1e-4, 0, 0, False)


@pytest.mark.parametrize("scale", SCALES)
def test_arms_differ_in_the_mixer_and_the_controls_in_the_places(scale):
    arms = EXPERIMENT.arms(scale)
    for arm in arms:
        assert arm.settings.mixer == arm.name.removeprefix("plain-").removeprefix("long-")
        assert arm.settings.task.selective is not arm.name.startswith("plain-")
        assert arm.settings.task.n_noise == (4096 if arm.name.startswith("long-") else BASES[scale].task.n_noise)
        alike = replace(arm.settings, mixer="", task=BASES[scale].task, weight_std=BASES[scale].weight_std)
        assert alike == BASES[scale]
        assert (arm.settings.weight_std != BASES[scale].weight_std) == arm.name.startswith("long-")
        config = model_config(arm.settings)
        assert config.layer_mixers == (arm.settings.mixer,) * 2
        assert config.hyena.max_length == arm.settings.task.length and config.vocab_size == 16
    assert sum(arm.name.startswith("plain-") for arm in arms) == 2


# ------------------------------------------------------------------------------------------------- accuracy


class Answers(nn.Module):
    """Answers at the markers with what `choose` makes of a row's tokens, in order."""

    config = SimpleNamespace(vocab_size=16)

    def __init__(self, choose) -> None:
        super().__init__()
        self.choose = choose

    def hidden(self, ids):
        said = torch.zeros_like(ids)
        for row, out in zip(ids, said, strict=True):
            tokens = [t for t in row.tolist() if 0 < t < 15]
            out[-len(tokens) :] = torch.tensor(self.choose(tokens))
        return nn.functional.one_hot(said, 16).float(), None

    def logits(self, x):
        return x


@pytest.mark.parametrize("selective", [True, False])
def test_accuracy_of_a_perfect_and_of_wrong_predictors(selective):
    make = partial(copying_batch, Copying(20, 4, selective=selective))
    rows = fixed_set(make, 200, CPU)
    perfect = evaluate(Answers(lambda tokens: tokens), rows)
    assert (perfect.tokens, perfect.sequences, perfect.n_tokens) == (1, 1, 800)
    wrong = evaluate(Answers(lambda tokens: [t % 14 + 1 for t in tokens]), rows)
    assert (wrong.tokens, wrong.sequences) == (0, 0)
    half = evaluate(Answers(lambda tokens: [*tokens[:2], *(t % 14 + 1 for t in tokens[2:])]), rows)
    assert (half.tokens, half.sequences) == (0.5, 0)


def test_one_that_answers_the_commonest_scores_the_histogram_baseline():
    task = Copying(8, 16)
    rows = fixed_set(partial(copying_batch, task), 2000, CPU)
    score = evaluate(Answers(lambda tokens: [max(tokens, key=tokens.count)] * len(tokens)), rows)
    assert score.tokens == pytest.approx(histogram_accuracy(task), abs=0.005)


# ------------------------------------------------------------------------------------------------- results


def results_of(accuracies: dict[str, list[float]], scale="cpu") -> Results:
    """Results of arms with these accuracies, one for each seed."""

    def values(accuracy):
        curve = [[200, 2.0, accuracy / 2], [400, None, accuracy]]
        return {"accuracy": accuracy, "sequence_accuracy": accuracy**8, "parameters": 31_000, "curve": curve}

    return made_up(EXPERIMENT, scale, {arm: [values(a) for a in several] for arm, several in accuracies.items()})


GOOD = {
    "s4": [0.25, 0.26, 0.24],
    "s6": [0.97, 0.96, 0.98],
    "h3-s6": [1.0, 0.99, 1.0],
    "mamba-s4": [0.60, 0.65, 0.55],
    "mamba": [0.999, 0.998, 1.0],
    "plain-s4": [0.9, 0.9, 0.9],
    "plain-s6": [0.5, 0.5, 0.5],
}


def test_thresholds_are_of_the_worst_seeds():
    results = results_of(GOOD)
    assert verdicts(EXPERIMENT, results) == ["holds"] * 5
    assert [min(got) for got in measured(EXPERIMENT, results)] == pytest.approx([0.70, 0.96, 0.99, 0.348, 0.998])
    bad = results_of({**GOOD, "mamba": [0.99, 0.94, 0.99], "mamba-s4": [0.1, 0.2, 0.80], "s4": [0.7]})
    assert verdicts(EXPERIMENT, bad) == ["holds", "holds", "holds", "fails", "fails"]
    assert measured(EXPERIMENT, bad)[3] == pytest.approx([0.14])


def test_thresholds_of_half_a_run_and_of_all_eight_cells():
    half = results_of({"s4": [0.2], "mamba": [0.5]})
    assert verdicts(EXPERIMENT, half) == ["not judged"] * 4 + ["fails"]
    whole = results_of({cell.mixer: [cell.paper] for cell in CELLS}, scale="gpu")
    assert verdicts(EXPERIMENT, whole) == ["holds"] * 8 + ["not judged"] * 2
    long = results_of({"long-mamba": [0.96], "long-mamba-s4": [0.72], "mamba": [0.5]}, scale="gpu")
    assert verdicts(EXPERIMENT, long)[-2:] == ["holds", "fails"] and measured(EXPERIMENT, long)[-2] == [0.96]
    assert "noise of 4,096" in EXPERIMENT.thresholds(long)[-1].what


def test_the_table_has_both_accuracies_and_the_papers():
    table = rows(EXPERIMENT.sections(results_of(GOOD))["Table 1"])
    assert table[0] == ["no gate", "S4", "31,000", "25.0 (24.0 to 26.0)", "0.0 (0.0 to 0.0)", "18.3"]
    assert [row[-1] for row in table[-2:]] == ["", ""] and len(table) == 7


def test_differences_are_of_means_and_beside_the_papers():
    found = {row[0]: row[1:] for row in rows(EXPERIMENT.sections(results_of(GOOD))["Differences"])}
    assert list(found.values()) == [
        ["-1.9", ""],  # S4 and the histogram, 26.9 %
        ["+33.1", ""],  # Mamba with S4 and the histogram
        ["+35.0", "+38.1"],  # Mamba's block around S4
        ["+65.0", ""],  # random places, S4
        ["-47.0", ""],  # random places, S6
    ]
    assert EXPERIMENT.sections(results_of({"mamba": [1.0]}))["Differences"] == ""


def test_the_speed_is_shown_with_its_share_of_the_cards_peak():
    results = results_of({"mamba": [1.0], "s4": [0.2]}, scale="gpu")
    assert "Speed" not in EXPERIMENT.sections(results)
    counted = {"flops_per_token": 989e3, "tokens_per_second": 2e7, "steps": 1250}
    records = [replace(r, machine="NVIDIA H200, Linux", values=r.values | counted) for r in results.records]
    shown = rows(EXPERIMENT.sections(replace(results, records=tuple(records)))["Speed"])
    assert shown == [[arm, "1,250", "20,000,000", "2.0"] for arm in ("s4", "mamba")]
    on_a_cpu = replace(results, records=tuple(replace(r, machine="abacus") for r in records[:1]))
    assert rows(EXPERIMENT.sections(on_a_cpu)["Speed"]) == [["s4", "1,250", "20,000,000", ""]]


def test_the_charts_show_every_seed():
    figures = {name: draw(results_of(GOOD)) for name, draw in EXPERIMENT.figures.items()}
    (bars,) = figures["accuracy"].axes
    assert [round(bar.get_height(), 1) for bar in bars.patches] == [25.0, 97.0, 99.7, 60.0, 99.9, 90.0, 50.0]
    (lines,) = figures["learning"].axes
    curves = [line for line in lines.get_lines() if list(line.get_xdata()) == [200, 400]]
    assert len(curves) == 21  # seven arms of three
    assert sum(line.get_linestyle() == "--" for line in curves) == 6  # plain copying
    assert all(axes.get_ylabel() and axes.get_legend() for axes in (bars, lines))


def test_learning_ends_when_enough_is_right_and_the_papers_noise_has_a_row_of_its_own():
    toy = EXPERIMENT.arms("toy")[0].settings
    context = Context(torch.device("cpu"), 0, lambda *told: None)
    assert measure(replace(toy, enough=0.0), context)["steps"] == toy.judge_every
    assert measure(toy, context)["steps"] == toy.optimization.steps
    report = EXPERIMENT.sections(results_of({"mamba": [0.9], "long-mamba": [0.8]}, scale="gpu"))["Table 1"]
    assert "S6 (noise of 4,096)" in report and "80.0" in report
