"""The ablations of selection: settings, windows of the corpus, what is selective, thresholds, tables and charts."""

from __future__ import annotations

from itertools import chain
from math import exp, log

import pytest
import torch

from anymamba.experiments import load_experiment
from anymamba.experiments.selection_ablation.arms import KINDS, PAPER_7, PAPER_10, SELECTIVE, STATES, paper_gap
from anymamba.experiments.selection_ablation.measure import measure
from anymamba.lab.byte_windows import fixed_windows, random_windows, standard_library_bytes
from anymamba.lab.charts import save_figure
from anymamba.lab.experiment import SCALES, Context, Results
from anymamba.lab.learning import evaluate
from anymamba.models.language_model import LanguageModel
from tests.experiments.conftest import made_up, measured, rows, verdicts

EXPERIMENT = load_experiment("selection-ablation")
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("scale", SCALES)
def test_the_arms_are_both_tables_and_a_transformer(scale):
    arms = EXPERIMENT.arms(scale)
    assert [a.name for a in arms if a.name.startswith("copying-")] == [f"copying-{n}" for n in SELECTIVE]
    expected = {f"lm-{name}-n16" for name in SELECTIVE} | {f"lm-{k}-n{n}" for k in KINDS.values() for n in STATES}
    assert {a.name for a in arms if a.name.startswith("lm-")} == expected | {"lm-transformer"}
    assert len(arms) == 5 + 13 + 1
    for task in ("copying", "lm"):  # one stream, optimiser and number of steps
        same = {
            str((s.optimization, s.copying, s.window)) for a in arms if a.name.startswith(task) for s in [a.settings]
        }
        assert len(same) == 1


@pytest.mark.parametrize("scale", SCALES)
def test_what_is_selective_is_what_the_name_says(scale):
    for arm in EXPERIMENT.arms(scale):
        _, name, *state = arm.name.split("-")
        options = arm.settings.model.mamba
        if name != "transformer":
            chosen = {n for n in ("delta", "B", "C") if getattr(options, f"selective_{n}")}
            assert chosen == SELECTIVE[name]
            assert f"n{options.d_state}" == (state[0] if state else "n16")
            assert set(arm.settings.model.layer_mixers) == {"mamba"}


def test_a_layer_has_only_the_parameters_of_its_arm():
    shapes = {}
    for arm in EXPERIMENT.arms("toy"):
        if arm.name.endswith("-n16"):
            mixer = LanguageModel(arm.settings.model).blocks[0].mixer
            found = {"delta": mixer.dt_proj is not None, "B": mixer.ssm.B is None, "C": mixer.ssm.C is None}
            assert {n for n, yes in found.items() if yes} == SELECTIVE[arm.name.split("-")[1]]
            shapes[arm.name] = 0 if mixer.x_proj is None else mixer.x_proj.weight.shape[0]
    assert shapes == {"lm-none-n16": 0, "lm-B-n16": 16, "lm-C-n16": 16, "lm-delta-n16": 1, "lm-all-n16": 33}


@pytest.mark.parametrize("scale", ["toy", "cpu", "gpu", "paper"])
def test_the_transformer_has_the_parameters_of_mamba(scale):
    models = {a.name: a.settings.model for a in EXPERIMENT.arms(scale)}
    mamba, other = (LanguageModel(models[n], device="meta").n_parameters() for n in ("lm-all-n16", "lm-transformer"))
    assert other == pytest.approx(mamba, rel=0.01)
    assert models["lm-transformer"].layer_mixers[:2] == ("attention", "mlp")


def test_the_papers_tables_and_gaps():
    assert PAPER_7["delta"] == PAPER_10["constant"][16] and PAPER_7["all"] == PAPER_10["selective"][16]
    gaps = {name: round(paper_gap(PAPER_7["none"], PAPER_7[name]), 3) for name in SELECTIVE}
    assert gaps == {"none": 0, "B": 0.074, "C": 0.091, "delta": 0.108, "all": 0.227}
    assert round(paper_gap(PAPER_10["selective"][1], PAPER_10["selective"][16]), 3) == 0.111
    assert round(paper_gap(PAPER_10["constant"][1], PAPER_10["constant"][16]), 3) == 0.007


