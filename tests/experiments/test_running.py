"""What runs every experiment: resumption, results on disk, and the verb, with arms that cost nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace

import pytest
import torch

from anymamba.base.files import own_file
from anymamba.cli import main
from anymamba.experiments import EXPERIMENTS, load_experiment
from anymamba.lab.experiment import SCALES, Arm, Experiment, Record, Results, Threshold
from anymamba.lab.results import FIELDS, read_results, write_results
from anymamba.lab.running import run_experiment
from anymamba.lab.saving import OutOfTime

NAME = "dice"


@dataclass(frozen=True)
class Settings:
    sides: int = 6
    shape: tuple[int, ...] = (2, 3)


class Dice:
    """Makes an experiment whose measurement is one random number; it can be told to fail at the n-th."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings, self.measured = settings or Settings(), []
        self.fail_at: int | None = None
        self.error: BaseException = KeyboardInterrupt()

    def arms(self, scale):
        if scale == "paper":
            raise ValueError("the paper has no dice; choose another scale")
        return [Arm("one", self.settings), Arm("two", self.settings, seeds=3), Arm("three", self.settings)]

    def measure(self, settings, context):
        if len(self.measured) == self.fail_at:
            raise self.error
        self.measured.append(context.seed)
        context.progress(1, 2, "rolling")
        return {"roll": torch.rand(()).item(), "device": context.device.type, "pair": (1, 2)}

    @property
    def experiment(self) -> Experiment:
        return Experiment(
            name=NAME,
            title="Dice",
            protocol="A roll is a random number.",
            arms=self.arms,
            measure=self.measure,
            thresholds=lambda results: [Threshold("rolls", [len(results.records)], at_least=5)],
            sections=lambda results: {"Rolls": f"Rolled {len(results.records)} of {len(results.planned)}."},
            figures={},  # drawing takes longer than all the rest
        )


ALL = [("one", 0), ("two", 0), ("two", 1), ("two", 2), ("three", 0)]


@pytest.fixture
def dice(monkeypatch) -> Dice:
    """The dice, also by name."""
    found = Dice()
    module = types.ModuleType("anymamba.experiments.dice")
    module.EXPERIMENT = found.experiment
    monkeypatch.setitem(sys.modules, "anymamba.experiments.dice", module)
    monkeypatch.setitem(EXPERIMENTS, NAME, "chance")
    return found


def run(dice, folder, scale="cpu", **options) -> Results:
    return run_experiment(dice.experiment, scale, folder, **options)


def in_file(folder) -> list[tuple[str, int]]:
    """Arms and seeds that results.json holds; none where it does not exist."""
    results = read_results(folder)
    return [(record.arm, record.seed) for record in results.records] if results else []


def files(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------- running


def test_every_arm_and_seed_in_the_order_of_the_plan(dice, tmp_path):
    told = []
    results = run(dice, tmp_path, progress=lambda *words: told.append(words))
    assert [(r.arm, r.seed) for r in results.records] == ALL and dice.measured == [seed for _, seed in ALL]
    assert results.arms == results.planned_arms == ["one", "two", "three"]
    assert told[2] == ("two, seed 1 (3 of 5)", 1, 2, "rolling")
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "report.md"}
    summary = json.loads((tmp_path / "results.json").read_text())
    assert [(r["arm"], r["seed"]) for r in summary["records"]] == ALL
    assert (summary["experiment"], summary["scale"]) == (NAME, "cpu")
    assert summary["records"][0]["settings"] == {"sides": 6, "shape": [2, 3]}
    assert summary["records"][0]["values"]["pair"] == [1, 2]
    assert read_results(tmp_path) == results


def test_a_seed_decides_an_arms_numbers_whatever_ran_before(dice, tmp_path):
    whole, alone = run(dice, tmp_path / "whole"), run(Dice(), tmp_path / "alone", only=["three"])
    assert whole.values("three", "roll") == alone.values("three", "roll")
    rolls = whole.values("two", "roll")
    assert len(set(rolls)) == 3 and rolls[0] == whole.values("one", "roll")[0]
    assert whole.mean("two", "roll") == sum(rolls) / 3 and alone.mean("two", "roll") is None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of dice")])
