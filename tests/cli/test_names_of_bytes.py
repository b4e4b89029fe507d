"""Names of files and folders that are not UTF-8: they work, or are refused by name."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest

SMALL = ["--model.d-model", "8", "--model.n-layers", "1", "--batch-size", "2", "--context", "16", "--steps", "2"]
NAME = os.fsdecode(b"caf\xe9-\xff")  # in Latin-1
SHOWN = "caf\\udce9-\\udcff"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any bytes as a name")


@pytest.fixture
def odd(tmp_path):
    """A folder of such a name."""
    folder = tmp_path / NAME
    folder.mkdir()
    return folder


@pytest.fixture
def ran(run):
    """Runs a command line that must succeed; its stdout."""

    def call(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert code == 0, err
        return out

    return call


@pytest.fixture
def refused_by_name(refused, odd):
    """Runs a command line that must say that a name is not UTF-8."""

    def call(*arguments: object) -> None:
        line = refused(2, *arguments)
        assert line.startswith(f"error: the name '{odd}".replace(NAME, SHOWN)) and line.endswith("; rename it")

    return call


def test_data_and_prompts(ran, odd, tmp_path):
    for i in range(4):
        (odd / f"{NAME}{i}.txt").write_text("some text " * 20)
    data, held_out, run = odd / f"{NAME}0.txt", odd / f"{NAME}1.txt", tmp_path / "run"
    ran("train", "--data", data, "--data.eval-paths", held_out, "--out", run, *SMALL)
    assert json.loads((run / "train_config.json").read_text())["data"]["paths"] == [str(data)]
    ran("train", "--resume", run, "--json")
    assert json.loads(ran("eval", "--model", run, "--data", odd, "--json"))["n_documents"] == 4
    ran("generate", "--model", run, "--prompt-file", data, "--max-new-tokens", 2)
    assert NAME.encode("utf-8", "surrogateescape").decode("utf-8", "replace") in ran(
        "generate", "--model", run, "--prompt", NAME, "--max-new-tokens", 2
    )
    shutil.copy(run / "tokenizer.json", odd)
    ran("generate", "--model", run, "--tokenizer", odd, "--prompt", "a", "--max-new-tokens", 2)


def test_a_run(refused_by_name, ran, odd, texts, tmp_path):
    """TensorBoard, safetensors and Arrow open files by themselves."""
    refused_by_name("train", "--data", texts, "--out", odd / "run", *SMALL)
    assert not (odd / "run").exists()
    ran("train", "--data", texts, "--out", tmp_path / "run", *SMALL)
    (tmp_path / "run").rename(odd / "run")
    refused_by_name("train", "--resume", odd / "run")
    refused_by_name("train", "--from", odd / "run", "--data", texts, "--out", tmp_path / "new", *SMALL[4:])
    refused_by_name("generate", "--model", odd / "run", "--prompt", "a")


def test_a_cache(refused_by_name, odd, texts, model_folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(odd))
    refused_by_name("eval", "--model", model_folder, "--data", texts)


@pytest.mark.parametrize("to", ["hf", "anymamba", "state-spaces"])
def test_model_folders(refused_by_name, ran, odd, model_folder, tmp_path, to):
    refused_by_name("convert", model_folder, odd / "x", "--to", to)
    assert not (odd / "x").exists()
    ran("convert", model_folder, tmp_path / to, "--to", to)
    (tmp_path / to).rename(odd / to)
    refused_by_name("generate", "--model", odd / to, "--prompt", "a")


def test_gguf(ran, odd, model_folder):
    ran("convert", model_folder, odd / f"{NAME}.gguf", "--to", "gguf")
    got = ran("generate", "--model", odd / f"{NAME}.gguf", "--prompt", "a", "--max-new-tokens", 2, "--json")
    assert json.loads(got)["model"] == str(odd / f"{NAME}.gguf")


def test_rows_of_such_a_file(ran, run, odd, model_folder):
    (odd / f"{NAME}.jsonl").write_text('{"text": "a"}\n{"text": 3}\n{"text": "b"}\n')
    code, _, err = run("eval", "--model", model_folder, "--data", odd)
    assert code == 2 and f"{SHOWN}.jsonl:2" in err
    code, _, err = run("eval", "--model", model_folder, "--data", odd, "--on-bad-row", "skip")
    assert code == 0 and f"{SHOWN}.jsonl:2" in err


def test_an_experiment_in_such_a_place(ran, odd):
    ran("experiment", "selective-copying", "--scale", "toy", "--out", odd / "out")
    assert (odd / "out" / "report.md").exists()


def test_a_name_that_is_not_there(refused, model_folder, tmp_path):
    for arguments in (
        ["generate", "--model", tmp_path / NAME, "--prompt", "a"],
        ["generate", "--model", model_folder, "--prompt-file", tmp_path / NAME],
        ["eval", "--model", model_folder, "--data", tmp_path / NAME],
        ["train", "--resume", tmp_path / NAME],
        ["train", "--out", "x", "--config", tmp_path / f"{NAME}.toml"],
    ):
        assert SHOWN in refused(2, *arguments)
