"""The tokenizer of a model: one rule for every format."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models

from anymamba import ModelConfig, load_tokenizer
from anymamba.data.tokenizer import ByteTokenizer, JsonTokenizer
from anymamba.models.checkpoints import CheckpointWarning, convert, find_tokenizer, load_pretrained, open_checkpoint
from anymamba.models.checkpoints.formats import gguf
from anymamba.models.checkpoints.formats.gguf_header import read_header

FOREIGN = ModelConfig(d_model=8, n_layers=1, vocab_size=300)
BYTES = ModelConfig(d_model=8, n_layers=1, vocab_size=257)
ONLY_BYTES = ModelConfig(d_model=8, n_layers=1, vocab_size=256)


@pytest.fixture
def words(tmp_path):
    """A tokenizer.json."""
    path = tmp_path / "words" / "tokenizer.json"
    path.parent.mkdir()
    Tokenizer(models.WordLevel({"apple": 7, "other": 0}, unk_token="other")).save(str(path))
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch, moved, words):
    """A cache of the hub, offline: a model with a tokenizer, one without, and a tokenizer without a model."""
    pytest.importorskip("gguf", reason="the extra 'gguf' installs gguf")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name in ("whole", "bare", "only"):
        repository = tmp_path / "hub" / f"models--owner--{name}"
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        if name != "only":
            moved(FOREIGN).save_pretrained(folder)
            with pytest.warns(CheckpointWarning, match="does not support this kind"):
                moved(FOREIGN).save_pretrained(folder / "x.gguf", JsonTokenizer(words), format="gguf")
        if name != "bare":
            JsonTokenizer(words).save(folder)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)


def is_words(tokenizer) -> bool:
    return isinstance(tokenizer, JsonTokenizer) and tokenizer.encode("apple") == [7]


@pytest.mark.filterwarnings("ignore::anymamba.models.checkpoints.CheckpointWarning")
def test_a_model_has_its_own_tokenizer_wherever_it_lies(tmp_path, moved, words, hub):
    moved(FOREIGN).save_pretrained(tmp_path / "folder", JsonTokenizer(words))
    convert(tmp_path / "folder", tmp_path / "original", "state-spaces")
    convert(tmp_path / "folder", tmp_path / "one.gguf", "gguf")
    convert(tmp_path / "folder", tmp_path / "gguf", "gguf")
    (tmp_path / "gguf" / "tokenizer.json").unlink()
    for name in ("folder", "original", "one.gguf", "gguf", "owner/whole", "owner/whole/x.gguf", "owner/bare/x.gguf"):
        assert is_words(find_tokenizer(name)), name
        assert is_words(find_tokenizer(given=name)), f"{name} names a tokenizer, too"
        assert is_words(load_tokenizer(name)), name
        assert is_words(find_tokenizer(tmp_path / "folder", name))


def test_a_foreign_model_without_a_tokenizer_is_refused(tmp_path, moved, words, hub):
    moved(FOREIGN).save_pretrained(tmp_path / "folder")
    moved(FOREIGN).save_pretrained(tmp_path / "one.gguf", format="gguf")
    for name in ("folder", tmp_path / "one.gguf", "owner/bare"):
        with pytest.raises(
            FileNotFoundError,
            match=rf"{name} has no tokenizer that can be read, and its vocabulary of 300 is not bytes; name its "
            r"tokenizer\.json with --tokenizer FILE \(tokenizer=FILE for lm-eval\)",
        ):
            find_tokenizer(name)
        assert is_words(find_tokenizer(name, words))
    with pytest.raises(
        FileNotFoundError, match="the model has no tokenizer that can be read, and its vocabulary of 300"
    ):
        find_tokenizer(vocab_size=300)


@pytest.mark.parametrize("form", ["folder", "one.gguf", "original"])
@pytest.mark.parametrize("config", [BYTES, ONLY_BYTES], ids=["257", "256"])
def test_a_model_of_bytes_needs_no_tokenizer(tmp_path, moved, config, form):
    if form == "one.gguf":
        pytest.importorskip("gguf", reason="the extra 'gguf' installs gguf")
    moved(config).save_pretrained(
        tmp_path / form, format={"folder": None, "original": "state-spaces"}.get(form, "gguf")
    )
    tokenizer = find_tokenizer(tmp_path / form)
    assert isinstance(tokenizer, ByteTokenizer) and tokenizer.vocab_size == config.vocab_size
    assert tokenizer.eos_id == (256 if config is BYTES else None)
    assert find_tokenizer(vocab_size=config.vocab_size).vocab_size == config.vocab_size
    assert load_tokenizer(str(tmp_path / form)).fingerprint == tokenizer.fingerprint


def test_what_is_given_comes_first(tmp_path, moved, words):
    moved(BYTES).save_pretrained(tmp_path / "folder", ByteTokenizer())
    given = JsonTokenizer(words)
    assert find_tokenizer(tmp_path / "folder", given) is given
    for name in (words, str(words), words.parent):
        assert is_words(find_tokenizer(tmp_path / "folder", name))


def test_a_model_that_is_yet_to_be_made_takes_bytes():
    tokenizer = find_tokenizer()
    assert isinstance(tokenizer, ByteTokenizer) and tokenizer.eos_id == 256


def test_a_tokenizer_on_the_hub_comes_without_the_weights(hub, monkeypatch):
    import huggingface_hub

    asked = []
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: asked.extend(k["allow_patterns"]) or real(*a, **k)
    )
    assert is_words(find_tokenizer(vocab_size=300, given="owner/only"))
    assert is_words(load_tokenizer("owner/only"))
    assert asked == ["*.json", "*.jinja", "tokenizer.model"] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no tokenizer at nowhere; give a tokenizer.json or a folder"),
        ("some/where.json", "no tokenizer at some/where.json; give a tokenizer.json or a folder"),
        ("nothing", "no tokenizer at nothing/tokenizer.json; give a tokenizer.json or a folder"),
        ("owner/absent", "no tokenizer: no model owner/absent here, and none on the hub: .*; unset it$"),
        ("owner/bare", "owner/bare holds no tokenizer that can be read; give a tokenizer.json"),
        ("empty.gguf", "empty.gguf holds no tokenizer that can be read; give a tokenizer.json"),
    ],
)
def test_names_without_a_tokenizer(hub, moved, tmp_path, name, message):
    moved(FOREIGN).save_pretrained(tmp_path / "empty.gguf", format="gguf")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match=message) as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path, moved):
    """A text of small ids would not show it."""
    Tokenizer(models.WordLevel({"apple": 49_999, "other": 0}, unk_token="other")).save(str(tmp_path / "big.json"))
    moved(BYTES).save_pretrained(tmp_path / "m")
    big = r"the tokenizer big has 50,000 ids and the model a vocabulary of (257|264); give the model's own tokenizer"
    for call in (
        lambda: find_tokenizer(open_checkpoint(tmp_path / "m"), tmp_path / "big.json"),
        lambda: find_tokenizer(given=tmp_path / "big.json", vocab_size=257),
        lambda: convert(tmp_path / "m", tmp_path / "out", "hf", tokenizer=tmp_path / "big.json"),
        lambda: moved(BYTES).save_pretrained(tmp_path / "out", JsonTokenizer(tmp_path / "big.json")),
    ):
        with pytest.raises(ValueError, match=big):
            call()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_a_gguf_file_is_opened_once(tmp_path, moved, monkeypatch, with_tokenizer):
    pytest.importorskip("gguf", reason="the extra 'gguf' installs gguf")
    moved(BYTES).save_pretrained(tmp_path / "x.gguf", ByteTokenizer() if with_tokenizer else None, format="gguf")
    opened = []
    monkeypatch.setattr(gguf, "read_header", lambda path: (opened.append(path), read_header(path))[1])
    assert find_tokenizer(tmp_path / "x.gguf").vocab_size == 257 and len(opened) == 1
    opened.clear()
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    assert load_pretrained(checkpoint).config == BYTES
    assert find_tokenizer(checkpoint).vocab_size == 257 and len(opened) == 1