@pytest.mark.parametrize("at", range(5))
def test_after_an_interruption_only_the_rest_is_measured(dice, tmp_path, at, error):
    straight = run(Dice(), tmp_path / "straight")
    dice.fail_at, dice.error = at, error
    with pytest.raises(type(error)):
        run(dice, tmp_path / "resumed")
    assert in_file(tmp_path / "resumed") == ALL[:at]
    dice.fail_at = None
    resumed = run(dice, tmp_path / "resumed")
    assert len(dice.measured) == 5
    assert [r.values for r in resumed.records] == [r.values for r in straight.records]


def test_a_run_needs_results_json_alone(dice, tmp_path):
    whole = run(dice, tmp_path / "whole")
    write_results(tmp_path, replace(whole, records=whole.records[:2] + whole.records[3:]))
    again = run(dice, tmp_path)
    assert dice.measured[5:] == [1] and [r.values for r in again.records] == [r.values for r in whole.records]


def test_what_another_process_adds_meanwhile_is_kept(dice, tmp_path):
    other = run(Dice(), tmp_path / "other").of("three")

    def add(*told):
        write_results(tmp_path, Results(NAME, "cpu", (*getattr(read_results(tmp_path), "records", ()), *other)))

    run(dice, tmp_path, only=["one"], progress=add)
    assert in_file(tmp_path) == [("one", 0), ("three", 0)]


def test_commands_that_share_a_folder_share_the_work(dice, tmp_path):
    """Three at once, as threads, which own files as processes do: every arm is measured once, and all report all."""
    measure = dice.measure

    def slowly(settings, context):
        time.sleep(0.05)
        return measure(settings, context)

    shared = replace(dice.experiment, measure=slowly)
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(run_experiment, shared, "cpu", tmp_path) for _ in range(3)]
        reported = [future.result() for future in running]
    assert sorted(dice.measured) == [0, 0, 0, 1, 2] and in_file(tmp_path) == ALL
    assert [[(r.arm, r.seed) for r in results.records] for results in reported] == [ALL] * 3
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md"}


def test_an_arm_whose_process_died_is_measured_by_the_one_that_waits(dice, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        with own_file(tmp_path / "one-seed0"):
            other = pool.submit(run, dice, tmp_path)
            while len(in_file(tmp_path)) < 4:
                time.sleep(0.01)
            assert ("one", 0) not in in_file(tmp_path), "the other has left it to us and does the rest"
        assert other.result() and in_file(tmp_path) == ALL


@pytest.mark.parametrize("contents", [b"", b'{"records": [', b"\xff\xfe", b"{}", b"[]", b"null", b'{"records": [1]}'])
def test_a_file_that_is_not_one_of_results_is_never_overwritten(dice, tmp_path, contents):
    (tmp_path / "results.json").write_bytes(contents)
    with pytest.raises(ValueError, match=r"results.json is not a file of results .*choose another folder with --out"):
        run(dice, tmp_path)
    assert files(tmp_path) == {tmp_path / "results.json": contents} and dice.measured == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"values": {}}, "record 2, two-seed0: values must be an object with at least one value, got {}"),
        ({"values": None}, "record 2, two-seed0: values must be an object with at least one value, got None"),
        ({"seed": "x"}, "record 2, two-seedx: seed must be an integer, got 'x'"),
        ({"seed": True}, "record 2, two-seedTrue: seed must be an integer, got True"),
        ({"seconds": None}, "record 2, two-seed0: seconds must be a number, got None"),
        ({"settings": []}, r"record 2, two-seed0: settings must be an object, got \[\]"),
        ({"arm": 1}, "record 2, 1-seed0: arm must be a string, got 1"),
        ({"other": 1}, "record 2, two-seed0: other is unknown"),
        ({"date": ...}, "record 2, two-seed0: date is missing"),
    ],
)
def test_a_damaged_record_is_named(dice, tmp_path, change, words):
    run(dice, tmp_path)
    path = tmp_path / "results.json"
    values = json.loads(path.read_text())
    record = values["records"][1] | change
    values["records"][1] = {name: value for name, value in record.items() if value is not ...}
    path.write_text(json.dumps(values))
    before = files(tmp_path)
    with pytest.raises(ValueError, match=rf"results.json is not a file of results .*{words}.*; choose another folder"):
        run(dice, tmp_path)
    assert files(tmp_path) == before


