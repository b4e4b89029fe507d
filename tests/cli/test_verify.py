"""A model whose file has changed since it was saved is refused by every verb in one line; --no-verify takes it."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def changed(model_folder, tmp_path):
    """A copy of the model with a bit of its weights changed."""
    folder = shutil.copytree(model_folder, tmp_path / "changed")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    return folder


@pytest.fixture(params=["generate", "eval", "convert", "train"])
def command(request, changed, texts, tmp_path):
    return {
        "generate": ["generate", "--model", changed, "--prompt", "a", "--max-new-tokens", 1],
        "eval": ["eval", "--model", changed, "--data", texts],
        "convert": ["convert", changed, tmp_path / "out", "--to", "hf"],
        "train": ["train", "--from", changed, "--data", texts, "--out", tmp_path / "out", "--steps", 1],
    }[request.param]


def test_a_changed_file_is_refused_and_no_verify_takes_it(run, refused, command, tmp_path):
    error = refused(1, *command)
    assert "model.safetensors is damaged or was replaced" in error and "--no-verify" in error
    assert not (tmp_path / "out").exists()
    code, _, err = run(*command, "--no-verify")
    assert code == 0, err


def test_a_damaged_checkpoint_of_a_run(run, refused, texts, tmp_path):
    """The way out is the checkpoint before it."""
    train = ["train", "--data", texts, "--out", tmp_path / "run", "--steps", 2, "--checkpoint-every", 1]
    assert run(*train, "--model.d-model", 8, "--model.n-layers", 1, "--context", 16)[0] == 0
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"
    (tensors,) = folder.glob("*.safetensors")
    data = bytearray(tensors.read_bytes())
    data[len(data) // 2] ^= 1
    tensors.write_bytes(data)
    error = refused(1, "train", "--resume", tmp_path / "run")
    assert "is damaged or was replaced" in error and f"delete {folder} to go on" in error
    shutil.rmtree(folder)
    assert run("train", "--resume", tmp_path / "run")[0] == 0
