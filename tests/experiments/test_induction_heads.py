"""Induction heads: asking in pieces, counting, settings of each scale, a toy arm, thresholds, tables and charts."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from anymamba.data.synthetic.induction import induction_sequences
from anymamba.experiments.induction_heads import EXPERIMENT, measure
from anymamba.experiments.induction_heads.arms import PAPER, arms_at
from anymamba.experiments.induction_heads.measure import count_right, last_predictions, learn_growing
from anymamba.lab.experiment import SCALES, Context, Results
from anymamba.lab.learning import Score, build_model
from anymamba.lab.saving import SUFFIX, OutOfTime, Saving
from anymamba.models.language_model import LanguageModel
from tests.experiments.conftest import made_up, measured, rows, verdicts

TOY = {arm.name: arm for arm in arms_at("toy")}
CPU = torch.device("cpu")


class Recaller:
    """Answers by rule instead of by weights; its state is what it has seen of the first trigger.

    `growing` makes it a model that must be given whole sequences: it forgets its state.
    """

    def __init__(self, n_tokens: int, shift: int = 0, growing: bool = False) -> None:
        self.n_tokens, self.shift = n_tokens, shift
        self.config, self.grows = SimpleNamespace(vocab_size=n_tokens + 1), growing
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


def test_rounds_go_on_where_they_were(tmp_path):
    """Interrupted after each step, a training of three rounds ends as one without a stop."""
    settings = replace(TOY["mamba-uniform"].settings, lengths_before=(8,), cycles=2)

    def learned(saving) -> dict:
        torch.manual_seed(0)
        model = build_model(settings.model, Context(CPU, 0, lambda *_: None))
        return learn_growing(model, settings, Context(CPU, 0, lambda *_: None, saving))

    wanted, found, runs = learned(None), None, 0
    while found is None:
        runs += 1
        with suppress(OutOfTime):
            found = learned(Saving(tmp_path / f"arm{SUFFIX}", {}, deadline=0.0))
    assert runs > 3 and all(found[key] == wanted[key] for key in ("curve", "stages", "steps", "accuracy"))


def test_a_shorter_length_is_left_when_enough_is_right_and_the_last_one_is_not(monkeypatch):
    told, rates, in_a_row = [], [], []

    def learn(model, optimization, make, validation, context, *, every, enough, perfect_in_a_row, generator, resumable):
        assert resumable
        in_a_row.append(perfect_in_a_row)
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
    assert in_a_row == [None, None, settings.perfect_in_a_row, settings.perfect_in_a_row]
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


def test_a_toy_arm_is_trained_in_rounds_and_asked_at_every_length():
    values = measure(TOY["mamba-first-ten"].settings, Context(CPU, 0, lambda *told: None))
    assert values["stages"] == [[8, 4], [16, 4], [16, 4]] and values["steps"] == 12
    assert [point[0] for point in values["curve"]] == [2, 4, 6, 8, 10, 12]
    assert [(t["length"], t["sequences"]) for t in values["tests"]] == [(8, 8), (16, 8), (32, 8), (64, 2)]


# ------------------------------------------------------------------------------------------------------------- results

ALL = dict.fromkeys(range(6, 21), 1.0)
ROTARY = {6: 1.0, 7: 1.0, 8: 1.0, 9: 0.8, 10: 0.3, 11: 0.2, 12: 0.09}


def results_of(arms: dict[str, dict[int, float]], *, validation: float = 1.0, minutes: float = 10.0) -> Results:
    """Results at scale cpu with these accuracies at 2^i."""

    def values(name, shares):
        settings = next(arm.settings for arm in arms_at("cpu") if arm.name == name)
        sequences = {2**i: settings.rows_at(2**i) for i in shares}
        return {
            "accuracy": validation,
            "steps": 1000,
            "training_seconds": 60 * minutes,
            "parameters": 67_008,
            "curve": [[100, 2.0, 1.0], [500, 2.7, 0.1], [800, 0.1, validation], [1000, 0.1, validation]],
            "stages": [[32, 100], [256, 500], [256, 400]],
            "tests": [
                {"length": length, "sequences": n, "right": round(share * n), "seconds": 1.0}
                for (length, n), share in zip(sequences.items(), shares.values(), strict=True)
            ],
        }

    return made_up(EXPERIMENT, "cpu", {name: [values(name, shares)] for name, shares in arms.items()})


def test_thresholds_of_a_success():
    results = results_of({"mamba-first-ten": ALL, "mamba-uniform": ALL, "attention-rotary": ROTARY})
    assert verdicts(EXPERIMENT, results) == ["holds"] * 8
    wanted = [1, 1, 8.0, 1, 1, 1, 77 / 256, 23 / 256]  # right after 800 steps; best from 1024 on; at 4096
    assert list(chain.from_iterable(measured(EXPERIMENT, results))) == pytest.approx(wanted)


def test_thresholds_of_a_failure():
    arms = {"mamba-first-ten": {**ALL, 19: 0.5, 20: 0.25}, "attention-rotary": {**ROTARY, 12: 0.5}}
    results = results_of(arms, minutes=20.0)
    assert verdicts(EXPERIMENT, results) == [
        *("holds", "fails", "fails"),
        *("not judged", "not judged"),
        *("holds", "holds", "fails"),
    ]
    assert measured(EXPERIMENT, results)[1:3] == [[0.25], [pytest.approx(16.0)]]


def test_an_arm_that_has_not_learned_shows_nothing_by_failing_far_beyond():
    guesses = {"mamba-first-ten": ALL, "attention-rotary": dict.fromkeys(range(6, 13), 0.06)}
    results = results_of(guesses, validation=0.06, minutes=1.0)
    assert verdicts(EXPERIMENT, results) == [
        *("fails", "holds", "not judged"),
        *("not judged", "not judged"),
        *("fails", "not judged", "not judged"),
    ]


def test_perfect_attention_far_beyond_contradicts_the_paper():
    results = results_of({"attention-rotary": dict.fromkeys(range(6, 13), 1.0)})
    assert verdicts(EXPERIMENT, results)[5:] == ["holds", "fails", "fails"]


def test_tables_are_beside_the_papers():
    results = results_of({"mamba-first-ten": ALL, "mamba-uniform": {**ALL, 7: 0.5}, "attention-rotary": ROTARY})
    training, lengths = (rows(text) for text in EXPERIMENT.sections(results).values())
    assert [row[-2] for row in training] == ["15 of 15, longest 2^20", "14 of 15, longest 2^20", "3 of 7, longest 2^8"]
    assert training[0][:8] == ["Mamba, first-ten", "67,008 (74K)", "64", "8", "0.005", "1000", "10.0", "100.0"]
    assert training[2][-1] == f"{256 * (2**13 - 2**6) / 7:,.0f}"
    assert lengths[6] == ["2^12", "256", "100.0", "100", "100.0", "9.0", "8.6"]
    assert lengths[14] == ["2^20", "16", "100.0", "100", "100.0", "", ""]


def test_the_charts_show_every_arm_and_the_paper():
    results = results_of({"mamba-first-ten": ALL, "mamba-uniform": ALL, "attention-rotary": ROTARY})
    (lengths,), (learning,) = (draw(results).axes for draw in EXPERIMENT.figures.values())
    lines = {line.get_label(): list(line.get_xdata()) for line in lengths.get_lines()}
    assert lines["attention, rotary"] == [2**i for i in ROTARY] and "paper: Mamba" in lines
    assert learning.get_xscale() == "log" and lengths.get_xlabel() and learning.get_ylabel()