# --------------------------------------------------------------------------------------------------- corpus


def test_windows_are_bytes_and_those_that_follow():
    text = torch.arange(50, dtype=torch.uint8)
    ids, labels = random_windows(text, 7)(torch.Generator().manual_seed(0), 400)
    assert ids.shape == labels.shape == (400, 7)
    assert torch.equal(labels, ids + 1) and torch.equal(ids, ids[:, :1] + torch.arange(7))
    assert ids[:, 0].min() == 0 and ids[:, 0].max() == 42  # first and last that fit
    ids, labels = fixed_windows(text, 7, 4)
    assert ids[:, 0].tolist() == [0, 14, 28, 42] and labels[-1, -1] == 49


def test_both_sides_of_the_corpus_are_files_of_their_own():
    training, held_out = standard_library_bytes(False), standard_library_bytes(True)
    assert len(training) > 5_000_000 and len(held_out) > 100_000 and training.dtype == torch.uint8
    piece = bytes(held_out[1000:1200].tolist())
    assert piece not in training.numpy().tobytes()


def test_a_text_without_room_for_a_window():
    with pytest.raises(ValueError, match="longer than a window of 7 bytes, got 7 bytes; shorten the window"):
        random_windows(torch.zeros(7, dtype=torch.uint8), 7)


class NextByte(torch.nn.Module):
    """Gives the byte one above that it reads the probability p, all others the same."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.config = p, type("Config", (), {"vocab_size": 256})

    def hidden(self, ids):
        right = torch.nn.functional.one_hot((ids + 1) % 256, 256)
        return torch.where(right == 1, log(self.p), log((1 - self.p) / 255)).float(), None

    def logits(self, x):
        return x


def test_the_loss_is_nats_a_byte():
    rows = fixed_windows(torch.arange(50, dtype=torch.uint8), 7, 4)
    assert evaluate(NextByte(0.5), rows).loss == pytest.approx(log(2))
    assert evaluate(NextByte(1 / 256), rows).loss == pytest.approx(log(256))
    assert evaluate(NextByte(0.999), rows).tokens == 1 and evaluate(NextByte(0.001), rows).tokens == 0


def test_the_language_model_says_how_large_its_corpus_is():
    values = measure(EXPERIMENT.arms("toy")[5].settings, Context(CPU, 0, lambda *told: None))
    assert 2 < values["validation_loss"] < 8 and values["held_out_bytes"] == len(standard_library_bytes(True))


# -------------------------------------------------------------------------------------------------- results


def results_of(values: dict[str, float | None], seeds: int = 1) -> Results:
    """Results with these accuracies of copying and losses of the language model."""

    def own(value):
        sizes = {"parameters": 150_000, "training_bytes": 12_000_000, "held_out_bytes": 600_000}
        return {"accuracy": value or 0.0, "validation_loss": value, **sizes}

    return made_up(EXPERIMENT, "cpu", {arm: [own(value) for _ in range(seeds)] for arm, value in values.items()})


def as_published() -> dict[str, float | None]:
    """The paper's perplexities as losses, and copying as selection would have it."""
    values: dict[str, float | None] = {f"lm-{name}-n16": log(p) for name, p in PAPER_7.items()}
    values |= {f"lm-{KINDS[kind]}-n{n}": log(p) for kind, row in PAPER_10.items() for n, p in row.items()}
    values |= {"copying-none": 0.3, "copying-B": 0.5, "copying-C": 0.4, "copying-delta": 0.97, "copying-all": 0.99}
    return {**values, "lm-transformer": log(8.71) + 0.05}


