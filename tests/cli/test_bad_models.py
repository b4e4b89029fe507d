"""Model folders that cannot be read: every verb prints one line that says what to do and writes nothing."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest


@pytest.fixture
def broken(model_folder, tmp_path):
    """A copy of the model to break, without a manifest, as published folders are."""
    folder = shutil.copytree(model_folder, tmp_path / "broken")
    (folder / "anymamba_manifest.json").unlink()
    return folder


@pytest.fixture(params=["generate", "eval", "train"])
def command(request, broken, texts, tmp_path):
    """The command line of a verb that reads the broken model."""
    return {
        "generate": ["generate", "--model", broken, "--prompt", "a"],
        "eval": ["eval", "--model", broken, "--data", texts],
        "train": ["train", "--from", broken, "--data", texts, "--out", tmp_path / "out"],
    }[request.param]


def test_truncated(refused, broken, command, tmp_path):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated" in refused(1, *command)
    assert not (tmp_path / "out").exists()


def test_cut_inside_the_header(refused, broken, command):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10])
    assert "truncated" in refused(1, *command)


def test_empty_weights(refused, broken, command):
    (broken / "model.safetensors").write_bytes(b"")
    assert "model.safetensors" in refused(1, *command)


def test_of_another_kind_of_model(refused, broken, command):
    config = json.loads((broken / "config.json").read_text())
    config["model_type"] = "gpt2"
    (broken / "config.json").write_text(json.dumps(config))
    assert "gpt2" in refused(1, *command)


def test_weights_of_another_model(refused, broken, command):
    config = json.loads((broken / "config.json").read_text())
    config["anymamba"]["n_layers"] = config["num_hidden_layers"] = 3
    (broken / "config.json").write_text(json.dumps(config))
    assert "missing" in refused(1, *command)


def test_config_that_is_not_json(refused, broken, command):
    (broken / "config.json").write_text("{")
    assert "config.json" in refused(1, *command)


def test_a_pickle_is_refused_and_not_opened(refused, broken, command, tmp_path):
    planted = tmp_path / "planted"

    class Payload:
        def __reduce__(self):
            return (type(planted).touch, (planted,))

    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    assert "pickle" in refused(1, *command)
    assert not planted.exists()


def test_no_folder_there(refused, broken, command):
    shutil.rmtree(broken)
    assert "no model folder" in refused(2, *command)


def test_a_folder_without_a_model(refused, broken, command):
    (broken / "config.json").unlink()
    assert "config.json" in refused(2, *command)
