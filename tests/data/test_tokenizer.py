"""Tokenizers: ids and text both ways, the saved file as other libraries read it, streams of whole characters."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from anymamba.data.tokenizer import ByteTokenizer, JsonTokenizer, StreamDecoder, load_tokenizer

TEXTS = [
    "",
    "def f(x):\n    return x\r\n",
    "naïve Ångström e\u0301",
    "日本語 😀👩‍👩‍👧 Ω≈ç√",
    "\x00\x1f\x7f\u0080 \ufeff  ",
]


@pytest.fixture(scope="module")
def neox(shared_data):
    return JsonTokenizer(shared_data / "tokenizers" / "gpt-neox-20b.tokenizer.json")


@pytest.fixture
def byte_file(tmp_path):
    ByteTokenizer().save(tmp_path)
    return tmp_path / "tokenizer.json"


@pytest.fixture
def spaces_and_byte_fallback(tmp_path):
    """A file like SentencePiece's: words begin with ▁, unknown characters are three byte tokens."""
    words = ["<unk>", "</s>", "▁", "▁the", "▁cat", "s", "a", "b"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "pieces.json"))
    return JsonTokenizer(tmp_path / "pieces.json")


@given(st.binary())
def test_any_bytes_survive_the_byte_tokenizer(data):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(data) == list(data)
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data
    assert tokenizer.decode(tokenizer.encode(data)) == data.decode("utf-8", errors="replace")


def test_byte_tokenizer_takes_text_for_text():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.encode("<|endoftext|>") == list(b"<|endoftext|>")
    assert tokenizer.decode([104, 105, 256]) == "hi<|endoftext|>"
    assert tokenizer.encode(b"\xff".decode("utf-8", "surrogateescape")) == [255], "bytes of the command line"
    assert tokenizer.encode_batch(["a", "bc"]) == [[97], [98, 99]]


@pytest.mark.parametrize("token", [-1, 257])
def test_ids_outside_the_vocabulary_are_refused(token, byte_file):
    with pytest.raises(ValueError, match=rf"token id {token} .*0 \.\. 256"):
        ByteTokenizer().decode([97, token])
    with pytest.raises(ValueError, match=rf"token id {token} "):
        JsonTokenizer(byte_file).decode([97, token])


@pytest.mark.parametrize(
    "form",
    [tuple, np.array, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int32), iter],
    ids=["tuple", "array", "tensor", "int32", "iterator"],
)
@pytest.mark.parametrize("which", ["bytes", "byte-level", "pieces"])
def test_ids_are_decoded_in_any_form(request, which, form, byte_file):
    pieces = request.getfixturevalue("spaces_and_byte_fallback")
    tokenizer = {"bytes": ByteTokenizer(), "byte-level": JsonTokenizer(byte_file), "pieces": pieces}[which]
    ids = tokenizer.encode("the cats é")
    assert tokenizer.decode(form(ids)) == tokenizer.decode(ids) != ""
    assert tokenizer.decode_bytes(form(ids)) == tokenizer.decode_bytes(ids)
    stream = StreamDecoder(tokenizer)
    assert stream.push(form(ids)) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("ids", [[1.5], [True], np.array([1.5]), torch.tensor([1.5]), torch.tensor([True])], ids=repr)
def test_ids_that_are_no_integers_are_refused(ids, byte_file):
    for tokenizer in (ByteTokenizer(), JsonTokenizer(byte_file)):
        with pytest.raises(TypeError, match="ids must hold integer token ids, got"):
            tokenizer.decode(ids)


@given(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<|endoftext|>" not in text))
def test_saved_bytes_give_the_same_ids_in_tokenizers(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    if not folder.exists():
        folder.mkdir()
        ByteTokenizer().save(folder)
    saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert saved.encode(text).ids == ByteTokenizer().encode(text)
    assert saved.decode(ByteTokenizer().encode(text)) == text


def test_saved_bytes_have_the_end_of_document_as_a_special_token(byte_file):
    saved = tokenizers.Tokenizer.from_file(str(byte_file))
    assert saved.encode("a<|endoftext|>b").ids == [97, 256, 98]
    assert saved.get_vocab_size() == 257
    assert saved.decode([97, 256], skip_special_tokens=True) == "a"


def test_saved_bytes_in_transformers_beside_a_mamba_config(byte_file):
    from transformers import AutoTokenizer

    (byte_file.parent / "config.json").write_text('{"model_type": "mamba"}')
    theirs = AutoTokenizer.from_pretrained(byte_file.parent)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ByteTokenizer().encode(text)
        assert theirs.decode(ByteTokenizer().encode(text)) == text
    assert theirs.eos_token_id == 256


def test_load_tokenizer_knows_its_own_bytes_again(byte_file):
    assert isinstance(load_tokenizer(None), ByteTokenizer)
    assert isinstance(load_tokenizer(byte_file), ByteTokenizer)
    assert isinstance(load_tokenizer(str(byte_file.parent)), ByteTokenizer)
    tokenizers.Tokenizer.from_file(str(byte_file)).save(str(byte_file))  # written again by another library
    assert isinstance(load_tokenizer(byte_file), ByteTokenizer)


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["model"]["vocab"].update({"a": 98, "b": 97}),
        lambda spec: spec.update(normalizer={"type": "NFC"}),
        lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
        lambda spec: spec["model"].update(merges=[["a", "b"]]) or spec["model"]["vocab"].update(ab=257),
        lambda spec: spec["added_tokens"].append({**spec["added_tokens"][0], "id": 257, "content": "<pad>"}),
    ],
)
def test_a_file_that_only_looks_like_bytes_is_not_taken_for_them(byte_file, change):
    spec = json.loads(byte_file.read_text())
    change(spec)
    byte_file.write_text(json.dumps(spec))
    assert isinstance(load_tokenizer(byte_file), JsonTokenizer)


