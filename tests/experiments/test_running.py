"""What runs every experiment: resumption, results on disk, charts, and the verb, with arms that cost nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import dataclass, field

import pytest
import torch

from anymamba.cli import main
from anymamba.experiments import EXPERIMENTS, load_experiment
from anymamba.experiments.charts import new_figure, save_figure, spread, table
from anymamba.experiments.experiment import SCALES, Arm, Experiment, Record, Results
from anymamba.experiments.running import duration, provenance, run_experiment

NAME = "dice"


@dataclass(frozen=True)
class Settings:
    sides: int = 6
    shape: tuple[int, ...] = (2, 3)


class Dice(Experiment):
    """Arms whose measurement is one random number; it can be told to fail at the n-th."""

    name = NAME
    title = "Dice"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings, self.measured = settings or Settings(), []
        self.charts = False  # they take longer than all the rest
        self.fail_at: int | None = None
        self.error: BaseException = KeyboardInterrupt()

    def arms(self, scale):
        if scale == "paper":
            raise ValueError("the paper has no dice; choose another scale")
        return [Arm("one", self.settings), Arm("two", self.settings, seeds=3), Arm("three", self.settings)]

    def measure(self, arm, context):
        if len(self.measured) == self.fail_at:
            raise self.error
        self.measured.append((arm.name, context.seed))
        context.progress(1, 2, "rolling")
        return {"roll": torch.rand(()).item(), "device": context.device.type, "pair": (1, 2)}

    def figures(self, results):
        return {"rolls": self.draw(results)} if self.charts else {}

    def draw(self, results):
        figure = new_figure()
        axes = figure.subplots()
        for arm in results.arms:
            axes.plot(results.values(arm, "roll"), "o-", label=arm)
        return figure

    def report(self, results):
        return f"Rolled {len(results.records)} of {len(results.planned)}."


ALL = [("one", 0), ("two", 0), ("two", 1), ("two", 2), ("three", 0)]


@pytest.fixture
def dice(monkeypatch) -> Dice:
    """The experiment, also by name."""
    experiment = Dice()
    module = types.ModuleType("anymamba.experiments.dice")
    module.EXPERIMENT = experiment
    monkeypatch.setitem(sys.modules, "anymamba.experiments.dice", module)
    monkeypatch.setitem(EXPERIMENTS, NAME, "chance")
    return experiment


def arm_files(folder) -> list[str]:
    return sorted(path.name for path in (folder / "arms").iterdir())


# ------------------------------------------------------------------------------------------------- running


def test_every_arm_and_seed_in_the_order_of_the_plan(dice, tmp_path):
    told, dice.charts = [], True
    results = run_experiment(dice, "cpu", tmp_path, progress=lambda *words: told.append(words))
    assert dice.measured == [(r.arm, r.seed) for r in results.records] == ALL
    assert results.arms == ["one", "two", "three"]
    assert told[2] == ("two, seed 1 (3 of 5)", 1, 2, "rolling")
    assert {p.name for p in tmp_path.iterdir()} == {"arms", "results.json", "report.md", "rolls.png", "rolls.svg"}
    assert arm_files(tmp_path) == sorted(f"{arm}-seed{seed}.json" for arm, seed in ALL)
    summary = json.loads((tmp_path / "results.json").read_text())
    assert [(r["arm"], r["seed"]) for r in summary["records"]] == ALL
    assert (summary["experiment"], summary["scale"]) == (NAME, "cpu")
    assert summary["records"][0]["settings"] == {"sides": 6, "shape": [2, 3]}


def test_the_report_has_title_words_chart_and_provenance(dice, tmp_path):
    dice.charts = True
    run_experiment(dice, "cpu", tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("# Dice\n\nRolled 5 of 5.\n\n![rolls](rolls.png)\n\n## How it was run")
    assert "`anymamba experiment dice --scale cpu`" in report
    assert "| two | 3 | 0.0 s |" in report and "Not measured yet" not in report
    assert f"torch {torch.__version__}" in report


def test_a_second_run_measures_nothing(dice, tmp_path):
    first = run_experiment(dice, "cpu", tmp_path)
    again = run_experiment(dice, "cpu", tmp_path)
    assert len(dice.measured) == 5 and again == first


def test_a_seed_decides_an_arms_numbers_whatever_ran_before(dice, tmp_path):
    whole = run_experiment(dice, "cpu", tmp_path / "whole")
    alone = run_experiment(Dice(), "cpu", tmp_path / "alone", only=["three"])
    assert whole.values("three", "roll") == alone.values("three", "roll")
    rolls = whole.values("two", "roll")
    assert len(set(rolls)) == 3 and rolls[0] == whole.values("one", "roll")[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of dice")])
@pytest.mark.parametrize("at", range(5))
def test_after_an_interruption_only_the_rest_is_measured(dice, tmp_path, at, error):
    straight = run_experiment(Dice(), "cpu", tmp_path / "straight")
    dice.fail_at, dice.error = at, error
    with pytest.raises(type(error)):
        run_experiment(dice, "cpu", tmp_path / "resumed")
    done = arm_files(tmp_path / "resumed") if at else []
    assert done == sorted(f"{arm}-seed{seed}.json" for arm, seed in ALL[:at])  # and no half-written ones
    dice.fail_at = None
    resumed = run_experiment(dice, "cpu", tmp_path / "resumed")
    assert dice.measured == ALL
    assert [r.values for r in resumed.records] == [r.values for r in straight.records]


@pytest.mark.parametrize("fill", ["empty", "half", "binary", "other", "list", "null", "absent"])
def test_a_torn_arm_file_costs_that_arm_alone(dice, tmp_path, fill):
    first = run_experiment(dice, "cpu", tmp_path)
    path = tmp_path / "arms" / "two-seed1.json"
    whole = path.read_bytes()
    contents = {"empty": b"", "half": whole[: len(whole) // 2], "binary": b"\xff\xfe\x00", "other": b"{}"}
    contents |= {"list": b"[]", "null": b"null"}
    path.unlink() if fill == "absent" else path.write_bytes(contents[fill])
    dice.measured.clear()
    again = run_experiment(dice, "cpu", tmp_path)
    assert dice.measured == [("two", 1)]
    assert [r.values for r in again.records] == [r.values for r in first.records]
    assert json.loads(path.read_bytes())["record"]["values"] == first.of("two")[1].values


@pytest.mark.parametrize("contents", [b"", b'{"records": [', b"\xff\xfe"])
def test_a_torn_summary_costs_nothing(dice, tmp_path, contents):
    run_experiment(dice, "cpu", tmp_path)
    whole = (tmp_path / "results.json").read_bytes()
    (tmp_path / "results.json").write_bytes(contents)
    (tmp_path / "report.md").unlink()
    dice.measured.clear()
    run_experiment(dice, "cpu", tmp_path)
    assert dice.measured == [] and (tmp_path / "results.json").read_bytes() == whole
    assert (tmp_path / "report.md").exists()


def test_a_write_that_fails_leaves_no_half_arm(dice, tmp_path, monkeypatch):
    run_experiment(dice, "cpu", tmp_path, only=["one"])
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            run_experiment(dice, "cpu", tmp_path, only=["three"])
    assert "three-seed0.json" not in arm_files(tmp_path)
    run_experiment(dice, "cpu", tmp_path)
    assert dice.measured == [("one", 0), ("three", 0), ("two", 0), ("two", 1), ("two", 2), ("three", 0)]


def test_other_settings_in_the_folder_raise_and_nothing_is_overwritten(dice, tmp_path):
    run_experiment(dice, "cpu", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"one-seed0.json was measured with other settings; .* --out"):
        run_experiment(Dice(Settings(sides=20)), "cpu", tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_arm_measured_before_a_setting_existed_is_of_its_default(dice, tmp_path):
    run_experiment(dice, "cpu", tmp_path)
    path = tmp_path / "arms" / "one-seed0.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    del values["record"]["settings"]["shape"]
    path.write_text(json.dumps(values), encoding="utf-8")
    results = run_experiment(dice, "cpu", tmp_path)
    assert len(dice.measured) == 5 and results.of("one")[0].settings["shape"] == [2, 3]
    with pytest.raises(ValueError, match="measured with other settings"):
        run_experiment(Dice(Settings(shape=(4,))), "cpu", tmp_path)


def test_another_scale_or_experiment_in_the_folder_raises(dice, tmp_path):
    run_experiment(dice, "cpu", tmp_path)
    with pytest.raises(ValueError, match=r"is of dice at scale cpu, not dice at gpu; choose another folder"):
        run_experiment(dice, "gpu", tmp_path)
    dice.name = "cards"
    with pytest.raises(ValueError, match=r"is of dice at scale cpu, not cards at cpu"):
        run_experiment(dice, "cpu", tmp_path)


def test_a_folder_of_another_experiment_with_other_arms_is_left_alone(dice, tmp_path):
    run_experiment(dice, "cpu", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    speed = load_experiment("speed")
    with pytest.raises(ValueError, match=r"is of dice at scale cpu, not speed at toy; choose another folder"):
        run_experiment(speed, "toy", tmp_path, only=["operators-64"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(dice, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        run_experiment(dice, "cpu", tmp_path / "file" / "results")
    assert dice.measured == []


def test_missing_matplotlib_is_told_before_anything_is_measured(dice, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "anymamba\[experiments\]"'):
        run_experiment(dice, "cpu", tmp_path)
    assert dice.measured == []


def test_the_summary_is_of_what_was_finished_before_an_interruption(dice, tmp_path):
    dice.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        run_experiment(dice, "cpu", tmp_path)
    summary = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [(record["arm"], record["seed"]) for record in summary["records"]] == ALL[:2]


def test_only_some_arms_in_the_order_of_the_plan(dice, tmp_path):
    results = run_experiment(dice, "cpu", tmp_path, only=["three", "one"])
    assert dice.measured == [("one", 0), ("three", 0)] and results.arms == ["one", "three"]


def test_the_report_is_of_all_that_the_folder_holds(dice, tmp_path):
    run_experiment(dice, "cpu", tmp_path, only=["two"], seeds=2)
    results = run_experiment(dice, "cpu", tmp_path, only=["one"])
    assert dice.measured == [("two", 0), ("two", 1), ("one", 0)]  # the arm that was asked for
    assert [record.key for record in results.records] == ["one-seed0", "two-seed0", "two-seed1"]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Rolled 3 of 5." in text and "Not measured yet: two-seed2, three-seed0." in text


def test_seeds_for_every_arm_and_more_of_them_later(dice, tmp_path):
    run_experiment(dice, "cpu", tmp_path, seeds=1)
    assert dice.measured == [("one", 0), ("two", 0), ("three", 0)]
    results = run_experiment(dice, "cpu", tmp_path, seeds=2)
    assert dice.measured[3:] == [("one", 1), ("two", 1), ("three", 1)]
    assert [len(results.of(arm)) for arm in results.arms] == [2, 2, 2]


@pytest.mark.parametrize("seeds", [0, -1])
def test_less_than_one_seed(dice, tmp_path, seeds):
    with pytest.raises(ValueError, match=f"seeds must be at least 1, got {seeds}"):
        run_experiment(dice, "cpu", tmp_path, seeds=seeds)


def test_an_arm_that_does_not_exist(dice, tmp_path):
    with pytest.raises(ValueError, match="no arm 'four'; there are one, two, three"):
        run_experiment(dice, "cpu", tmp_path, only=["one", "four"])
    assert dice.measured == []


def test_what_is_missing_is_named():
    record = Record("one", 0, {}, {}, 90.0, "abacus", "2026-01-01")
    text = provenance(Dice(), Results(NAME, "cpu", (record,), ("one-seed0", "two-seed0", "two-seed1")))
    assert "| one | 1 | 1.5 min | abacus | 2026-01-01 |" in text
    assert "One seed of all these arms, one after another: 1.5 min." in text
    assert "Not measured yet: two-seed0, two-seed1." in text
    assert [duration(seconds) for seconds in (0.04, 59.9, 60, 614)] == ["0.0 s", "59.9 s", "1.0 min", "10.2 min"]


def test_times_of_arms_with_several_seeds():
    records = tuple(
        Record(arm, seed, {}, {}, seconds, "abacus", "2026-01-01")
        for arm, seed, seconds in (("one", 0, 90.0), ("one", 1, 60.0), ("two", 0, 30.0))
    )
    text = provenance(Dice(), Results(NAME, "cpu", records, ()))
    assert "| one | 2 | 1.0 min to 1.5 min |" in text
    assert "One seed of all these arms, one after another: 1.5 min to 2.0 min." in text


# ------------------------------------------------------------------------------------------------- names


def test_names_of_experiments():
    with pytest.raises(ValueError, match=r"unknown experiment 'nothing'; there are .*selective-copying"):
        load_experiment("nothing")


def test_all_scales_have_a_place(dice, tmp_path):
    for scale in SCALES[:3]:
        run_experiment(dice, scale, tmp_path / scale)
    with pytest.raises(ValueError, match="the paper has no dice"):
        run_experiment(dice, "paper", tmp_path / "paper")


# ------------------------------------------------------------------------------------------------- charts


def test_the_same_figure_gives_the_same_svg(dice, tmp_path):
    results = run_experiment(dice, "cpu", tmp_path)
    for folder in ("a", "b"):
        save_figure(dice.draw(results), tmp_path / folder, "rolls")
    first, second = ((tmp_path / folder / "rolls.svg").read_bytes() for folder in ("a", "b"))
    assert first == second and b"<svg" in first
    assert (tmp_path / "a" / "rolls.png").read_bytes().startswith(b"\x89PNG")
    save_figure(dice.draw(Results(NAME, "cpu", results.records[:2])), tmp_path / "c", "rolls")
    assert (tmp_path / "c" / "rolls.svg").read_bytes() != first


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "anymamba\[experiments\]"'):
        new_figure()


def test_tables_and_spreads():
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert spread([]) == "not run"
    assert spread([0.5], scale=100) == "50.0"
    assert spread([0.25, 0.75], digits=0, scale=100) == "50 (25 to 75)"


# ------------------------------------------------------------------------------------------------- the verb


@dataclass
class Ended:
    code: int
    out: str
    err: str
    error: str = field(init=False)

    def __post_init__(self) -> None:
        self.error = self.err.strip().splitlines()[-1] if self.err.strip() else ""


@pytest.fixture
def verb(capsys, tmp_path, monkeypatch):
    """Runs `anymamba experiment` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Ended:
        code = main(["experiment", *arguments])
        return Ended(code, *capsys.readouterr())

    return call


