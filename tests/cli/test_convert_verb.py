"""`anymamba convert`, and the other verbs on what it writes."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, normalizers

from anymamba import LanguageModel, ModelConfig
from anymamba.cli.app import main
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.models.checkpoints import find_tokenizer


@pytest.fixture
def model(tmp_path):
    LanguageModel(ModelConfig(d_model=32, n_layers=2, vocab_size=257)).save_pretrained(tmp_path / "m", ByteTokenizer())
    return str(tmp_path / "m")


def test_there_and_back_generates_the_same(tmp_path, model, capsys):
    texts = []
    for name, source, to in (("a", model, None), ("ss", model, "state-spaces"), ("x.gguf", model, "gguf")):
        path = str(tmp_path / name) if to else model
        if to:
            assert main(["convert", source, path, "--to", to]) == 0
            error = capsys.readouterr().err
            assert "converting" in error and "100%" in error and f"wrote {path}" in error
        assert (
            main(["generate", "--model", path, "--prompt", "ab", "--max-new-tokens", "12", "--temperature", "0"]) == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] and texts[0].startswith("ab")


@pytest.mark.parametrize("dtype", ["bfloat16", "q8_0"])
def test_dtypes(tmp_path, model, dtype, capsys):
    assert (
        main(["convert", model, str(tmp_path / "x.gguf"), "--to", "gguf", "--dtype", dtype, "--tokenizer", "none"]) == 0
    )
    assert main(["eval", "--model", str(tmp_path / "x.gguf"), "--data", __file__, "--tokenizer", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere", "out", "--to", "hf"], 2, "no model folder nowhere; give one with config.json"),
        (["MODEL", "MODEL", "--to", "hf"], 2, "exists already; name a new folder"),
        (["MODEL", "out", "--to", "hf", "--dtype", "q8_0"], 2, "dtype q8_0 is for gguf"),
        (["MODEL", "out", "--to", "hf", "--shard-bytes", "0"], 2, "--shard-bytes must be at least 1, got 0"),
        (["MODEL", "out", "--to", "hf", "--tokenizer", "absent"], 2, "no tokenizer at absent; give a tokenizer.json"),
        (["MODEL", "out", "--to", "onnx"], 2, "onnx"),
        (["MODEL", "out"], 2, "--to"),
    ],
)
def test_misuse(tmp_path, model, arguments, code, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *(model if a == "MODEL" else a for a in arguments)]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_the_format_cannot_hold(tmp_path, capsys):
    config = ModelConfig(d_model=8, n_layers=1, vocab_size=8, norm="layernorm")
    LanguageModel(config).save_pretrained(tmp_path / "m")
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "out"), "--to", "gguf"]) == 1
    assert "error: the format gguf cannot hold this model: norm='layernorm'" in capsys.readouterr().err


def test_what_llama_cpp_does_otherwise_is_told_in_a_line(tmp_path, capsys):
    tokenizer = Tokenizer(models.WordLevel({"apple": 7, "other": 0}, unk_token="other"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(tmp_path / "words.json"))
    LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=8)).save_pretrained(tmp_path / "m")
    arguments = ["convert", str(tmp_path / "m"), str(tmp_path / "x.gguf"), "--to", "gguf"]
    assert main([*arguments, "--tokenizer", str(tmp_path / "words.json")]) == 0
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if "llama.cpp" in line]
    assert line.startswith(
        "warning: llama.cpp does not do all that the tokenizer in x.gguf does: it does not support this kind"
    )
    assert captured.out == ""
    assert find_tokenizer(tmp_path / "x.gguf").encode("APPLE") == [7]


def test_nothing_is_told_of_bytes(tmp_path, model, capsys):
    assert main(["convert", model, str(tmp_path / "x.gguf"), "--to", "gguf"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_tokenizer_by_the_name_of_what_holds_it(tmp_path, model):
    """--tokenizer takes the same values as in the other verbs."""
    LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=257)).save_pretrained(tmp_path / "bare")
    for name in (model, f"{model}/tokenizer.json"):
        out = tmp_path / f"out{len(name)}"
        assert main(["convert", str(tmp_path / "bare"), str(out), "--to", "hf", "--tokenizer", name]) == 0
        assert (out / "tokenizer.json").read_text() == ByteTokenizer().to_json()
