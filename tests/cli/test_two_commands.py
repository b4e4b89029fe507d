"""Two commands on one folder at once: one of them is refused or waits, nothing is lost, and nothing is mixed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from anymamba.base.files import own_file, own_folder

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks, which Windows cannot")


def run_pairs(folder: Path, pairs: int | list[tuple[str, str, int | None, str]], seed: int = 0) -> dict[str, Any]:
    """What tests.cli.two_commands prints for these pairs."""
    command = [sys.executable, "-m", "tests.cli.two_commands", str(folder), json.dumps(pairs), str(seed)]
    out, err = folder.with_suffix(".out"), folder.with_suffix(".err")  # files: a pipe would wait for every child
    with out.open("w") as stdout, err.open("w") as stderr:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=stdout, stderr=stderr, cwd=ROOT, env=environment)
    assert done.returncode == 0, err.read_text()[-3000:]
    return json.loads(out.read_text())


def test_a_few_pairs(tmp_path: Path) -> None:
    pairs: list[tuple[str, str, int | None, str]] = [
        *(("train-1", "train-2", None, "nothing"), ("resume", "resume", None, "half")),
        *(("experiment", "experiment", None, "nothing"), ("convert", "save", None, "nothing")),
    ]
    found = run_pairs(tmp_path / "pairs", pairs)
    assert found["problems"] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_random_pairs(tmp_path: Path) -> None:
    found = run_pairs(tmp_path / "pairs", 200, seed=1)
    assert found["problems"] == []
    endings = found["endings"]
    assert sum(endings.values()) == 400
    for name in ("train-1", "train-2", "resume", "convert", "experiment", "save"):
        assert f"{name}: done" in endings, endings
    for name in ("train-1", "train-2", "resume", "convert"):
        assert f"{name}: refused" in endings, endings
    assert sum(count for ending, count in endings.items() if ending.endswith("killed")) > 20, endings


@pytest.mark.parametrize("verb", ["train", "resume", "convert", "gguf"])
def test_a_folder_in_use_is_refused_in_one_line(refused, texts, model_folder, tmp_path: Path, verb: str) -> None:
    run = tmp_path / ("run.gguf" if verb == "gguf" else "run")
    commands = {
        "train": ("train", "--data", texts, "--out", run),
        "resume": ("train", "--resume", run),
        "convert": ("convert", model_folder, run, "--to", "hf"),
        "gguf": ("convert", model_folder, run, "--to", "gguf"),
    }
    if verb == "resume":
        run.mkdir()
        (run / "train_config.json").write_text("{}")

    def hold() -> str:
        with own_file(run) if verb == "gguf" else own_folder(run), ThreadPoolExecutor(1) as pool:
            return pool.submit(refused, 1, *commands[verb]).result()

    assert f"{run} is in use by another thread" in hold()
