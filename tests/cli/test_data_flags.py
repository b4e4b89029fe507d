"""The flags of data that `train` and `eval` share, and what is said of data at the start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from anymamba.cli import train
from anymamba.training.tables import is_held_out

SMALL = ["--model.d-model", "8", "--model.n-layers", "1", "--batch-size", "2", "--context", "16", "--steps", "1"]


def options(*arguments: object) -> train.TrainOptions:
    return train.read_options([str(a) for a in arguments])


@pytest.fixture(params=["train", "eval"])
def read(request, run, model_folder, tmp_path):
    """Reads files with a verb; its exit code and stderr."""
    rest = {"train": ["--out", tmp_path / "run", *SMALL], "eval": ["--model", model_folder]}[request.param]

    def call(*arguments: object) -> tuple[int, str]:
        code, _, err = run(request.param, *arguments, *rest)
        return code, err

    return call


def test_a_bad_row(read, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": null}\n{"text": "good, too"}\n')
    code, err = read("--data", tmp_path / "a.jsonl")
    assert code == 2 and "a.jsonl:2: field 'text' must be a string, got null" in err and "--on-bad-row skip" in err
    code, err = read("--data", tmp_path / "a.jsonl", "--on-bad-row", "skip")
    assert code == 0 and f"warning: skipped 1 bad row, the first: {tmp_path}/a.jsonl:2: field 'text'" in err


def test_exclude(read, texts):
    (texts / "bad.txt").write_bytes(b"\0")
    (texts / "bad").mkdir()
    (texts / "bad" / "x.txt").write_bytes(b"\0")
    assert read("--data", texts)[0] == 2
    code, err = read("--data", texts, "--exclude", "*d.txt", "--exclude", "bad", "*.none")
    assert code == 0, err


def test_exclude_of_a_config_file_is_replaced(tmp_path):
    (tmp_path / "c.toml").write_text('[data]\npaths = ["a"]\nexclude = ["b", "c"]\n')
    assert options("--config", tmp_path / "c.toml", "--out", "x").train.data.exclude == ("b", "c")
    assert options("--config", tmp_path / "c.toml", "--out", "x", "--exclude", "d").train.data.exclude == ("d",)


def some_held_out(texts: Path) -> float:
    """A fraction that holds out some of the files and not all; a hash of their names decides."""
    hashes = [[is_held_out(str(file), i / 1000) for i in range(1000)].index(True) / 1000 for file in texts.iterdir()]
    return (min(hashes) + max(hashes)) / 2


def test_too_few_files_for_a_held_out_part(run, texts, tmp_path):
    """It is said before the first step, and nothing is said where the way out has been taken."""
    few = some_held_out(texts)
    code, out, err = run("train", "--data", texts, "--out", tmp_path / "a", *SMALL, "--data.held-out-fraction", 1e-9)
    lines = err.splitlines()
    (number,) = [i for i, line in enumerate(lines) if line.startswith("warning: nothing is held out")]
    assert code == 0 and "held-out" not in out
    assert "there are 3 documents" in lines[number] and "--data.eval-paths" in lines[number]
    assert any("step 1/1" in line for line in lines[number:])
    for i, way in enumerate((["--data.eval-paths", texts], ["--data.held-out-fraction", few])):
        code, out, err = run("train", "--data", texts, "--out", tmp_path / f"b{i}", *SMALL, *way)
        assert code == 0 and "warning: nothing is held out" not in err and "held-out" in out, err
    code, out, err = run("train", "--data", texts, "--out", tmp_path / "c", *SMALL, "--data.held-out-fraction", 0)
    assert code == 0 and "warning" not in err and "held-out" not in out, err


def test_a_tokenizer_of_another_model_is_told_before_the_data_is_read(
    refused, texts, model_folder, big_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr("anymamba.training.trainer.open_data", lambda *_: pytest.fail("the data was read"))
    arguments = ["--from", model_folder, "--tokenizer", big_tokenizer, "--data", texts, "--out", tmp_path / "run"]
    assert "vocabulary of 257, the tokenizer of 5001" in refused(2, "train", *arguments)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ folders that cannot be used


def test_a_run_that_fails_before_its_first_step_can_be_tried_again(run, refused, texts, tmp_path):
    """Nothing of it stays."""
    (texts / "bad.txt").write_bytes(b"\0")
    arguments = ["train", "--data", texts, "--out", tmp_path / "new" / "run", *SMALL]
    assert "not text" in refused(2, *arguments)
    (texts / "bad.txt").unlink()
    assert run(*arguments)[0] == 0


@pytest.fixture
def read_only(tmp_path):
    """A folder in which nothing can be made."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):  # root may write there
        folder = Path("/sys")
    if not folder.is_dir():
        pytest.skip("needs a folder that cannot be written, and this user may write everywhere")
    return folder


def test_a_place_that_cannot_be_written_is_told_before_the_data_is_read(read_only, run, texts, monkeypatch):
    monkeypatch.setattr("anymamba.training.trainer.open_data", lambda *_: pytest.fail("the data was read"))
    code, _, err = run("train", "--data", texts, "--out", read_only / "run", *SMALL)
    assert code == 1 and err.startswith("error: ") and str(read_only) in err and err.count("\n") == 1


def test_a_place_that_cannot_be_written_is_told_before_the_demo_trains(read_only, run, monkeypatch):
    monkeypatch.setattr("anymamba.cli.demo.corpus", lambda: pytest.fail("the data was read"))
    code, _, err = run("demo", "--out", read_only / "demo")
    assert code == 1 and err.startswith("error: ") and str(read_only) in err


def test_a_place_that_cannot_be_written_is_told_before_a_model_is_converted(read_only, run, model_folder, monkeypatch):
    from anymamba.models.checkpoints.reading import Checkpoint

    monkeypatch.setattr(Checkpoint, "tensors", lambda self: pytest.fail("the weights were read"))
    for to, name in (("state-spaces", "out"), ("gguf", "x.gguf"), ("hf", "out")):
        code, _, err = run("convert", model_folder, read_only / name, "--to", to)
        assert code == 1 and str(read_only) in err.splitlines()[-1], err


def test_a_place_that_cannot_be_written_is_told_before_an_experiment_runs(read_only, run):
    code, _, err = run("experiment", "selective-copying", "--scale", "toy", "--out", read_only / "out")
    assert code == 1 and err.startswith("error: ") and str(read_only) in err
