"""`--profile`: a trace that TensorBoard and Perfetto open, and a table of where a step went."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from anymamba.console.profiling import RECORDED, TimeSpent, table

ROW = r"{name} +{calls} +[0-9.]+ +[0-9.]+$"
QUICK = ["--preset", "nano", "--batch-size", 2, "--context", 32, "--data.held-out-fraction", 0]


def events(folder: Path) -> list[str]:
    """The names in the only trace of a folder."""
    (path,) = folder.glob("*.pt.trace.json.gz")  # TensorBoard's plugin looks for this ending
    return [event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]


def calls(text: str) -> dict[str, float]:
    """The first two columns of the tables."""
    rows = [line.rsplit(maxsplit=3) for line in text.splitlines()]
    return {row[0]: float(row[1]) for row in rows if len(row) == 4 and row[1].replace(".", "").isdigit()}


def test_train(run, texts, tmp_path):
    folder = tmp_path / "run" / "profile"  # does not exist yet, as the run
    arguments = ["--data", texts, "--out", tmp_path / "run", "--steps", 12, *QUICK, "--profile", folder]
    code, _, err = run("train", *arguments)
    assert code == 0, err
    names = events(folder)
    assert all(names.count(name) == RECORDED for name in ("batches", "forward", "backward", "optimizer"))
    got = calls(err)
    assert got["batches"] == got["forward"] == got["backward"] == got["optimizer"] == 1
    assert got["anymamba::selective_scan"] == 2, "a forward of each of the two layers"


@pytest.mark.parametrize(("steps", "recorded"), [(2, 1), (5, 4)])
def test_a_short_run(run, texts, tmp_path, steps, recorded):
    arguments = ["--data", texts, "--out", tmp_path / "run", "--steps", steps, *QUICK, "--profile", tmp_path / "p"]
    code, _, err = run("train", *arguments)
    assert code == 0, err
    assert events(tmp_path / "p").count("forward") == recorded and f"one step of {recorded} " in err


def test_a_run_of_one_step(run, texts, tmp_path):
    arguments = ["--data", texts, "--out", tmp_path / "run", "--steps", 1, *QUICK, "--profile", tmp_path / "p"]
    code, _, err = run("train", *arguments)
    assert code == 0 and "warning: nothing was profiled" in err and not (tmp_path / "p").exists()


def test_a_resumed_run(run, texts, tmp_path):
    assert run("train", "--data", texts, "--out", tmp_path / "run", "--steps", 4, *QUICK)[0] == 0
    code, _, err = run("train", "--resume", tmp_path / "run", "--profile", tmp_path / "p")
    assert code == 0, err


def test_generate(run, model_folder, tmp_path):
    arguments = ["--prompt", "a", "--prompt", "b", "--max-new-tokens", 40, "--batch-size", 1, "--temperature", 0]
    code, _, err = run("generate", "--model", model_folder, *arguments, "--profile", tmp_path)
    assert code == 0, err
    names = events(tmp_path)
    assert names.count("prompt") == 1 and 1 <= names.count("token") <= 33
    assert "prompts and 32 tokens " in err
    assert calls(err)["prompt"] == 1


def test_beam_search(run, model_folder, tmp_path):
    arguments = ["--prompt", "a", "--max-new-tokens", 4, "--num-beams", 2, "--profile", tmp_path]
    code, _, err = run("generate", "--model", model_folder, *arguments)
    assert code == 0 and calls(err)["search"] == 1 and "search" in events(tmp_path)


@pytest.mark.parametrize("verb", ["train", "generate"])
def test_a_folder_that_cannot_be_made(refused, model_folder, texts, tmp_path, verb):
    (tmp_path / "file").write_text("")
    arguments = {
        "train": ["--data", texts, "--out", tmp_path / "run", *QUICK],
        "generate": ["--model", model_folder, "--prompt", "a"],
    }[verb]
    line = refused(2, verb, *arguments, "--profile", tmp_path / "file" / "x")
    assert line == f"error: {tmp_path / 'file'}: is not a folder; choose another one with --profile"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("gpu", [0.0, 3.0])
def test_the_tables_add_up(gpu):
    rows = [
        TimeSpent("aten::mm", 10, 4.0, gpu, False),
        TimeSpent("forward", 2, 6.0, gpu, True),
        TimeSpent("aten::" + "x" * 80, 2, 5.0, 0.0, False),
        TimeSpent("Optimizer.step", 2, 9.0, 0.0, True),
    ]
    lines = list(table("one step of 2", rows, ("batches", "forward"), 10.0, 2))
    assert {len(line) for line in lines if line} == {66 + 10 * bool(gpu)}
    assert [line.split()[:4] for line in lines[1:3]] == [
        ["forward", "1.0", "3.00", "60.0"],
        ["other", "1.0", "2.00", "40.0"],
    ]
    assert [line.split()[0][:8] for line in lines[5:]] == (
        ["aten::mm", "aten::xx"] if gpu else ["aten::xx", "aten::mm"]
    )
