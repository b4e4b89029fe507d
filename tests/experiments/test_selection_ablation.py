"""The ablations of selection: settings, windows of the corpus, what is selective, a toy run, and the report."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from anymamba.experiments import load_experiment
from anymamba.experiments.charts import save_figure
from anymamba.experiments.experiment import SCALES, Context, Record, Results
from anymamba.experiments.results import as_json
from anymamba.experiments.running import run_experiment
from anymamba.experiments.selection_ablation.arms import KINDS, PAPER_7, PAPER_10, SELECTIVE, STATES, paper_gap
from anymamba.experiments.selection_ablation.corpus import corpus_bytes, fixed_windows, random_windows
from anymamba.experiments.selection_ablation.measure import measure
from anymamba.experiments.synthetic_task import evaluate
from anymamba.models.language_model import LanguageModel

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
    training, held_out = corpus_bytes(False), corpus_bytes(True)
    assert len(training) > 5_000_000 and len(held_out) > 100_000 and training.dtype == torch.uint8
    piece = bytes(held_out[1000:1200].tolist())
    assert piece not in training.numpy().tobytes()


def test_a_text_without_room_for_a_window():
    with pytest.raises(ValueError, match="longer than a window of 7 bytes, got 7; shorten the window"):
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


# -------------------------------------------------------------------------------------------------- running


def test_a_toy_run_and_its_resumption(tmp_path, monkeypatch):
    only, measured = ["copying-all", "lm-none-n16", "lm-delta-n1", "lm-transformer"], []
    whole = type(EXPERIMENT).measure

    def measured_once(self, arm, context):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(arm.name)
        return whole(self, arm, context)

    with monkeypatch.context() as patch:
        patch.setattr(type(EXPERIMENT), "measure", measured_once)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(EXPERIMENT, "toy", tmp_path, only=only)
        assert len(measured) == 3
        measured[:] = []
        results = run_experiment(EXPERIMENT, "toy", tmp_path, only=only)
        assert measured == ["lm-transformer"]
    charts = {f"{n}.{s}" for n in ("selection", "state") for s in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == {"arms", "results.json", "report.md"} | charts
    assert 2 < results.values("lm-transformer", "validation_loss")[0] < 8
    assert results.values("lm-none-n16", "held_out_bytes")[0] == len(corpus_bytes(True))


def test_the_same_seed_gives_the_same_numbers():
    arm = next(a for a in EXPERIMENT.arms("toy") if a.name == "lm-C-n16")
    numbers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        numbers.append(measure(arm.settings, Context(CPU, seed, lambda *told: None))["validation_loss"])
    assert numbers[0] == numbers[1] != numbers[2]


# --------------------------------------------------------------------------------------------------- report


def made_up(values: dict[str, float | None], seeds: int = 1) -> Results:
    """Results with these accuracies of copying and losses of the language model; the others are planned and missing."""
    arms = EXPERIMENT.arms("cpu")
    records = []
    for arm in arms:
        for seed in range(seeds if arm.name in values else 0):
            value = values[arm.name]
            own = {"accuracy": value or 0.0, "validation_loss": value, "parameters": 150_000, "curve": []}
            own |= {"training_bytes": 12_000_000, "held_out_bytes": 600_000}
            records.append(Record(arm.name, seed, as_json(arm.settings), own, 60.0, "abacus", "2026-01-01"))
    return Results("selection-ablation", "cpu", tuple(records), tuple(f"{arm.name}-seed0" for arm in arms))


def as_published() -> dict[str, float | None]:
    """The paper's perplexities as losses, and copying as selection would have it."""
    values: dict[str, float | None] = {f"lm-{name}-n16": log(p) for name, p in PAPER_7.items()}
    values |= {f"lm-{KINDS[kind]}-n{n}": log(p) for kind, row in PAPER_10.items() for n, p in row.items()}
    values |= {"copying-none": 0.3, "copying-B": 0.5, "copying-C": 0.4, "copying-delta": 0.97, "copying-all": 0.99}
    return {**values, "lm-transformer": log(8.71) + 0.05}


def test_the_report_of_a_success():
    text = EXPERIMENT.report(made_up(as_published()))
    assert text.startswith("**7 of 7 expectations hold.**")
    assert "fails" not in text and "not judged" not in text and "not run" not in text
    assert "| Δ | 97.0 | 150,000 | 2.283 | 3.294 | +0.119 | +0.119 | 9.81 |" in text
    assert "| selective | 16 | 150,000 | 2.164 | 3.123 | +0.111 | +0.111 | 8.71 |" in text
    assert "| constant | 16 | 150,000 | 2.283 | 3.294 | +0.007 | +0.007 | 9.81 |" in text
    assert "gains +0.227 nats a byte (100 % of the paper's 0.227 nats a token)" in text
    assert "none > B > C > Δ > Δ, B, C (as in the paper;" in text
    assert "Mamba is ahead by 0.050 nats a byte." in text and "wins" not in text
    assert "Selective copying reaches 95 % with these selective: Δ; Δ, B, C." in text
    assert "gains +0.007 nats a byte over N = 1, a tie (paper +0.007 a token)" in text
    assert "Initial weights of selective copying were chosen" in text
    assert "12,000,000 to learn from, 600,000 in held-out files" in text