def test_the_verb_prints_the_report(dice, verb, tmp_path):
    ended = verb(NAME)
    folder = tmp_path / "runs" / "experiments" / "dice-cpu"
    assert ended.code == 0 and ended.out == (folder / "report.md").read_text()
    assert "dice" in ended.err and "rolling" in ended.err and ended.error.startswith("wrote ")
    assert verb(NAME).code == 0 and len(dice.measured) == 5


def test_the_verbs_flags(dice, verb, tmp_path):
    flags = ("--scale", "toy", "--seeds", "2", "--arms", "three", "one", "--out", "here", "--device", "cpu")
    ended = verb(NAME, *flags, "--threads", "1", "--json")
    assert ended.code == 0 and dice.measured == [("one", 0), ("one", 1), ("three", 0), ("three", 1)]
    assert ended.out.count("\n") == 1
    values = json.loads(ended.out)
    assert (values["scale"], len(values["records"])) == ("toy", 4)
    assert values == json.loads((tmp_path / "here" / "results.json").read_text())
    assert "1 threads" in values["records"][0]["machine"]


def test_the_verbs_list(verb):
    ended = verb("list")
    assert ended.code == 0
    assert [line.split()[0] for line in ended.out.splitlines()] == list(EXPERIMENTS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nothing",), "unknown experiment 'nothing'"),
        ((NAME, "--arms", "four"), "no arm 'four'; there are one, two, three"),
        ((NAME, "--seeds", "0"), "seeds must be at least 1"),
        ((NAME, "--scale", "huge"), "huge"),
        ((NAME, "--scale", "paper"), "the paper has no dice"),
        ((), "required options"),
    ],
)
def test_misuse_of_the_verb(dice, verb, arguments, words):
    ended = verb(*arguments)
    assert ended.code == 2 and words in ended.err.lower()
    assert ended.out == "" and "Traceback" not in ended.err and dice.measured == []


def test_the_verb_refuses_a_folder_of_other_settings(dice, verb):
    assert verb(NAME).code == 0
    dice.settings = Settings(sides=8)
    ended = verb(NAME)
    assert ended.code == 2 and "other settings" in ended.error


def test_a_measurement_that_fails_is_exit_code_1(dice, verb):
    dice.fail_at, dice.error = 1, RuntimeError("out of dice")
    ended = verb(NAME)
    assert ended.code == 1 and ended.error == "error: out of dice"


def test_an_interrupted_verb_says_how_to_go_on(dice, verb):
    dice.fail_at = 2
    ended = verb(NAME, "--scale", "gpu")
    assert ended.code == 130 and "go on with: anymamba experiment dice --scale gpu" in ended.error
    dice.fail_at = None
    assert verb(NAME, "--scale", "gpu").code == 0 and dice.measured == ALL


def test_loading_an_experiment_needs_no_matplotlib():
    code = "import sys; from anymamba.experiments import load_experiment as load; load('selective-copying'); "
    code += "sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
