"""Selective copying: its settings, its accuracy on right and wrong predictors, a toy run, and its report."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from anymamba.data.synthetic.copying import Copying, copying_batch, histogram_accuracy
from anymamba.experiments import load_experiment
from anymamba.experiments.experiment import SCALES, Record, Results
from anymamba.experiments.results import as_json
from anymamba.experiments.running import run_experiment
from anymamba.experiments.selective_copying.arms import BASES, CELL, CELLS, SWEEPS
from anymamba.experiments.selective_copying.measure import model_config
from anymamba.experiments.synthetic_task import evaluate, validation_set
from anymamba.models.mixers import MIXERS

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
    cells = [arm for arm in arms if not arm.name.startswith("plain-")]
    assert [arm.name for arm in arms[:n_cells]] == [arm.name for arm in cells] and len(cells) == n_cells
    assert all(arm.settings.task == Copying(n_noise, n_tokens, 16, True) for arm in cells)
    assert all(arm.settings.mixer == arm.name for arm in cells)
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
        plain = arm.name.startswith("plain-")
        assert arm.settings.mixer == arm.name.removeprefix("plain-")
        assert arm.settings.task.selective is not plain
        same = replace(arm.settings, mixer="", task=replace(arm.settings.task, selective=True))
        assert same == BASES[scale]
    assert sum(arm.name.startswith("plain-") for arm in arms) == 2


@pytest.mark.parametrize("scale", SCALES)
def test_models_have_room_for_the_rows(scale):
    for arm in EXPERIMENT.arms(scale):
        config = model_config(arm.settings)
        assert config.layer_mixers == (arm.settings.mixer,) * 2
        assert config.hyena.max_length == arm.settings.task.length and config.vocab_size == 16


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
    rows = validation_set(make, 200, CPU)
    perfect = evaluate(Answers(lambda tokens: tokens), rows)
    assert (perfect.tokens, perfect.sequences, perfect.n_tokens) == (1, 1, 800)
    wrong = evaluate(Answers(lambda tokens: [t % 14 + 1 for t in tokens]), rows)
    assert (wrong.tokens, wrong.sequences) == (0, 0)
    half = evaluate(Answers(lambda tokens: [*tokens[:2], *(t % 14 + 1 for t in tokens[2:])]), rows)
    assert (half.tokens, half.sequences) == (0.5, 0)


def test_one_that_answers_the_commonest_scores_the_histogram_baseline():
    task = Copying(8, 16)
    rows = validation_set(partial(copying_batch, task), 2000, CPU)
    score = evaluate(Answers(lambda tokens: [max(tokens, key=tokens.count)] * len(tokens)), rows)
    assert score.tokens == pytest.approx(histogram_accuracy(task), abs=0.005)


# ------------------------------------------------------------------------------------------------- running


def test_a_toy_run_and_its_resumption(tmp_path, monkeypatch):
    only, measured = ["s6", "mamba", "plain-s6"], []
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
        assert measured == ["s6", "mamba"]
        measured[:] = []
        results = run_experiment(EXPERIMENT, "toy", tmp_path, only=only)
        assert measured == ["plain-s6"]
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"arms", "results.json", "report.md"} | {
        f"{n}.{s}" for n in ("accuracy", "learning") for s in ("png", "svg")
    }
    for arm in results.arms:
        assert [point[0] for point in results.values(arm, "curve")[0]] == [2, 4]
        assert 0 <= results.values(arm, "accuracy")[0] <= 1
    again = run_experiment(EXPERIMENT, "toy", tmp_path / "again", only=["mamba"])
    numbers = [{k: v for k, v in r.of("mamba")[0].values.items() if k != "training_seconds"} for r in (results, again)]
    assert numbers[0] == numbers[1]  # the same settings and seed give the same numbers


# ------------------------------------------------------------------------------------------------- report


def made_up(accuracies: dict[str, list[float]], scale="cpu") -> Results:
    """Results of arms with these accuracies, a seed each; the others are planned and missing."""
    arms = EXPERIMENT.arms(scale)
    planned = tuple(f"{arm.name}-seed{seed}" for arm in arms for seed in range(arm.seeds))
    records = []
    for arm in arms:
        for seed, accuracy in enumerate(accuracies.get(arm.name, [])):
            values = {"accuracy": accuracy, "sequence_accuracy": accuracy**8, "parameters": 31_000}
            values |= {"curve": [[200, 2.0, accuracy / 2], [400, None, accuracy]]}
            records.append(Record(arm.name, seed, as_json(arm.settings), values, 60.0, "abacus", "2026-01-01"))
    return Results("selective-copying", scale, tuple(records), planned)


GOOD = {
    "s4": [0.25, 0.26, 0.24],
    "s6": [0.97, 0.96, 0.98],
    "h3-s6": [1.0, 0.99, 1.0],
    "mamba-s4": [0.60, 0.65, 0.55],
    "mamba": [0.999, 0.998, 1.0],
    "plain-s4": [0.9, 0.9, 0.9],
    "plain-s6": [0.5, 0.5, 0.5],
}


def test_the_report_of_a_success():
    text = EXPERIMENT.report(made_up(GOOD))
    assert text.startswith("**5 of 5 thresholds hold.**")
    assert "fail" not in text and "not judged" not in text
    assert "| no gate | S4 | 31,000 | 25.0 (24.0 to 26.0) | 0.0 (0.0 to 0.0) | 18.3 |" in text
    assert "Rows of 144 tokens: 8 to remember, of 14 symbols, at random places among 128 of noise" in text
    assert ("constant (at most" in text) is not BASES["cpu"].optimization.cosine
    assert SWEEPS["cpu"] in text
    assert "Guessing gives 7.1 %" in text and "gives 26.9 % with 8 tokens of 14 symbols" in text
    assert "(20.4 % with the paper's 16 of 14)" in text
    assert "| no gate: S4: points below no gate: S6 | at least 25 | 70.0 | holds |" in text  # 96 - 26: the worst seeds
    assert "| Mamba: S4: points below Mamba: S6 | at least 25 | 34.8 | holds |" in text
    assert "No better than the histogram baseline: no gate: S4." in text
    assert "so they learned some of the order: Mamba: S4 (by 33.1 points)" in text
    assert "The block of Mamba changes S4 by +35.0 points (paper: +38.1)." in text
    assert "no gate: S4: 90.0 % of plain copying, 25.0 % of selective copying" in text


def test_the_report_of_a_failure():
    bad = {**GOOD, "mamba": [0.99, 0.94, 0.99], "mamba-s4": [0.1, 0.2, 0.80], "s4": [0.7]}
    text = EXPERIMENT.report(made_up(bad))
    assert text.startswith("**3 of 5 thresholds hold.** These fail: Mamba: S4: points below Mamba: S6; Mamba: S6: acc")
    assert "| Mamba: S6: accuracy | at least 95 | 94.0 | **fails** |" in text
    assert "| Mamba: S4: points below Mamba: S6 | at least 25 | 14.0 | **fails** |" in text
    assert "The block of Mamba changes S4 by -33.3 points (paper: +38.1)." in text


def test_the_report_of_half_a_run():
    text = EXPERIMENT.report(made_up({"s4": [0.2], "mamba": [0.5]}))
    assert text.startswith("**0 of 5 thresholds hold.** These fail: Mamba: S6: accuracy. 4 cannot be judged")
    assert "| no gate: S4: points below no gate: S6 | at least 25 |  | not judged |" in text
    assert EXPERIMENT.report(made_up({})) == "Nothing has been measured yet."
    assert EXPERIMENT.figures(made_up({})) == {}


def test_thresholds_of_all_eight_cells():
    text = EXPERIMENT.report(made_up({cell.mixer: [cell.paper] for cell in CELLS}, scale="gpu"))
    assert text.startswith("**8 of 8 thresholds hold.**")
    assert "| H3: Hyena: points below H3: S6 | at least 25 | 69.6 | holds |" in text


def test_the_figures_name_what_they_show():
    figures = EXPERIMENT.figures(made_up(GOOD))
    assert set(figures) == {"accuracy", "learning"}
    for figure in figures.values():
        (axes,) = figure.axes
        words = [text.get_text() for text in axes.get_legend().get_texts()]
        assert "knows the histogram, not the order" in words and axes.get_ylabel()
    (bars,) = figures["accuracy"].axes
    assert [round(bar.get_height(), 1) for bar in bars.patches] == [25.0, 97.0, 99.7, 60.0, 99.9, 90.0, 50.0]
    (lines,) = figures["learning"].axes
    assert lines.get_xlabel() == "step"
    curves = [line for line in lines.get_lines() if list(line.get_xdata()) == [200, 400]]
    assert len(curves) == 21  # seven arms of three