def test_load_tokenizer_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        load_tokenizer(tmp_path / "missing.json")
    for content in ("not json", '{"model": {"type": "?"}}', "[1]"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=r"bad.json is not a tokenizer.json"):
            load_tokenizer(tmp_path / "bad.json")


def test_json_tokenizer_against_the_reference_encodings(neox, shared_data):
    lines = (shared_data / "tokenizers" / "gpt-neox-20b.reference_encodings.jsonl").read_text().splitlines()
    cases = [json.loads(line) for line in lines]
    assert len(cases) == 40
    assert (neox.vocab_size, neox.eos_id) == (50277, 0)
    for case in cases:
        assert neox.encode(case["text"]) == case["ids"]
        assert neox.encode(case["text"].encode()) == case["ids"]
        assert neox.decode(case["ids"]) == case["decoded"]
        assert neox.decode_bytes(case["ids"]) == case["decoded"].encode()
        stream = StreamDecoder(neox)
        assert "".join(stream.push([i]) for i in case["ids"]) + stream.flush() == case["decoded"]
    assert neox.encode_batch([case["text"] for case in cases]) == [case["ids"] for case in cases]


def test_json_tokenizer_switches_truncation_and_padding_off(byte_file):
    theirs = tokenizers.Tokenizer.from_file(str(byte_file))
    theirs.enable_truncation(3)
    theirs.enable_padding(length=8)
    theirs.save(str(byte_file.with_name("cut.json")))
    assert JsonTokenizer(byte_file.with_name("cut.json")).encode("abcdef") == list(b"abcdef")


def test_json_tokenizer_refuses_what_is_not_utf8(byte_file):
    with pytest.raises(ValueError, match=r"not valid UTF-8 at byte 2 .*byte tokenizer"):
        JsonTokenizer(byte_file).encode(b"ab\xff")
    with pytest.raises(ValueError, match=r"not valid UTF-8 at byte 1 "):
        JsonTokenizer(byte_file).encode("a\udcff")


def test_json_tokenizer_saves_what_it_read(neox, tmp_path):
    neox.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == neox.fingerprint != ByteTokenizer().fingerprint
    assert again.encode("def f(x):") == neox.encode("def f(x):")


def test_a_tokenizer_without_an_end_of_document(byte_file):
    spec = json.loads(byte_file.read_text())
    spec["added_tokens"][0]["content"] = "<pad>"
    byte_file.write_text(json.dumps(spec))
    assert JsonTokenizer(byte_file).eos_id is None


@given(st.binary(max_size=40), st.lists(st.integers(1, 5), max_size=40))
def test_stream_of_bytes_equals_the_whole_for_any_split(data, sizes):
    tokenizer = ByteTokenizer()
    stream, ids, text = StreamDecoder(tokenizer), list(data), ""
    for size in sizes:
        text += stream.push(ids[:size])
        ids = ids[size:]
    assert text + stream.push(ids) + stream.flush() == tokenizer.decode(data)


@pytest.mark.parametrize("text", TEXTS)
def test_stream_never_gives_half_a_character(text):
    ids = ByteTokenizer().encode(text)
    for split in range(len(ids) + 1):
        stream = StreamDecoder(ByteTokenizer())
        first, second = stream.push(ids[:split]), stream.push(ids[split:])
        assert "\ufffd" not in first + second
        assert first + second == text and stream.flush() == ""


def test_stream_gives_a_character_with_its_last_byte_and_flushes_half_ones():
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.push([byte]) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert stream.push([0xC3]) == "" and stream.flush() == "\ufffd"
    assert stream.push([0xA9]) == "\ufffd", "after a flush it starts afresh"


@pytest.mark.parametrize("text", ["the cats the cat", "the 日本 cat😀s", " a  b", "😀" * 30])
def test_stream_of_a_tokenizer_whose_tokens_depend_on_neighbours(spaces_and_byte_fallback, text):
    tokenizer = spaces_and_byte_fallback
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    whole = tokenizer.decode(ids)
    assert tokenizer.decode_bytes(ids) == whole.encode()
    for step in (1, 2, 3, 5, len(ids)):
        stream = StreamDecoder(tokenizer)
        given_out = [stream.push(ids[i : i + step]) for i in range(0, len(ids), step)]
        assert "".join(given_out) + stream.flush() == whole
        assert "\ufffd" not in "".join(given_out)


def test_stream_of_invalid_bytes_goes_on(spaces_and_byte_fallback):
    tokenizer = spaces_and_byte_fallback
    ids = [tokenizer._tokenizer.token_to_id("<0xFF>")] * 100
    stream = StreamDecoder(tokenizer)
    assert len(stream.push(ids)) > 50, "tokens that never become a character must not be held for ever"


@pytest.mark.parametrize("which", ["bytes", "pieces"])
def test_stream_costs_the_same_for_late_tokens(which, spaces_and_byte_fallback):
    tokenizer = ByteTokenizer() if which == "bytes" else spaces_and_byte_fallback
    ids = tokenizer.encode("a b the cats " * 20)
    stream = StreamDecoder(tokenizer)

    def best_time() -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            stream.push(ids)
            times.append(time.perf_counter() - start)
        return min(times)

    early = best_time()
    for _ in range(100):
        stream.push(ids)
    assert best_time() < 3 * early