def test_the_fields_of_a_record_are_all_checked():
    assert list(FIELDS) == [f.name for f in fields(Record)]


def test_a_write_that_fails_leaves_what_there_was(dice, tmp_path, monkeypatch):
    run(dice, tmp_path, only=["one"])
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            run(dice, tmp_path, only=["three"])
    assert files(tmp_path) == before
    run(dice, tmp_path)
    assert in_file(tmp_path) == ALL


def test_other_settings_in_the_folder_raise_and_nothing_is_overwritten(dice, tmp_path):
    run(dice, tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"one-seed0 in .*results.json was measured with other settings; .* --out"):
        run(Dice(Settings(sides=20)), tmp_path)
    assert files(tmp_path) == before


def test_an_arm_measured_before_a_setting_existed_is_of_its_default(dice, tmp_path):
    first = run(dice, tmp_path).records[0]
    write_results(tmp_path, Results(NAME, "cpu", (replace(first, settings={"sides": 6}),)))
    results = run(dice, tmp_path, only=["one"])
    assert len(dice.measured) == 5 and results.of("one")[0].settings["shape"] == [2, 3]
    with pytest.raises(ValueError, match="measured with other settings"):
        run(Dice(Settings(shape=(4,))), tmp_path)


def test_another_scale_or_experiment_in_the_folder_raises(dice, tmp_path):
    run(dice, tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"results of dice at scale gpu, got dice at scale cpu; choose another folder"):
        run(dice, tmp_path, "gpu")
    with pytest.raises(ValueError, match=r"results of speed at scale toy, got dice at scale cpu; choose"):
        run_experiment(load_experiment("speed"), "toy", tmp_path, only=["operators-64"])
    assert files(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(dice, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        run(dice, tmp_path / "file" / "results")
    assert dice.measured == []


def test_missing_matplotlib_is_told_before_anything_is_measured(dice, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "anymamba\[experiments\]"'):
        run(dice, tmp_path)
    assert dice.measured == []


def test_only_some_arms_in_the_order_of_the_plan(dice, tmp_path):
    assert run(dice, tmp_path, only=["three", "one"]).arms == ["one", "three"]


def test_the_report_is_of_all_that_the_folder_holds(dice, tmp_path):
    run(dice, tmp_path, only=["two"], seeds=2)
    results = run(dice, tmp_path, only=["one"])
    assert dice.measured == [0, 1, 0]
    assert [record.key for record in results.records] == ["one-seed0", "two-seed0", "two-seed1"]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Rolled 3 of 5." in text and "Not measured yet: two-seed2, three-seed0." in text


def test_seeds_for_every_arm_and_more_of_them_later(dice, tmp_path):
    run(dice, tmp_path, seeds=1)
    assert dice.measured == [0, 0, 0]
    results = run(dice, tmp_path, seeds=2)
    assert dice.measured[3:] == [1, 1, 1]
    assert [len(results.of(arm)) for arm in results.arms] == [2, 2, 2]
    assert "two-seed2" in run(dice, tmp_path, only=["one"]).planned


@pytest.mark.parametrize("seeds", [0, -1])
def test_less_than_one_seed(dice, tmp_path, seeds):
    with pytest.raises(ValueError, match=f"seeds must be at least 1, got {seeds}"):
        run(dice, tmp_path, seeds=seeds)


def test_seeds_where_they_change_nothing(dice, tmp_path):
    same = replace(dice.experiment, has_seeds=False)
    with pytest.raises(ValueError, match="dice gives the same numbers for every seed, got seeds 3; leave seeds away"):
        run_experiment(same, "toy", tmp_path, seeds=3)
    assert not load_experiment("zero-shot").has_seeds


def test_an_arm_that_does_not_exist(dice, tmp_path):
    with pytest.raises(ValueError, match="unknown arm 'four'; the arms are one, two, three"):
        run(dice, tmp_path, only=["one", "four"])
    assert dice.measured == []


def test_scales_and_names_that_do_not_exist(dice, tmp_path):
    for scale in SCALES[:3]:
        run(dice, tmp_path / scale, scale)
    with pytest.raises(ValueError, match="the paper has no dice"):
        run(dice, tmp_path / "paper", "paper")
    with pytest.raises(ValueError, match=r"unknown experiment 'nothing'; the experiments are .*selective-copying"):
        load_experiment("nothing")


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
    assert ended.code == 0 and in_file(tmp_path / "here") == [("one", 0), ("one", 1), ("three", 0), ("three", 1)]
    assert ended.out.count("\n") == 1
    values = json.loads(ended.out)
    assert values == json.loads((tmp_path / "here" / "results.json").read_text()) and values["scale"] == "toy"
    assert "1 threads" in values["records"][0]["machine"]


def test_the_verbs_list(verb):
    ended = verb("list")
    assert ended.code == 0
    assert [line.split()[0] for line in ended.out.splitlines()] == list(EXPERIMENTS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nothing",), "unknown experiment 'nothing'"),
        ((NAME, "--arms", "four"), "unknown arm 'four'; the arms are one, two, three"),
        ((NAME, "--seeds", "0"), "seeds must be at least 1"),
        ((NAME, "--max-minutes", "-1"), "--max-minutes must be at least 0 and finite, got -1"),
        ((NAME, "--max-minutes", "inf"), "--max-minutes must be at least 0 and finite, got inf"),
        ((NAME, "--max-minutes", "nan"), "--max-minutes must be at least 0 and finite, got nan"),
        ((NAME, "--scale", "huge"), "huge"),
        ((NAME, "--scale", "paper"), "the paper has no dice"),
        ((), "name must be given"),
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
    assert verb(NAME, "--scale", "gpu").code == 0 and len(dice.measured) == 5


def test_loading_an_experiment_needs_no_matplotlib():
    code = "import sys; from anymamba.experiments import load_experiment as load; load('selective-copying'); "
    code += "sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_arm_begins_after_the_time_of_a_run(tmp_path):
    dice = Dice()
    results = run_experiment(dice.experiment, "cpu", tmp_path, max_seconds=0)
    assert not dice.measured and not results.records and "Not measured yet: one-seed0" in report(tmp_path)
    assert len(run_experiment(dice.experiment, "cpu", tmp_path, max_seconds=60).records) == 5


def test_an_arm_that_runs_out_of_time_keeps_its_state_until_it_is_finished(tmp_path):
    dice = Dice()

    def measure(settings, context):
        if context.saving.path.exists():
            return {"roll": 1.0, "seen": len(context.finished().records), "data": str(context.data)}
        context.saving.path.write_text("state")
        raise OutOfTime

    experiment = replace(dice.experiment, measure=measure)
    for done in range(5):
        results = run_experiment(experiment, "cpu", tmp_path, data=tmp_path)
        assert len(results.records) == done and len(list(tmp_path.glob("*.unfinished.safetensors"))) == 1
    results = run_experiment(experiment, "cpu", tmp_path, data=tmp_path)
    assert [record.values["seen"] for record in results.records] == [0, 1, 2, 3, 4]
    assert not list(tmp_path.glob("*.unfinished.safetensors"))


def report(folder) -> str:
    return (folder / "report.md").read_text()


def test_the_verb_takes_a_time_and_a_folder_of_data(dice, verb, monkeypatch, tmp_path):
    ended = verb(NAME, "--max-minutes", "0")
    assert ended.code == 0 and "Not measured yet" in ended.out and not dice.measured
    told = replace(dice.experiment, measure=lambda settings, context: {"data": str(context.data)})
    monkeypatch.setattr(sys.modules["anymamba.experiments.dice"], "EXPERIMENT", told)
    assert verb(NAME, "--max-minutes", "5", "--data", "books").code == 0
    records = json.loads((tmp_path / "runs" / "experiments" / "dice-cpu" / "results.json").read_text())["records"]
    assert [record["values"] for record in records] == [{"data": "books"}] * 5
