"""States in files: loading returns what was saved, and only for the same kind of model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from anymamba.generation.generate import generate
from anymamba.generation.prompts import read_prompts
from anymamba.generation.state_store import load_state, save_state
from anymamba.models.checkpoints import CheckpointError
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.parts.options import MambaOptions
from anymamba.parts.state import state_tensors


def test_a_saved_state_goes_on_as_the_original(mamba, tmp_path):
    output = generate(mamba, [[1, 2], [3]], max_new_tokens=8, seed=1)
    save_state(tmp_path / "chat.safetensors", output.state, mamba)
    loaded = load_state(tmp_path / "chat.safetensors", mamba)
    assert type(loaded) is type(output.state) and type(loaded.model) is type(output.state.model)
    for a, b in zip(state_tensors(loaded), state_tensors(output.state), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    goes_on = [generate(mamba, [[5], [6]], max_new_tokens=8, seed=2, state=s).ids for s in (output.state, loaded)]
    assert goes_on[0] == goes_on[1]
    assert [p.name for p in tmp_path.iterdir()] == ["chat.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mixer", ["mamba", "s4d", "h3-s4"])
def test_complex_states_too(tmp_path, dtype, mixer):
    config = ModelConfig(d_model=16, n_layers=1, vocab_size=9, mixers=(mixer,), mamba=MambaOptions(A_init="s4d-lin"))
    model = LanguageModel(config, dtype=dtype)
    state = read_prompts(model, [[1, 2, 3], [4]])
    save_state(tmp_path / "s", state, model)
    loaded = load_state(tmp_path / "s", model)
    assert any(t.is_complex() for t in state_tensors(state))
    for a, b in zip(state_tensors(loaded), state_tensors(state), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


def test_a_file_is_replaced(mamba, tmp_path):
    for prompt in ([1], [2]):
        save_state(tmp_path / "s", read_prompts(mamba, [prompt]), mamba)
    assert load_state(tmp_path / "s", mamba).seen[0, 2]


def test_what_is_refused(mamba, tmp_path):
    path = tmp_path / "s"
    with pytest.raises(FileNotFoundError, match="no state at"):
        load_state(path, mamba)
    state = read_prompts(mamba, [[1]])
    save_state(path, state, mamba)
    for config in (dataclasses.replace(mamba.config, n_layers=1), dataclasses.replace(mamba.config, norm_eps=1e-3)):
        with pytest.raises(CheckpointError, match=r"state of another model: (n_layers is 2 there, 1|norm_eps) "):
            load_state(path, LanguageModel(config))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="truncated"):
        load_state(path, mamba)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="is not a state; give a file that save_state has written"):
        load_state(path, mamba)


def test_a_state_of_another_model_is_not_saved(mamba, tmp_path):
    other = LanguageModel(dataclasses.replace(mamba.config, d_model=16))
    with pytest.raises(ValueError, match=r"not one of this model: model.layers.0.conv must have shape \(1, 3, 32\)"):
        save_state(tmp_path / "s", read_prompts(mamba, [[1]]), other)
    deeper = LanguageModel(dataclasses.replace(mamba.config, n_layers=3))
    with pytest.raises(ValueError, match=r"model.layers.2.conv is missing"):
        save_state(tmp_path / "s", read_prompts(mamba, [[1]]), deeper)
    assert not list(tmp_path.iterdir())


def test_caches_of_any_length_are_saved_too(tmp_path):
    config = ModelConfig(d_model=16, n_layers=3, vocab_size=9, mixers=("mamba", "attention", "mlp"))
    model = LanguageModel(config).eval()
    state = generate(model, [[1, 2, 3], [4]], max_new_tokens=4, seed=1).state
    save_state(tmp_path / "s", state, model)
    loaded = load_state(tmp_path / "s", model)
    goes_on = [generate(model, [[5], [6]], max_new_tokens=8, seed=2, state=s).ids for s in (state, loaded)]
    assert goes_on[0] == goes_on[1]
