"""`anymamba eval`: the measures, what was counted, and errors."""

from __future__ import annotations

import json
import math

import pytest

from anymamba.cli.evaluate import finite, readable
from anymamba.data.table import build_token_table
from anymamba.data.tokenizer import load_tokenizer
from anymamba.evaluation.perplexity import EvaluationResult, evaluate
from anymamba.models.language_model import LanguageModel


@pytest.fixture
def measured(run):
    """Runs `eval --json` and returns its object."""

    def call(*arguments: object) -> dict:
        code, out, err = run("eval", "--json", *arguments)
        assert code == 0, err
        return json.loads(out)

    return call


def test_json_is_what_python_measures(measured, model_folder, texts):
    got = measured("--model", model_folder, "--data", texts)
    tokenizer = load_tokenizer(model_folder)
    expected = evaluate(LanguageModel.from_pretrained(model_folder), build_token_table(texts, tokenizer), 256)
    assert got == {"model": str(model_folder)} | json.loads(json.dumps(expected.to_dict()))
    n_bytes = sum(len(path.read_bytes()) for path in texts.iterdir())
    assert (got["n_tokens"], got["n_bytes"], got["n_documents"]) == (n_bytes, n_bytes, 3)


def test_text_has_the_measures_and_what_was_counted(run, model_folder, texts):
    code, out, err = run("eval", "--model", model_folder, "--data", texts)
    assert code == 0
    for words in ("bits per byte", "nats per token", "perplexity", "3 documents", "ends of documents are not counted"):
        assert words in out
    assert "tokens" in err  # progress


def test_the_chunk_does_not_change_the_result(measured, model_folder, texts):
    whole, cut = (measured("--model", model_folder, "--data", texts, "--chunk", chunk) for chunk in (10_000, 37))
    assert math.isclose(whole["nats"], cut["nats"], rel_tol=1e-5)


def test_several_files_and_a_repeated_flag(measured, model_folder, texts):
    files = sorted(texts.iterdir())
    arguments = ["--data", files[0], files[1], "--data", files[2]]
    assert measured("--model", model_folder, *arguments)["n_documents"] == 3


def test_text_field(measured, model_folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "abc"}\n{"body": "de"}\n')
    got = measured("--model", model_folder, "--data", tmp_path / "a.jsonl", "--text-field", "body")
    assert (got["n_documents"], got["n_bytes"]) == (2, 5)


def test_an_infinite_perplexity_is_null_in_json():
    assert finite(math.inf) is None and finite(2.5) == 2.5 and finite(None) is None


def test_without_an_end_of_document_id_the_bytes_are_not_known():
    lines = readable(EvaluationResult(2.0, 1, None, 1, False))
    assert lines["bits per byte"].startswith("not known") and "not counted" in lines["counted"]


def test_no_data(refused, model_folder):
    assert "data" in refused(2, "eval", "--model", model_folder)


def test_a_chunk_of_nothing(refused, model_folder, texts):
    assert "chunk" in refused(2, "eval", "--model", model_folder, "--data", texts, "--chunk", 0)


def test_tokens_outside_the_vocabulary(refused, model_folder, big_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("apple apple apple")
    arguments = ["--tokenizer", big_tokenizer, "--data", tmp_path / "a.txt"]
    assert "vocabulary" in refused(2, "eval", "--model", model_folder, *arguments)