def test_thresholds_of_a_success():
    results = results_of(as_published())
    assert verdicts(EXPERIMENT, results) == ["holds"] * 7
    wanted = [0.99, 0.69, 0.074, 0.017, 0.017, 0.119, 0.111]
    assert list(chain.from_iterable(measured(EXPERIMENT, results))) == pytest.approx(wanted, abs=5e-4)
    assert EXPERIMENT.thresholds(results)[-1].at_least == pytest.approx(5 * log(9.88 / 9.81))


def test_thresholds_of_a_failure():
    bad = {**as_published(), "lm-delta-n16": log(8.70), "lm-none-n16": log(10.16), "copying-all": 0.9}
    results = results_of({**bad, "copying-none": 0.8})
    assert verdicts(EXPERIMENT, results) == ["fails", "fails", "tie", "holds", "holds", "tie", "fails"]


@pytest.mark.parametrize(("above_b", "verdict"), [(0.009, "holds"), (0.02, "fails"), (-0.5, "holds")])
def test_b_and_c_may_be_alike_but_c_not_worse(above_b, verdict):
    results = results_of({**as_published(), "lm-C-n16": log(10.15) + above_b})
    assert verdicts(EXPERIMENT, results)[3] == verdict


def test_what_is_missing_or_diverged_is_not_judged():
    results = results_of({"lm-none-n16": None, "lm-all-n16": 1.5, "copying-B": 0.2})
    assert verdicts(EXPERIMENT, results) == ["not judged"] * 7
    assert [row[-3] for row in rows(EXPERIMENT.sections(results)["Table 7: what is selective"])] == ["", "", "+0.000"]


def test_the_tables_are_beside_the_papers():
    table_7, table_10 = (rows(text) for text in EXPERIMENT.sections(results_of(as_published())).values())
    assert table_7[3] == ["Δ", "97.0", "150,000", "2.283", "3.294", "+0.119", "+0.119", "9.81"]
    assert table_7[5] == ["Transformer++", "", "150,000", "2.214", "3.195", "+0.050", "", ""]
    assert table_10[4] == ["constant", "16", "150,000", "2.283", "3.294", "+0.007", "+0.007", "9.81"]
    assert table_10[9] == ["selective", "16", "150,000", "2.164", "3.123", "+0.111", "+0.111", "8.71"]


def test_several_seeds_are_a_mean_and_its_span():
    results = results_of(as_published(), seeds=2)
    results.of("copying-none")[1].values["accuracy"] = 0.5
    results.of("lm-B-n16")[1].values["validation_loss"] += 0.023
    table_7, table_10 = EXPERIMENT.sections(results).values()
    assert rows(table_7)[0][1] == "40.0 (30.0 to 50.0)" and "0.023 nats" in table_10
    assert measured(EXPERIMENT, results)[1] == [pytest.approx(0.99 - 0.4)]


def test_the_charts_show_what_was_measured():
    selection, state = (draw(results_of(as_published())) for draw in EXPERIMENT.figures.values())
    left, right = selection.axes
    assert [round(bar.get_height(), 1) for bar in left.patches] == [30, 50, 40, 97, 99]
    heights = [round(bar.get_height(), 3) for bar in right.patches]
    assert heights == [0.227, 0.153, 0.136, 0.119, 0, 0.227, 0.153, 0.136, 0.119, 0]
    here, paper = state.axes
    lines = [line for line in here.get_lines() if list(line.get_xdata()) == list(STATES)]
    assert [[round(exp(y), 2) for y in line.get_ydata()] for line in lines] == [
        list(r.values()) for r in PAPER_10.values()
    ]
    assert all(axes.get_xlabel() and axes.get_ylabel() for figure in (selection, state) for axes in figure.axes)
    assert here.get_xscale() == paper.get_xscale() == "log"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "values",
    [*({arm: 0.5} for arm in ("lm-transformer", "lm-all-n16", "lm-delta-n2", "copying-B")), {"lm-all-n16": None}],
)
def test_charts_of_one_arm_alone_and_of_one_that_diverged(values, tmp_path):
    whole = as_published() if None in values.values() else {}
    for name, draw in EXPERIMENT.figures.items():
        save_figure(draw(results_of({**whole, **values})), tmp_path, name)
