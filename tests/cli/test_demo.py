"""`anymamba demo`: its pure functions, and a run of a few seconds."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from anymamba.cli import demo
from anymamba.data.table import TokenTable

SCORES = [demo.Score("a", 2.5, "one"), demo.Score("b", 2.25, "two"), demo.Score("c", 3.0, "three")]


def rendered(*tables) -> str:
    console = Console(file=io.StringIO(), width=100)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def test_the_winner_has_fewest_bits():
    assert demo.winner(SCORES).name == "b"
    assert demo.winner([demo.Score("x", 1.0, ""), demo.Score("y", 1.0, "")]).name == "x"


def test_the_table_has_every_score_and_marks_the_winner():
    text = rendered(demo.score_table(SCORES, "7 files"))
    for score in SCORES:
        line = next(line for line in text.splitlines() if score.note in line)
        assert f"{score.bits_per_byte:.3f}" in line
        assert ("*" in line) == (score.name == "b")
    assert "7 files" in text and "bits per byte" in text


def test_the_speeds():
    text = rendered(demo.speed_table({"training": 1234.5, "decoding": 99.6}))
    assert "1,234" in text and "100" in text and "tokens per second" in text


def test_the_winner_and_the_backends_are_named(capsys):
    demo.print_tables(SCORES, "7 files", {"training": 1.0}, ["selective_scan: portable (3 forward)"])
    out = capsys.readouterr().out
    assert "The winner is b." in out and "selective_scan: portable (3 forward)" in out


def test_backends_that_ran():
    calls = {("scan", "portable", "forward"): 2000, ("scan", "portable", "step"): 3, ("conv", "cpu", "forward"): 1}
    assert demo.backends_that_ran(calls) == ["conv: cpu (1 forward)", "scan: portable (2,000 forward, 3 step)"]


def test_a_free_folder_is_found(tmp_path):
    wanted = tmp_path / "demo"
    assert demo.free_folder(wanted) == wanted
    wanted.mkdir()
    assert demo.free_folder(wanted) == tmp_path / "demo-2"
    (tmp_path / "demo-2").write_text("a file is in the way, too")
    assert demo.free_folder(wanted) == tmp_path / "demo-3"


@pytest.mark.parametrize(
    ("minutes", "seconds_per_step", "steps"),
    [(3, 0.18, 996), (0.1, 0.18, 30), (0.001, 10, 2), (3, 60, 3), (3, 0.001, 7812)],
)
def test_steps_fit_into_the_time_and_the_budget(minutes, seconds_per_step, steps):
    assert demo.affordable_steps(minutes, seconds_per_step) == steps


def test_the_timer_takes_the_median():
    timer = demo.StepTimer()
    timer.times = [0.0, 9.0, 9.2, 9.4, 9.6]
    assert timer.seconds_per_step() == pytest.approx(0.2)


@pytest.mark.parametrize("steps", [1, 2, 5, 1000])
def test_a_plan_of_any_length_is_a_valid_config(steps):
    assert demo.plan(demo.DataConfig(), demo.SIZES[0].model, steps, seed=0).steps == steps


@pytest.mark.parametrize(("slowness", "chosen"), [(1, 0), (6, 1), (60, 1)])
def test_a_slow_machine_trains_a_smaller_model(slowness, chosen):
    """The speeds of two quiet cores, and those of machines that are so many times as slow."""
    seconds = dict(zip(demo.SIZES, (0.04, 0.013), strict=True))
    size, steps = demo.choose_size(3, lambda size: slowness * seconds[size])
    assert size is demo.SIZES[chosen]
    assert steps == demo.affordable_steps(3, slowness * seconds[size])


def test_models_get_smaller_as_they_need_fewer_tokens():
    assert [size.enough for size in demo.SIZES] == sorted((size.enough for size in demo.SIZES), reverse=True)
    assert demo.SIZES[-1].enough == 0, "the smallest serves any machine"


def test_chosen_documents_stay_within_the_limit_and_are_always_the_same():
    sizes = list(np.random.default_rng(0).integers(1, 5000, 200))
    chosen = demo.choose_documents(sizes, 50_000)
    assert chosen == demo.choose_documents(sizes, 50_000)
    assert len(set(chosen)) == len(chosen)
    assert 45_000 < sum(sizes[i] for i in chosen) <= 50_000
    assert demo.choose_documents([100], 10) == [0]


def test_texts_are_the_bytes_of_the_documents():
    table = TokenTable.from_arrays([list(b"one"), list(b"\xff\x00")])
    assert demo.texts(table) == [b"one", b"\xff\x00"]


def test_training_and_held_out_files_do_not_overlap():
    training, held_out = demo.corpus()
    assert training and held_out and not set(training) & set(held_out)
    assert len(held_out) < 0.2 * len(training)


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_minutes_out_of_range(run, minutes):
    code, _, err = run("demo", f"--minutes={minutes}")
    assert code == 2 and "minutes" in err


@pytest.mark.slow
def test_the_demo_in_seconds(run, tmp_path):
    out = tmp_path / "demo"
    out.mkdir()
    code, text, err = run("demo", "--minutes", 0.1, "--out", out, "--json")
    assert code == 0, err
    assert list(out.iterdir()) == [] and f"{out} exists" in err
    made = tmp_path / "demo-2"
    assert (made / "config.json").exists() and (made / "loss.png").exists()
    result = json.loads(text)
    names = ["Mamba", "order-3 byte model", "zlib -9", "xz -9e"]
    assert [score["name"] for score in result["scores"]] == names
    assert result["winner"] == min(result["scores"], key=lambda score: score["bits_per_byte"])["name"]
    assert 1.0 < result["scores"][0]["bits_per_byte"] < 7.9  # it has learnt something
    assert result["sample"].startswith(demo.PROMPT)
    assert all(speed > 0 for speed in result["speeds"].values())
    assert any(line.startswith("selective_scan: ") for line in result["backends"])
