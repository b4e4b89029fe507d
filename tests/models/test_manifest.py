"""Manifests: what they list, what they tell, when they are written, and the ways out."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from anymamba import LanguageModel, ModelConfig
from anymamba.base import manifest
from anymamba.base.errors import CheckpointError
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.models.checkpoints import convert, load_pretrained, open_checkpoint, save_pretrained
from anymamba.models.checkpoints.formats import files, torch_archive
from anymamba.models.classifier import ClassifierConfig, SequenceClassifier

CONFIG = ModelConfig(d_model=8, n_layers=1, vocab_size=257)
WAY_OUT = r"; copy it again; if it was changed on purpose, delete .*manifest\.json or pass --no-verify \(verify=False\)"


def model(seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(CONFIG)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_pretrained(model(), folder, ByteTokenizer())
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def listed(folder: Path) -> set[str]:
    return set(json.loads((folder / manifest.NAME).read_text())["files"])


def flip(path: Path, place: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_it_lists_what_loading_reads(folder, tmp_path):
    assert listed(folder) == {"config.json", "model.safetensors", "tokenizer.json"}
    values = json.loads((folder / manifest.NAME).read_text())
    assert values["format_version"] == 1
    assert values["files"]["config.json"]["bytes"] == (folder / "config.json").stat().st_size
    save_pretrained(model(), tmp_path / "shards", shard_bytes=3000)
    written = {path.name for path in (tmp_path / "shards").iterdir()} - {manifest.NAME}
    assert listed(tmp_path / "shards") == written and len(written) > 3


@pytest.mark.parametrize("to", ["hf", "anymamba", "state-spaces", "gguf"])
def test_converted_folders_have_one(folder, tmp_path, to):
    """A GGUF file has its digest inside; the tokenizer beside it is listed."""
    if to == "gguf":
        pytest.importorskip("gguf", reason="the extra 'gguf' installs gguf")
    convert(folder, tmp_path / "out", to)
    weights = {"gguf": set(), "state-spaces": {"config.json", "pytorch_model.bin"}}
    assert listed(tmp_path / "out") == weights.get(to, {"config.json", "model.safetensors"}) | {"tokenizer.json"}
    flip(max((tmp_path / "out").iterdir(), key=lambda path: path.stat().st_size))
    with pytest.raises(CheckpointError, match="is damaged or was"):
        load_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_the_error_names_the_file_and_the_way_out(folder, tmp_path, name):
    flip(folder / name)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged or was replaced: its SHA-256 .*{WAY_OUT}") as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=name):
        convert(folder, tmp_path / "out", "hf")
    (folder / name).write_bytes(b"short")
    with pytest.raises(CheckpointError, match=rf"{name} is truncated or was replaced: .* has 5{WAY_OUT}"):
        load_pretrained(folder)


def test_the_ways_out(folder, tmp_path):
    flip(folder / "model.safetensors")
    changed = load_pretrained(folder, verify=False)
    assert not torch.equal(changed.norm.weight, model().norm.weight)
    convert(folder, tmp_path / "out", "hf", verify=False)
    load_pretrained(tmp_path / "out")
    (folder / manifest.NAME).unlink()
    load_pretrained(folder)


def test_saving_again_renews_it(folder, original):
    """Files that the new model does not have are no longer listed, those that it leaves alone still are."""
    save_pretrained(model(1), folder)
    assert listed(folder) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert torch.equal(load_pretrained(folder).embedding.weight, model(1).embedding.weight)
    shutil.copyfile(original / "config.json", folder / "tokenizer.json")
    save_pretrained(model(), folder)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is truncated or was replaced"):
        load_pretrained(folder)


def test_files_of_others_are_left_alone(folder):
    """A file that is not listed may be there, and one that is listed may be missing."""
    (folder / "README.md").write_text("a model")
    (folder / "tokenizer.json").unlink()
    load_pretrained(folder)


def test_a_classifier_lists_its_head(tmp_path):
    SequenceClassifier(model(), ClassifierConfig(n_outputs=3)).save_pretrained(tmp_path)
    assert len(listed(tmp_path)) == 4
    SequenceClassifier.from_pretrained(tmp_path)
    flip(next(path for path in tmp_path.glob("*.safetensors") if path.name != "model.safetensors"))
    with pytest.raises(CheckpointError, match="is damaged"):
        SequenceClassifier.from_pretrained(tmp_path)
    SequenceClassifier.from_pretrained(tmp_path, verify=False)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"files": []}', '{"files": {"a": 3}}', '{"files": {"../a": {"bytes": 1, "sha256": ""}}}']
)
def test_a_manifest_that_cannot_be_read(folder, text):
    (folder / manifest.NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json.*; delete it to load the folder unchecked"):
        load_pretrained(folder)
    save_pretrained(model(), folder)
    load_pretrained(folder)


def test_a_newer_manifest(folder):
    values = json.loads((folder / manifest.NAME).read_text()) | {"format_version": 2}
    (folder / manifest.NAME).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"manifest\.json has format version 2, .* upgrade"):
        load_pretrained(folder)


def test_a_save_that_is_seen_half_done(folder, monkeypatch):
    """Another process replaces the model while its files are compared: they are compared again with its manifest."""
    whole, calls = manifest._digests, []

    def digests(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            with monkeypatch.context() as patch:
                patch.setattr(manifest, "_digests", whole)
                save_pretrained(model(1), folder)
        return whole(*arguments)

    monkeypatch.setattr(manifest, "_digests", digests)
    manifest.check(folder)
    assert len(calls) == 2


def test_a_folder_that_is_removed_meanwhile(folder, monkeypatch):
    """As a damaged table of the cache is by the process that builds it again."""

    def digests(*arguments):
        shutil.rmtree(folder)
        raise FileNotFoundError

    monkeypatch.setattr(manifest, "_digests", digests)
    assert not manifest.check(folder)


def test_a_save_that_fails_before_anything_is_replaced_keeps_it(folder):
    before = (folder / manifest.NAME).read_text()
    with pytest.raises(RuntimeError, match="early"), manifest.rewritten(folder):
        assert not (folder / manifest.NAME).exists()
        raise RuntimeError("early")
    assert (folder / manifest.NAME).read_text() == before
    with pytest.raises(RuntimeError, match="late"), manifest.rewritten(folder):
        flip(folder / "config.json", 0)
        raise RuntimeError("late")
    assert not (folder / manifest.NAME).exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".") and path.suffix == ".tmp"]


@pytest.mark.parametrize("format", ["hf", "state-spaces", "gguf"])
def test_a_model_that_is_replaced_while_it_is_read(tmp_path, monkeypatch, format):
    """As by a run that saves its next checkpoint: the weights of two models are never mixed."""
    if format == "gguf":
        pytest.importorskip("gguf", reason="the extra 'gguf' installs gguf")
    for module in (files, torch_archive):
        monkeypatch.setattr(module, "MAPPED_BYTES", 1)
    save_pretrained(model(), tmp_path, format=format)
    tensors = open_checkpoint(tmp_path).tensors()
    next(tensors)
    save_pretrained(model(1), tmp_path, format=format)
    with pytest.raises(CheckpointError, match="was replaced while it was read; load it again"):
        list(tensors)


# ------------------------------------------------------------------------------------------ torch's checksums


@pytest.fixture
def archive(tmp_path) -> Path:
    save_pretrained(model(), tmp_path, format="state-spaces")
    (tmp_path / manifest.NAME).unlink()
    return tmp_path / "pytorch_model.bin"


def test_an_archives_checksums_tell_every_changed_member(archive):
    with zipfile.ZipFile(archive) as file:
        places = {info.filename: info.header_offset + 30 + len(info.filename) for info in file.infolist()}
        ends = {info.filename: file.getinfo(info.filename).compress_size for info in file.infolist()}
    good = archive.read_bytes()
    for name, start in places.items():
        if ends[name]:
            data = bytearray(good)
            extra = int.from_bytes(data[start - len(name) - 2 : start - len(name)], "little")
            data[start + extra + ends[name] // 2] ^= 1
            archive.write_bytes(data)
            with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged \(Bad CRC-32 for file '.*'\)"):
                load_pretrained(archive.parent)


def test_an_archive_without_checksums_is_read(archive):
    """As torch.serialization.set_crc32_options(False) writes it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.load(archive), archive)
    finally:
        torch.serialization.set_crc32_options(before)
    load_pretrained(archive.parent)


def test_checksums_are_read_once_and_not_at_all_where_a_manifest_tells(archive, monkeypatch):
    opened = []
    whole = zipfile.ZipFile.open
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda self, name, *a: (opened.append(name), whole(self, name, *a))[1])
    load_pretrained(archive.parent)
    assert len(opened) == len(set(opened)) > 3
    opened.clear()
    load_pretrained(archive.parent, verify=False)
    save_pretrained(model(), archive.parent, format="state-spaces")
    load_pretrained(archive.parent)
    assert not opened
