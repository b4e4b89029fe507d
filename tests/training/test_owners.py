"""A run folder has one writer, and holds what that writer wrote, with the permissions of the umask."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anymamba.base.errors import InUseError
from anymamba.base.files import LOCK
from anymamba.training.config import TrainConfig
from anymamba.training.parallel import processes
from anymamba.training.trainer import Silent, read_config, resume, train
from tests.training.test_trainer import StopAt, assert_same_run


@pytest.fixture
def short(config: TrainConfig) -> TrainConfig:
    """Four steps with a checkpoint in the middle."""
    return replace(config, steps=4, checkpoint_every=2, eval_every=4)


def test_a_run_that_is_alive_has_an_owner(short: TrainConfig, tmp_path: Path) -> None:
    """Other threads, like other processes, are refused before they change anything, and the run is what it would be."""
    train(short, tmp_path / "alone")
    refusals = []

    class Intrude(Silent):
        def on_step(self, metrics: dict[str, Any]) -> None:
            with ThreadPoolExecutor(1) as pool:
                for intruder in (
                    pool.submit(train, replace(short, seed=5), tmp_path / "run"),
                    pool.submit(resume, tmp_path / "run"),
                ):
                    refusals.append(intruder.exception())

    train(short, tmp_path / "run", Intrude())
    assert len(refusals) == 8 and all(isinstance(error, InUseError) for error in refusals), refusals
    assert f"{tmp_path / 'run'} is in use" in str(refusals[0])
    assert_same_run(tmp_path / "alone", tmp_path / "run", 4)
    assert read_config(tmp_path / "run").seed == short.seed and not (tmp_path / "run" / LOCK).exists()


def test_the_lock_of_a_killed_run_is_in_nobodys_way(short: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text("left by a process that was killed before it wrote anything else")
    train(short, tmp_path / "run")
    (tmp_path / "run" / LOCK).touch()
    assert resume(tmp_path / "run").steps == 4


def test_what_a_killed_run_left_is_swept_when_it_is_resumed(short: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="crash"):
        train(short, run, StopAt(3))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = [run / f".model.safetensors.{ended.pid}.tmp", run / f".config.json.{ended.pid}-0a1b2c.tmp" / "config.json"]
    left += [run / "checkpoints" / f".step-00000004.{ended.pid}-0a1b2c.tmp" / "step-00000004" / "model.safetensors"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    resume(run)
    assert list(run.rglob(".*")) == []


@pytest.mark.parametrize("existing", [False, True])
def test_a_run_that_fails_at_the_start_leaves_nothing(
    short: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    run = tmp_path / "runs" / "x"
    if existing:
        run.mkdir(parents=True)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(processes, "save_checkpoint", full)
        with pytest.raises(OSError, match="No space left"):
            train(short, run)
    assert run.exists() is existing and (not existing or os.listdir(run) == [])
    with pytest.raises(ValueError, match="no training data"):
        train(replace(short, data=replace(short.data, paths=())), run)
    assert run.exists() is existing
    assert train(short, run).steps == 4, "the retry is not in its way"


def test_a_run_killed_after_its_last_checkpoint_gets_its_model(short: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(short, run)
    model = (run / "model.safetensors").read_bytes()
    train(replace(short, steps=2), tmp_path / "earlier")
    for path in (tmp_path / "earlier").iterdir():
        if path.is_file() and path.name != "train_config.json":
            path.replace(run / path.name)  # as if killed when the checkpoint was written and the model was not
    assert (run / "model.safetensors").read_bytes() != model
    resume(run)
    assert (run / "model.safetensors").read_bytes() == model


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
def test_all_of_a_run_has_the_permissions_of_the_umask(short: TrainConfig, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        train(short, tmp_path / "run")
    finally:
        os.umask(before)
    wanted = {True: 0o750, False: 0o640}
    modes = {path: path.stat().st_mode & 0o777 for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]}
    assert {str(path): oct(mode) for path, mode in modes.items() if mode != wanted[path.is_dir()]} == {}
