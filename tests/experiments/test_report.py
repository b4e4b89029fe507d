"""The one report: verdicts of thresholds, settings, times, charts, and what is missing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest

from anymamba.lab.charts import new_figure, percent, spread, table
from anymamba.lab.experiment import Arm, Experiment, Record, Results, Threshold
from anymamba.lab.report import duration, how_it_was_run, report, settings_table, verdicts, write_report
from anymamba.models.config import ModelConfig
from tests.experiments.conftest import rows


@dataclass(frozen=True)
class Inner:
    depth: int = 1


@dataclass(frozen=True)
class Settings:
    sides: int
    model: ModelConfig
    several: tuple[Inner, ...] = (Inner(1), Inner(2))
    inner: Inner = field(default_factory=Inner)
    absent: float | None = None


def draw(results: Results):
    figure = new_figure()
    figure.subplots().plot(results.values("one", "roll"), "o-")
    return figure


DICE = Experiment(
    name="dice",
    title="Dice",
    protocol="\nA roll is a random number.\n",
    arms=lambda scale: [
        Arm(name, Settings(sides, ModelConfig(d_model=8, n_layers=n)))
        for name, sides, n in (("one", 6, 2), ("two", 8, 2))
    ],
    measure=lambda settings, context: {},
    thresholds=lambda results: [Threshold("rolls", results.values("one", "roll"), at_least=0.5)],
    sections=lambda results: {"Rolls": "All rolls.", "Nothing": ""},
    figures={"rolls": draw, "none": lambda results: None},
)


def record(arm: str, seed: int, roll: float = 0.7, seconds: float = 90.0) -> Record:
    return Record(arm, seed, {}, {"roll": roll}, seconds, "abacus", "2026-01-01")


RESULTS = Results("dice", "cpu", (record("one", 0), record("one", 1, 0.2, 60.0), record("two", 0)), ("one-seed0",))


@pytest.mark.parametrize(
    ("bounds", "got", "verdict", "wanted"),
    [
        ({"at_least": 2}, [2, 3], "holds", "at least 2"),
        ({"at_least": 2}, [1.9, 3], "fails", "at least 2"),
        ({"at_most": 2}, [2, 2.1], "fails", "at most 2"),
        ({"below": 2}, [2.0], "fails", "below 2"),
        ({"below": 2}, [1.9], "holds", "below 2"),
        ({"at_least": 1, "at_most": 2}, [1, 1.5, 2], "holds", "at least 1, at most 2"),
        ({"at_least": 1}, [], "not judged", "at least 1"),
        ({"at_least": 1}, [None, None], "not judged", "at least 1"),
        ({"at_least": 1}, [None, 1], "holds", "at least 1"),
        ({"at_least": 1}, [math.inf], "fails", "at least 1"),
        ({"at_least": 1}, [math.nan], "fails", "at least 1"),
        ({"at_least": 0.01, "tie": 0.01}, [-0.01], "tie", "at least 0.01"),
        ({"at_least": 0.01, "tie": 0.01}, [0.02], "holds", "at least 0.01"),
        ({"at_least": 0.01, "tie": 0.01}, [-0.02], "fails", "at least 0.01"),
        ({"at_least": -0.01}, [0.0], "holds", "at least -0.01"),
    ],
)
def test_thresholds(bounds, got, verdict, wanted):
    threshold = Threshold("x", got, **bounds)
    assert (threshold.verdict, threshold.wanted) == (verdict, wanted)


def test_the_verdict_counts_and_names():
    fails, unknown = Threshold("low", [0], at_least=1), Threshold("gone", [], at_least=1)
    tie, holds = Threshold("same", [0], at_least=1, tie=0.5), Threshold("high", [2], at_least=1)
    words = verdicts([fails, unknown, tie, holds, unknown])
    assert words.startswith("**1 of 5 thresholds hold.**") and "low" in words and "same" in words
    assert "2 cannot be judged" in words and "gone" not in words and "high" not in words


def test_the_parts_of_a_report_in_order():
    text = report(DICE, RESULTS, charts=["rolls"])
    parts = ["# Dice", "**0 of 1", "A roll is", "## Rolls", "All rolls.", "## Thresholds", "![rolls](rolls.svg)"]
    parts += ["## Settings", "## How it was run", "`anymamba experiment dice --scale cpu`"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places) and "## Nothing" not in text and "notes.md" not in text
    assert rows(text[text.index("## Thresholds") :]) == [["rolls", "at least 0.5", "0.2 to 0.7", "**fails**"]]


def test_the_scale_toy_is_not_judged():
    """Its models are too small and too briefly trained to pass or to fail."""
    text = report(DICE, replace(RESULTS, scale="toy"))
    assert "**Not judged.**" in text and "`--scale cpu` gives a verdict" in text
    assert "fail" not in text and "thresholds hold" not in text
    assert rows(text[text.index("## Thresholds") :]) == [["rolls", "at least 0.5", "0.2 to 0.7", "not judged"]]


def test_notes_beside_the_results_are_linked(tmp_path):
    for name, linked in (("without", False), ("with", True)):
        (tmp_path / name).mkdir()
        if linked:
            (tmp_path / name / "notes.md").touch()
        write_report(tmp_path / name, DICE, RESULTS)
        assert ("[notes](notes.md)" in (tmp_path / name / "report.md").read_text()) is linked


def test_settings_are_those_of_the_arms_that_were_measured():
    assert rows(settings_table(DICE, RESULTS)) == [
        ["`sides`", "6; 8"],
        ["`model.d_model`", "8"],
        ["`model.n_layers`", "2"],
        ["`several`", "(depth 1), (depth 2)"],
        ["`inner.depth`", "1"],
        ["`absent`", "none"],
    ]
    assert ["`sides`", "6"] in rows(settings_table(DICE, replace(RESULTS, records=RESULTS.records[:2])))


def test_times_of_arms_with_several_seeds():
    text = how_it_was_run(RESULTS)
    assert rows(text) == [
        ["one", "2", "1.0 min to 1.5 min", "abacus", "2026-01-01"],
        ["two", "1", "1.5 min", "abacus", "2026-01-01"],
    ]
    assert "2.5 min to 3.0 min" in text and "Not measured yet" not in text
    assert [duration(seconds) for seconds in (0.04, 59.9, 60, 614)] == ["0.0 s", "59.9 s", "1.0 min", "10.2 min"]


def test_what_is_missing_is_named():
    text = how_it_was_run(replace(RESULTS, planned=("one-seed0", "two-seed0", "two-seed1", "three-seed0")))
    assert "Not measured yet: two-seed1, three-seed0." in text


def test_charts_are_svg_and_the_same_results_give_the_same_bytes(tmp_path):
    other = replace(RESULTS, records=(record("one", 0, 0.9), record("one", 1, 0.1)))
    found = []
    for i, results in enumerate((RESULTS, RESULTS, other)):
        folder = tmp_path / str(i)
        folder.mkdir()
        write_report(folder, DICE, results)
        assert {path.name for path in folder.iterdir()} == {"report.md", "rolls.svg"}
        found.append((folder / "rolls.svg").read_bytes())
    assert b"<svg" in found[0] and found[0] == found[1] != found[2]


def test_tables_and_spreads():
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert spread([]) == ""
    assert spread([0.5], scale=100) == percent(0.5) == "50.0"
    assert spread([0.25, 0.75], digits=0, scale=100) == "50 (25 to 75)"
