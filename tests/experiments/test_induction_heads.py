"""Induction heads: asking in pieces, counting, settings of each scale, a toy run, and a report that tells the truth."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from anymamba.data.synthetic.induction import induction_sequences
from anymamba.experiments.experiment import SCALES, Context
from anymamba.experiments.induction_heads import EXPERIMENT, measure
from anymamba.experiments.induction_heads.arms import PAPER, arms_at
from anymamba.experiments.induction_heads.measure import count_right, last_predictions, learn_growing, perfect_in_a_row
from anymamba.experiments.results import Record, Results, as_json
from anymamba.experiments.running import run_experiment
from anymamba.experiments.synthetic_task import Score
from anymamba.models.language_model import LanguageModel

TOY = {arm.name: arm for arm in arms_at("toy")}
CPU = torch.device("cpu")


class Recaller:
    """Answers by rule instead of by weights; its state is what it has seen of the first trigger.

    `growing` makes it a model that must be given whole sequences: it forgets its state.
    """

    def __init__(self, n_tokens: int, shift: int = 0, growing: bool = False) -> None:
        self.n_tokens, self.shift = n_tokens, shift
        self.config = SimpleNamespace(growing_mixers=("attention",) if growing else (), vocab_size=n_tokens + 1)
        self.read: list[tuple[int, int]] = []

    def eval(self) -> None:
        pass

    def hidden(self, ids, state=None):
        self.read.append(tuple(ids.shape))
        before, answer = state or (torch.zeros(len(ids), 0, dtype=ids.dtype), torch.full((len(ids),), -1))
        stream = torch.cat([before, ids], 1)
        for row in range(len(ids)):
            places = (stream[row, :-1] == self.n_tokens).nonzero()
            if answer[row] < 0 and len(places):
                answer[row] = stream[row, places[0] + 1]
        one_hot = torch.nn.functional.one_hot((answer + self.shift).clamp(min=0) % self.n_tokens, self.n_tokens + 1)
        return one_hot[:, None].float().expand(-1, ids.shape[1], -1), (stream[:, -1:], answer)

    def logits(self, x):
        return x


@pytest.mark.parametrize("arm", ["mamba-first-ten", "mamba-uniform"])
@pytest.mark.parametrize("tokens", [1, 16, 64, 10_000])
@pytest.mark.parametrize("growing", [False, True])
def test_a_perfect_model_is_right_everywhere_and_a_wrong_one_nowhere(arm, tokens, growing):
    settings = replace(TOY[arm].settings, test_tokens=tokens)
    for length in (8, 64):
        rows = settings.rows_at(length)
        assert count_right(Recaller(16, growing=growing), settings, length, CPU) == rows
        assert count_right(Recaller(16, shift=1, growing=growing), settings, length, CPU) == 0


def test_what_is_read_at_once_is_bounded_where_the_state_has_a_fixed_size():
    settings = replace(TOY["mamba-uniform"].settings, test_tokens=32)
    recurrent, growing = Recaller(16), Recaller(16, growing=True)
    for model in (recurrent, growing):
        count_right(model, settings, 64, CPU)  # two rows
    assert set(recurrent.read) == {(2, 16)}
    assert set(growing.read) == {(1, 64)}


@pytest.mark.parametrize("name", ["mamba-uniform", "h3", "attention-rotary", "hyena"])
def test_pieces_and_rows_do_not_change_the_answers(name):
    settings = TOY[name].settings
    torch.manual_seed(0)
    model = LanguageModel(settings.model)

    def ask(tokens: int) -> torch.Tensor:
        sequences = induction_sequences(torch.Generator().manual_seed(1), 24, 32)
        return last_predictions(model, sequences, tokens, CPU)

    whole = ask(10_000)
    assert len(whole.unique()) > 1
    assert torch.equal(ask(24 * 5), whole)


def test_training_ends_after_judgements_without_a_mistake_in_a_row():
    enough = perfect_in_a_row(2)
    shares = [1.0, 0.99, 1.0, 1.0]
    assert [enough(Score(s, s, 0.0, 100, 100)) for s in shares] == [False, False, False, True]


def test_a_shorter_length_is_left_when_enough_is_right_and_the_last_one_is_not(monkeypatch):
    told = []

    rates = []

    def learn(model, optimization, make, validation, context, *, every, enough, generator):
        length = validation[0].shape[1]
        rates.append((optimization.learning_rate, make(generator, 3)[0].sum().item()))
        told.append((length, enough(Score(0.94, 0.94, 0, 1, 1)), enough(Score(0.95, 0.95, 0, 1, 1))))
        return {"steps": length, "training_seconds": 1.0, "curve": [[length, 2.0, 0.5]], "accuracy": length}

    monkeypatch.setattr(sys.modules[learn_growing.__module__], "learn", learn)
    how = TOY["mamba-uniform"].settings.optimization
    settings = replace(
        TOY["mamba-uniform"].settings,
        lengths_before=(4, 8),
        grow_at=0.95,
        optimization_before=replace(how, learning_rate=how.learning_rate / 2),
        cycles=2,
    )
    values = learn_growing(None, settings, Context(CPU, 0, lambda *_: None))  # type: ignore[arg-type]
    assert told == [(4, False, True), (8, False, True), (16, False, False), (16, False, False)]
    assert [2 * rate / how.learning_rate for rate, _ in rates] == [1, 1, 2, 2]
    assert rates[2] != rates[3]  # the second round sees other rows
    assert values["stages"] == [[4, 4], [8, 8], [16, 16], [16, 16]]
    assert (values["steps"], values["training_seconds"], values["accuracy"]) == (44, 4.0, 16)
    assert [point[0] for point in values["curve"]] == [4, 12, 28, 44]


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_has_both_placements_and_lengths_that_its_models_allow(scale):
    arms = {arm.name: arm.settings for arm in arms_at(scale)}
    assert arms["mamba-first-ten"] == replace(arms["mamba-uniform"], placement="first-ten")
    for name, settings in arms.items():
        assert settings.system in PAPER and name.startswith(settings.system)
        assert settings.model.vocab_size == settings.n_tokens + 1
        longest = max(settings.test_lengths)
        if name == "hyena":
            assert settings.model.hyena.max_length >= longest
        if name == "attention-absolute":
            assert settings.model.attention.max_positions >= longest
        assert settings.optimization.weight_decay == 0


def test_the_scales_are_those_of_the_protocol():
    cpu, paper = ({arm.name: arm.settings for arm in arms_at(scale)} for scale in ("cpu", "paper"))
    assert list(cpu) == ["mamba-first-ten", "mamba-uniform", "attention-rotary"]
    assert set(paper) == {"mamba-first-ten", "mamba-uniform", *PAPER} - {"mamba"}
    assert not any(settings.lengths_before for settings in paper.values())
    for settings in (cpu["mamba-first-ten"], paper["mamba-first-ten"]):
        assert settings.train_length == 256 and settings.model.d_model == 64 and settings.model.n_layers == 2
        assert settings.test_lengths == tuple(2**i for i in range(6, 21))
        assert [settings.rows_at(2**i) for i in (6, 14, 15, 20)] == [256, 256, 16, 16]
    assert max(cpu["attention-rotary"].test_lengths) == 2**12
    assert max(paper["attention-xpos"].test_lengths) == 2**14
    rates = {name: s.optimization.learning_rate for name, s in paper.items()}
    assert {name for name, r in rates.items() if r == 1e-3} == {"mamba-first-ten", "mamba-uniform"}
    assert set(rates.values()) == {1e-3, 2e-4}
    steps = {name: s.optimization.steps for name, s in paper.items()}
    assert (steps["mamba-uniform"], steps["attention-rotary"], steps["hyena"]) == (204_800, 409_600, 81_920)


# ----------------------------------------------------------------------------------------------------------- a toy run


def test_a_toy_run_writes_its_files_and_an_interrupted_arm_alone_is_measured_again(tmp_path, monkeypatch):
    names = ["mamba-first-ten", "attention-rotary"]
    results = run_experiment(EXPERIMENT, "toy", tmp_path, only=names)
    for name in ("report.md", "results.json", "lengths.png", "lengths.svg", "learning.png", "learning.svg"):
        assert (tmp_path / name).stat().st_size > 500
    record = results.of("mamba-first-ten")[0]
    assert record.values["stages"] == [[8, 4], [16, 4], [16, 4]] and record.values["steps"] == 12
    assert [point[0] for point in record.values["curve"]] == [2, 4, 6, 8, 10, 12]
    assert [t["length"] for t in record.values["tests"]] == [8, 16, 32, 64]
    assert [t["sequences"] for t in record.values["tests"]] == [8, 8, 8, 2]

    measured = []
    monkeypatch.setattr(
        "anymamba.experiments.induction_heads.measure", lambda *given: measured.append(given[0]) or measure(*given)
    )
    (tmp_path / "arms" / "attention-rotary-seed0.json").write_text("torn", encoding="utf-8")
    again = run_experiment(EXPERIMENT, "toy", tmp_path, only=names)
    assert [settings.system for settings in measured] == ["attention-rotary"]
    assert [(r.arm, counted(r)) for r in again.records] == [(r.arm, counted(r)) for r in results.records]


def counted(record: Record) -> dict[int, int]:
    """How many are right at each length: the same again for the same seed."""
    return {test["length"]: test["right"] for test in record.values["tests"]}


# ---------------------------------------------------------------------------------------------------------- the report


def made_up(name: str, shares: dict[int, float], *, validation: float = 1.0, minutes: float = 10.0) -> Record:
    """A record of an arm at scale cpu with these accuracies at 2^i."""
    settings = next(arm.settings for arm in arms_at("cpu") if arm.name == name)
    tests = [
        {"length": 2**i, "sequences": n, "right": round(share * n), "seconds": 1.0}
        for i, share in shares.items()
        for n in [settings.rows_at(2**i)]
    ]
    values = {
        "accuracy": validation,
        "sequence_accuracy": validation,
        "validation_loss": 0.1,
        "steps": 1000,
        "training_seconds": 60 * minutes,
        "parameters": 67_008,
        "curve": [[100, 2.0, 1.0], [500, 2.7, 0.1], [800, 0.1, validation], [1000, 0.1, validation]],
        "stages": [[32, 100], [256, 500], [256, 400]],
        "tests": tests,
    }
    return Record(name, 0, as_json(settings), values, 100.0, "a machine", "2026-01-01")


def results_of(*records: Record) -> Results:
    planned = tuple(f"{arm.name}-seed0" for arm in arms_at("cpu"))
    return Results("induction-heads", "cpu", records, planned)


ALL = dict.fromkeys(range(6, 21), 1.0)
ROTARY = {6: 1.0, 7: 1.0, 8: 1.0, 9: 0.8, 10: 0.3, 11: 0.2, 12: 0.09}


def test_the_report_of_a_success():
    text = EXPERIMENT.report(
        results_of(made_up("mamba-first-ten", ALL), made_up("mamba-uniform", ALL), made_up("attention-rotary", ROTARY))
    )
    assert "**8 of 8 thresholds hold.**" in text and "fail" not in text
    assert "Mamba, first-ten answers every sequence at every length, to 4096 times training." in text
    assert "| 2^12 | 256 | 100.0 | 100 | 100.0 | 9.0 | 8.6 |" in text
    assert "| 2^20 | 16 | 100.0 | 100 | 100.0 |  |  |" in text
    assert "The training of Mamba, first-ten takes all its steps: 30 rounds of 500 steps at the training" in text
    assert "The training of attention, rotary ends at 10 judgements without a mistake" in text
    assert "| 67,008 (74K) | 64 | N(0, 0.1), Δ 1e-05 to 0.1 | first-ten | 8 | 0.005, half a cosine to 0 |" in text
    assert "half a cosine to 0 | 1000 | 10.0 | 100.0 |" in text
    assert "**Not as in the paper:** training begins at the lengths 32, 64, 128" in text
    assert "attention, rotary makes mistakes at 2^9, 2^10, 2^11, 2^12; the longest without is 2^8." in text


def test_the_report_of_a_failure():
    forgets = {**ALL, 19: 0.5, 20: 0.25}
    text = EXPERIMENT.report(
        results_of(
            made_up("mamba-first-ten", forgets, minutes=20.0),
            made_up("attention-rotary", {**ROTARY, 12: 0.5}),
        )
    )
    assert "**3 of 8 thresholds hold.**" in text
    assert "2 cannot be judged" in text  # Mamba, uniform
    assert "| Mamba, first-ten: accuracy at its worst length | all | 25.0 % | **fails** |" in text
    assert (
        "| Mamba, first-ten: minutes of training until the validation set is right | at most 15 | 16.0 | **fails** |"
        in text
    )
    assert "| attention, rotary: accuracy at 16 times the training length | at most 15 % | 50.0 % | **fails** |" in text
    assert "Mamba, first-ten falls short of the paper by more than 5 points at 2^19 (50.0 against 100)" in text
    assert "answers every sequence" not in text


def test_an_arm_that_has_not_learned_shows_nothing_by_failing_far_beyond():
    guesses = dict.fromkeys(range(6, 13), 0.06)
    text = EXPERIMENT.report(results_of(made_up("attention-rotary", guesses, validation=0.06)))
    assert "| attention, rotary: validation accuracy at the training length | all | 6.0 % | **fails** |" in text
    assert "| attention, rotary: accuracy at 16 times the training length | at most 15 % |  | not judged |" in text
    fast = EXPERIMENT.report(results_of(made_up("mamba-first-ten", ALL, validation=0.5, minutes=1.0)))
    assert (
        "| Mamba, first-ten: minutes of training until the validation set is right | at most 15 |  | not judged |"
        in fast
    )


def test_perfect_attention_far_beyond_contradicts_the_paper_and_the_report_says_so():
    text = EXPERIMENT.report(results_of(made_up("attention-rotary", dict.fromkeys(range(6, 13), 1.0))))
    words = "attention, rotary: best accuracy from 4 times the training length on"
    assert f"| {words} | not all | 100.0 % | **fails** |" in text


def test_nothing_measured_is_said_and_drawn_as_such():
    assert EXPERIMENT.report(results_of()) == "Nothing has been measured yet."
    assert EXPERIMENT.figures(results_of()) == {}
