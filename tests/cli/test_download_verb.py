"""`anymamba download`: what comes from the hub is checked and described; the hub here is a cache without a network."""

from __future__ import annotations

import json

import pytest

from anymamba.data.tokenizer import ByteTokenizer
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Makes folders of repositories in the hub's cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)

    def make(name: str):
        repository = tmp_path / "hub" / f"models--owner--{name}"
        folder = repository / "snapshots" / COMMIT
        folder.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        return folder

    return make


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=257))


@pytest.mark.parametrize("prefix", ["", "hf://"])
def test_a_repository(run, hub, model, tmp_path, prefix):
    folder = hub("model")
    model.save_pretrained(folder, ByteTokenizer())
    (tmp_path / "owner").mkdir()  # a folder of the owner's name does not matter here
    code, out, err = run("download", f"{prefix}owner/model", "--json")
    assert code == 0, err
    assert json.loads(out) == {
        "name": f"{prefix}owner/model",
        "path": str(folder),
        "format": "hf",
        "parameters": model.n_parameters(),
        "vocabulary": 257,
        "tokenizer": "bytes",
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }
    code, out, _ = run("download", "owner/model", "--revision", COMMIT)
    assert code == 0 and str(folder) in out and f"{model.n_parameters():,}" in out


def test_a_gguf_file(run, hub, model):
    pytest.importorskip("gguf", reason="the extra 'gguf' installs gguf")
    folder = hub("model")
    model.save_pretrained(folder / "x.gguf", ByteTokenizer(), format="gguf")
    code, out, err = run("download", "owner/model/x.gguf", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["path"] == str(folder / "x.gguf") and facts["format"] == "gguf"
    assert facts["bytes"] == (folder / "x.gguf").stat().st_size


def test_a_model_without_a_tokenizer(run, hub):
    LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=300)).save_pretrained(hub("bare"))
    code, out, _ = run("download", "owner/bare")
    assert code == 0 and "name one with --tokenizer" in out


def test_another_kind_of_model_is_refused_before_its_weights_come(refused, hub, monkeypatch):
    import huggingface_hub

    (hub("gpt") / "config.json").write_text('{"model_type": "gpt2"}')
    asked = []
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: asked.append(k["allow_patterns"]) or real(*a, **k)
    )
    assert "model_type 'gpt2'" in refused(1, "download", "owner/gpt")
    assert not any("safetensors" in pattern for patterns in asked for pattern in patterns)


def test_damaged_weights(refused, hub, model):
    folder = hub("model")
    model.save_pretrained(folder, ByteTokenizer())
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert "is damaged or was replaced" in refused(1, "download", "owner/model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs", "'runs' is no name on the hub; give owner/name, or owner/name/file.gguf"),
        ("a/b/c", "'a/b/c' is no name on the hub"),
        ("owner/none", "no model on the hub: owner/none is not in the cache, and HF_HUB_OFFLINE=1"),
    ],
)
def test_names_that_are_not_there(refused, hub, name, message):
    assert message in refused(2, "download", name)
