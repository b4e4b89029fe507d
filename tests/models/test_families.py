"""Families of models in every format: names both ways, files of earlier versions, errors for newer ones."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from anymamba import LanguageModel, MambaOptions, ModelConfig
from anymamba.generation.generate import generate
from anymamba.generation.prompts import read_prompts
from anymamba.generation.state_store import load_state
from anymamba.models.checkpoints import CheckpointError, load_pretrained, open_checkpoint, save_pretrained
from anymamba.models.checkpoints.families import FAMILIES, nearest_spelling, spelling_for
from anymamba.models.checkpoints.reading import model_without_weights
from anymamba.parts.state import state_tensors

EARLIER = Path(__file__).with_name("earlier")
SIZES = {"d_model": 4, "n_layers": 1, "vocab_size": 8}
PLAIN = MambaOptions(d_state=2)
FALCON = MambaOptions(d_state=2, inner_norms=True, inner_norm_weights=False)
WRITTEN = {
    "hf": ModelConfig(**SIZES, mamba=PLAIN),
    "hf-falcon": ModelConfig(**SIZES, mamba=FALCON),
    "state-spaces": ModelConfig(**SIZES, mamba=PLAIN),
    "gguf": ModelConfig(**SIZES, tie_embeddings=False, mamba=PLAIN),
    "gguf-falcon": ModelConfig(**SIZES, norm_eps=1e-6, mamba=FALCON),
    "anymamba": ModelConfig(**SIZES, mamba=MambaOptions(d_state=2, b_discretization="zoh")),
}
"""The models in EARLIER, by folder."""
SPELLINGS = {
    f"{family.name}-{format}": (format, spelling)
    for family in FAMILIES
    for format, spelling in family.spellings.items()
}
IN_FAMILY = {
    "mamba": WRITTEN["hf"],
    "falcon_mamba": WRITTEN["gguf-falcon"],
    "anymamba": ModelConfig(**SIZES | {"n_layers": 2}, mixers=("mamba-s4d", "mlp")),
}


def as_written(name: str) -> LanguageModel:
    """The model that an earlier version wrote."""
    model = LanguageModel(WRITTEN[name])
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((torch.arange(p.numel()) % 17 - 8).view(p.shape) / 16)
    return model.eval()


def contents(path: Path) -> Any:
    """The contents of a file, without our own config and its version, which may gain options, and without digests."""
    if path.suffix == ".bin":  # its bytes hold the temporary name under which it was written
        return {name: tensor.tolist() for name, tensor in torch.load(path, weights_only=True).items()}
    if path.suffix == ".gguf":
        reader = importlib.import_module("gguf").GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("anymamba.")}
        fields.pop("GGUF.kv_count")
        return fields, [(t.name, t.tensor_type, t.data.tolist()) for t in reader.tensors]
    if path.suffix == ".json":
        values = json.loads(path.read_text())
        return [(key, value) for key, value in values.items() if key not in ("anymamba", "format_version")]
    return path.read_bytes()


@pytest.mark.parametrize("name", WRITTEN)
def test_files_of_an_earlier_version_are_read(name):
    if name.startswith("gguf"):
        pytest.importorskip("gguf")
    loaded, model = load_pretrained(EARLIER / name), as_written(name)
    assert loaded.config == model.config
    for (key, a), (_, b) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        if name.startswith("gguf") and key.endswith("A_log"):
            assert torch.allclose(a, b, rtol=0, atol=1e-6), key  # through exp and log
        else:
            assert torch.equal(a, b), key


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_what_an_earlier_version_wrote(name, tmp_path):
    if name.startswith("gguf"):
        pytest.importorskip("gguf")
    save_pretrained(as_written(name), tmp_path, format=name.removesuffix("-falcon"))
    (tmp_path / "anymamba_manifest.json").unlink(missing_ok=True)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (EARLIER / name).iterdir()}
    for path in tmp_path.iterdir():
        assert contents(path) == contents(EARLIER / name / path.name), path.name
    if name == "anymamba":
        assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 1


def test_a_state_of_an_earlier_version_goes_on():
    model = as_written("anymamba")
    with safe_open(EARLIER / "state.safetensors", framework="pt") as file:
        assert set(file.metadata()) == {"kind", "config"}
    loaded, read = load_state(EARLIER / "state.safetensors", model), read_prompts(model, [[1, 2, 3]])
    for a, b in zip(state_tensors(loaded), state_tensors(read), strict=True):
        assert torch.allclose(a, b) if a.is_floating_point() else torch.equal(a, b)
    outputs = [generate(model, [[4]], max_new_tokens=5, seed=0, state=state).ids for state in (loaded, read)]
    assert outputs[0] == outputs[1]


def test_a_newer_version_is_refused(tmp_path):
    save_pretrained(as_written("anymamba"), tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    (tmp_path / "anymamba_manifest.json").unlink()
    path.write_text(json.dumps(values | {"format_version": 3}))
    with pytest.raises(CheckpointError, match=r"config\.json has format version 3, .* up to 2; upgrade it"):
        load_pretrained(tmp_path)
    path.write_text(json.dumps(values | {"format_version": "two"}))
    with pytest.raises(CheckpointError, match=r"format_version must be an integer of at least 1, got 'two'"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", SPELLINGS)
def test_config_and_names_go_both_ways(name):
    format, spelling = SPELLINGS[name]
    config = IN_FAMILY[name.removesuffix(f"-{format}")]
    if format == "gguf":
        config = ModelConfig(**SIZES, norm_eps=config.norm_eps, mamba=config.mamba)
    assert spelling_for(config, format) is spelling and spelling.foreign_options(config) == []
    shapes = {ours: tuple(p.shape) for ours, p in model_without_weights(config, Path("here")).named_parameters()}
    names = [spelling.name(ours) for ours in shapes]
    assert len(set(names)) == len(names)
    for ours, shape in shapes.items():
        tensor = -torch.rand(shape)
        stored = spelling.encode(ours, tensor)
        assert spelling.shape(ours, tuple(stored.shape)) == shape
        back = spelling.decode(ours, stored, "here").view(shape)
        assert torch.allclose(back, tensor, rtol=0, atol=1e-6), ours


@pytest.mark.parametrize(
    ("options", "format", "lacks"),
    [
        ({}, "hf", []),
        ({"inner_norms": True}, "hf", ["inner_norms=True (with weights)"]),
        ({"inner_norms": True, "inner_norm_weights": False}, "hf", []),
        ({"inner_norms": True, "inner_norm_weights": False}, "state-spaces", ["inner_norms=True"]),
        ({"b_discretization": "zoh"}, "hf", ["b_discretization='zoh'"]),
        ({"b_discretization": "zoh"}, "anymamba", []),
    ],
)
def test_the_family_that_lacks_least_words_the_refusal(options, format, lacks):
    config = ModelConfig(**SIZES, mamba=MambaOptions(**options))
    assert nearest_spelling(config, format)[1] == lacks
    if lacks:
        with pytest.raises(CheckpointError, match="keep it as anymamba"):
            spelling_for(config, format)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_checkpoint_knows_its_family(name):
    if name.startswith("gguf"):
        pytest.importorskip("gguf")
    checkpoint = open_checkpoint(EARLIER / name)
    assert checkpoint.format == name.removesuffix("-falcon")
    assert checkpoint.spelling is spelling_for(checkpoint.config, checkpoint.format)
