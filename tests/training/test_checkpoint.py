"""Checkpoints on disk: complete or missing, never a pickle, with errors that say what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from anymamba.base import files
from anymamba.base.manifest import NAME as MANIFEST
from anymamba.models.checkpoints import CheckpointError
from anymamba.training import checkpoint as module
from anymamba.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint

TENSORS = {
    "model.weight": torch.arange(6.0).view(2, 3),
    "optimizer.step": torch.tensor(3.0),
    "random": torch.arange(7, dtype=torch.uint8),
    "half": torch.ones(2, dtype=torch.bfloat16),
}


def save(run: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(run, step, TENSORS, {"step": step, "tensors": sorted(TENSORS)}, keep)


def test_round_trip(tmp_path: Path) -> None:
    tensors, values = load_checkpoint(save(tmp_path, 5))
    assert values["step"] == 5 and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in TENSORS.items())
    files = {path.suffix for path in checkpoints(tmp_path)[0].iterdir()}
    assert files == {".safetensors", ".json"}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("call", range(1, 7))
def test_a_full_disk_at_any_moment_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    save(tmp_path, 1)
    calls = iter(range(1, 100))

    def full(function):
        def wrapper(*arguments, **options):
            if next(calls) == call:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **options)

        return wrapper

    monkeypatch.setattr(module.dcp, "save", full(module.dcp.save))
    monkeypatch.setattr(files.os, "fsync", full(os.fsync))
    monkeypatch.setattr(files.os, "replace", full(os.replace))
    with pytest.raises(OSError, match="No space left") as info:
        save(tmp_path, 2)
    assert info.value.errno == errno.ENOSPC and "make room" in str(info.value)
    monkeypatch.undo()
    assert load_checkpoint(checkpoints(tmp_path)[0])[1]["step"] == 1
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert load_checkpoint(save(tmp_path, 3))[1]["step"] == 3


@pytest.mark.parametrize("size", [0, 7, 100])
def test_truncated_tensors_are_refused(tmp_path: Path, size: int) -> None:
    folder = save(tmp_path, 1)
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:size])
    for words in (r"truncated or was replaced.*; delete", r"truncated or corrupt.*; delete"):
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(folder)
        (folder / MANIFEST).unlink(missing_ok=True)  # earlier checkpoints have none


def test_a_missing_tensor_or_state_file_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, TENSORS, {"tensors": [*TENSORS, "absent"]}, 1)
    with pytest.raises(CheckpointError, match="absent"):
        load_checkpoint(folder)
    (folder / MANIFEST).unlink()
    for text in ("{", "[]", "3"):
        (folder / "state.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
            load_checkpoint(folder)


@pytest.mark.parametrize("name", ["x.pt", "pytorch_model.bin", ".metadata", "__0_0.distcp", "a/b.pkl"])
def test_a_pickle_is_refused_unread(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 1)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"cos\nsystem\n(S'exit 3'\ntR.")
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_checkpoint(folder)


def test_a_pickle_under_the_name_of_tensors_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    torch.save({"model.weight": torch.zeros(2)}, next(folder.glob("*.safetensors")))
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="corrupt"):
        load_checkpoint(folder)


def test_a_checkpoint_that_is_being_deleted_has_lost_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed meanwhile leaves no part of a checkpoint under the name of a whole one."""
    save(tmp_path, 1)
    deleted = []
    rmtree = files.shutil.rmtree

    def look(path: Path, **options: object) -> None:
        deleted.append(([entry.name for entry in checkpoints(tmp_path)], os.listdir(path)))
        rmtree(path, **options)

    monkeypatch.setattr(files.shutil, "rmtree", look)
    save(tmp_path, 2, keep=1)
    assert deleted[-1] == (["step-00000002"], ["step-00000001"])
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000002"]
