"""The ablation of selection: settings, what is selective, thresholds, table and chart."""

from __future__ import annotations

import pytest

from anymamba.experiments import load_experiment
from anymamba.experiments.selection_ablation.arms import SELECTIVE
from anymamba.lab.charts import save_figure
from anymamba.lab.experiment import SCALES, Results
from anymamba.models.language_model import LanguageModel
from tests.experiments.conftest import made_up, measured, rows, verdicts

EXPERIMENT = load_experiment("selection-ablation")


@pytest.mark.parametrize("scale", SCALES)
def test_the_arms_are_the_rows_of_table_7(scale):
    arms = EXPERIMENT.arms(scale)
    assert [arm.name for arm in arms] == [f"copying-{name}" for name in SELECTIVE]
    assert len({str((s.optimization, s.copying)) for arm in arms for s in [arm.settings]}) == 1


def test_a_layer_has_only_the_parameters_of_its_arm():
    shapes = {}
    for arm in EXPERIMENT.arms("toy"):
        mixer = LanguageModel(arm.settings.model).blocks[0].mixer
        found = {"delta": mixer.dt_proj is not None, "B": mixer.ssm.B is None, "C": mixer.ssm.C is None}
        name = arm.name.removeprefix("copying-")
        assert {n for n, yes in found.items() if yes} == SELECTIVE[name]
        shapes[name] = 0 if mixer.x_proj is None else mixer.x_proj.weight.shape[0]
    assert shapes == {"none": 0, "B": 16, "C": 16, "delta": 1, "all": 33}


GOOD = {"none": 0.3, "B": 0.5, "C": 0.4, "delta": 0.97, "all": 0.99}


def results_of(accuracies: dict[str, float], seeds: int = 1) -> Results:
    values = {
        f"copying-{name}": [{"accuracy": value, "parameters": 64_000} for _ in range(seeds)]
        for name, value in accuracies.items()
    }
    return made_up(EXPERIMENT, "cpu", values)


def test_thresholds():
    assert verdicts(EXPERIMENT, results_of(GOOD)) == ["holds", "holds"]
    assert verdicts(EXPERIMENT, results_of(GOOD | {"all": 0.9, "none": 0.8})) == ["fails", "fails"]
    assert verdicts(EXPERIMENT, results_of({"B": 0.2})) == ["not judged", "not judged"]


def test_several_seeds_are_a_mean_and_its_span():
    results = results_of(GOOD, seeds=2)
    results.of("copying-none")[1].values["accuracy"] = 0.5
    [section] = EXPERIMENT.sections(results).values()
    assert rows(section)[0] == ["none", "64,000", "40.0 (30.0 to 50.0)"]
    assert measured(EXPERIMENT, results)[1] == [pytest.approx(0.99 - 0.4)]


def test_the_chart_shows_what_was_measured():
    [axes] = EXPERIMENT.figures["selection"](results_of(GOOD)).axes
    assert [round(bar.get_height(), 1) for bar in axes.patches] == [30, 50, 40, 97, 99]
    assert axes.get_xlabel() and axes.get_ylabel()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("accuracies", [{}, {"B": 0.5}])
def test_charts_of_nothing_and_of_one_arm_alone(accuracies, tmp_path):
    save_figure(EXPERIMENT.figures["selection"](results_of(accuracies)), tmp_path, "selection")