def test_the_report_of_a_failure():
    bad = {**as_published(), "lm-delta-n16": log(8.70), "lm-none-n16": log(10.16), "copying-all": 0.9}
    bad |= {"copying-none": 0.8, "lm-transformer": log(8.71) - 0.1}
    text = EXPERIMENT.report(made_up(bad))
    assert text.startswith("**2 of 7 expectations hold.** These fail: copying: accuracy")
    assert "loss of none minus that of B, nats | more than 0.01 (paper +0.074) | +0.001 | tie |" in text
    assert "loss of Δ minus that of Δ, B, C, nats | more than 0.01 (paper +0.119) | -0.001 | tie |" in text
    assert "(paper 0.111, 0.007) | +0.111, +0.127 | **fails** |" in text
    assert "**Transformer++ wins by 0.100 nats a byte.**" in text
    assert "the paper has none > B > C > Δ > Δ, B, C" in text
    assert "with these selective: Δ." in text


def test_b_and_c_may_be_alike_but_c_not_worse():
    tied = {**as_published(), "lm-C-n16": log(10.15) + 0.009}
    assert EXPERIMENT.report(made_up(tied)).startswith("**7 of 7")
    worse = {**as_published(), "lm-C-n16": log(10.15) + 0.02}
    assert "that of C, nats | more than -0.01 (paper +0.017) | -0.020 | **fails** |" in EXPERIMENT.report(
        made_up(worse)
    )


def test_a_difference_within_a_tie_is_said_to_be_one():
    text = EXPERIMENT.report(made_up({**as_published(), "lm-transformer": log(8.71) - 0.009}))
    assert "The difference of -0.009 nats is a tie." in text and "wins" not in text and "ahead" not in text


def test_the_report_of_half_a_run_and_of_one_that_diverged():
    text = EXPERIMENT.report(made_up({"lm-none-n16": None, "lm-all-n16": 1.5, "copying-B": 0.2}))
    assert text.startswith("**0 of 7 expectations hold.** 7 cannot be judged")
    assert "lm-none-n16-seed0 diverged" in text and "Not measured beside Mamba yet" in text
    assert "Selective copying reaches 95 % with these selective: nothing of what was tried." in text
    assert EXPERIMENT.report(made_up({})) == "Nothing has been measured yet."
    assert EXPERIMENT.figures(made_up({})) == {}
    assert set(EXPERIMENT.figures(made_up({"copying-B": 0.2}))) == {"selection", "state"}


def test_several_seeds_are_a_mean_and_its_span():
    results = made_up(as_published(), seeds=2)
    results.records[1].values["accuracy"] = 0.5  # copying-none, seed 1
    results.of("lm-B-n16")[1].values["validation_loss"] += 0.023
    text = EXPERIMENT.report(results)
    assert "| none | 40.0 (30.0 to 50.0) |" in text
    assert "Seeds of one Mamba lie up to 0.023 nats a byte apart" in text
    assert "Seeds of one Mamba" not in EXPERIMENT.report(made_up(as_published()))


def test_the_figures_show_what_was_measured():
    figures = EXPERIMENT.figures(made_up(as_published()))
    left, right = figures["selection"].axes
    assert [round(bar.get_height(), 1) for bar in left.patches] == [30, 50, 40, 97, 99]
    heights = [round(bar.get_height(), 3) for bar in right.patches]
    assert heights == [0.227, 0.153, 0.136, 0.119, 0, 0.227, 0.153, 0.136, 0.119, 0]
    here, paper = figures["state"].axes
    lines = [line for line in here.get_lines() if list(line.get_xdata()) == list(STATES)]
    assert [[round(exp(y), 2) for y in line.get_ydata()] for line in lines] == [
        list(r.values()) for r in PAPER_10.values()
    ]
    assert all(axes.get_xlabel() and axes.get_ylabel() for figure in figures.values() for axes in figure.axes)
    assert here.get_xscale() == paper.get_xscale() == "log"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("arm", ["lm-transformer", "lm-all-n16", "lm-delta-n2", "copying-B"])
def test_figures_of_one_arm_alone(arm, tmp_path):
    for name, figure in EXPERIMENT.figures(made_up({arm: 0.5})).items():
        assert save_figure(figure, tmp_path, name)


@pytest.mark.filterwarnings("error")
def test_figures_of_an_arm_that_diverged(tmp_path):
    for name, figure in EXPERIMENT.figures(made_up({**as_published(), "lm-all-n16": None})).items():
        assert save_figure(figure, tmp_path, name)
