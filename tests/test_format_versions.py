"""Files of our own formats contain a format version. Newer versions are refused; files without a version are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from anymamba.base.errors import CheckpointError
from anymamba.cli.train import read_config_file
from anymamba.generation.prompts import read_prompts
from anymamba.generation.state_store import load_state, save_state
from anymamba.lab.experiment import Record, Results
from anymamba.lab.results import read_results, write_results
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.training.checkpoint import load_checkpoint, save_checkpoint
from anymamba.training.config import DataConfig, TrainConfig
from anymamba.training.trainer import read_config, resume, train

NEWER = r"has format version 7, and this anymamba reads versions up to 1; upgrade it"


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_saved_states(tmp_path):
    model, path = LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=9)), tmp_path / "s"
    save_state(path, read_prompts(model, [[1]]), model)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert metadata.pop("format_version") == "1" and metadata.pop("sha256")
    save_file(tensors, path, metadata)
    assert torch.equal(load_state(path, model).logits, tensors["logits"])
    save_file(tensors, path, metadata | {"format_version": "7"})
    with pytest.raises(CheckpointError, match=NEWER):
        load_state(path, model)
    save_file(tensors, path, metadata | {"format_version": "x"})
    with pytest.raises(CheckpointError, match="must be an integer of at least 1, got 'x'"):
        load_state(path, model)


def test_a_state_may_lack_options_that_came_later(tmp_path):
    model, path = LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=9)), tmp_path / "s"
    save_state(path, read_prompts(model, [[1]]), model)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = json.loads(metadata["config"])
    del metadata["sha256"]
    del config["retention"], config["mamba"]["output_norm"]
    save_file(tensors, path, metadata | {"config": json.dumps(config)})
    load_state(path, model)
    save_file(tensors, path, metadata | {"config": json.dumps(config | {"unheard_of": 1})})
    with pytest.raises(CheckpointError, match="is a state of another model: unknown key 'unheard_of'"):
        load_state(path, model)


def test_checkpoints_of_runs(tmp_path):
    folder = save_checkpoint(tmp_path, 1, {"x": torch.ones(2)}, {"tensors": ["x"]}, 1)
    assert json.loads((folder / "state.json").read_text())["format_version"] == 1
    (folder / "anymamba_manifest.json").unlink()
    edit(folder / "state.json", format_version=7)
    with pytest.raises(CheckpointError, match=NEWER):
        load_checkpoint(folder)
    edit(folder / "state.json", format_version=None)
    assert torch.equal(load_checkpoint(folder)[0]["x"], torch.ones(2))


def test_run_folders(tmp_path):
    (tmp_path / "a.txt").write_text("some words, and some more words " * 20)
    model = ModelConfig(d_model=8, n_layers=1, vocab_size=257)
    data = DataConfig(paths=(str(tmp_path / "a.txt"),), held_out_fraction=0, cache_dir=str(tmp_path / "cache"))
    config, run = TrainConfig(data=data, model=model, steps=2, batch_size=1, context=8, threads=1), tmp_path / "run"
    train(config, run)
    saved, state = run / "train_config.json", next((run / "checkpoints").glob("step-*")) / "state.json"
    assert json.loads(saved.read_text())["format_version"] == 1
    edit(saved, format_version=7)
    with pytest.raises(CheckpointError, match=NEWER):
        resume(run)
    with pytest.raises(CheckpointError, match=NEWER):
        read_config_file(saved)
    edit(saved, format_version=None, steps=4)
    (state.parent / "anymamba_manifest.json").unlink()
    edit(state, format_version=None)
    assert resume(run).steps == 4 and read_config(run).steps == 4
    assert "format_version" not in read_config_file(saved)


def test_results(tmp_path):
    record = Record("arm", 0, {}, {"accuracy": 1.0}, 0.1, "machine", "2026-01-01")
    results = Results("dice", "toy", (record,), ("arm-seed0",))
    write_results(tmp_path, results)
    path = tmp_path / "results.json"
    assert json.loads(path.read_text())["format_version"] == 1 and read_results(tmp_path) == results
    edit(path, format_version=7)
    with pytest.raises(CheckpointError, match=NEWER):
        read_results(tmp_path)
    edit(path, format_version=None)
    assert read_results(tmp_path) == results
