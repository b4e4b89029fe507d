"""A run, and each checkpoint in it, name the tokenizer that the run was trained with."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from anymamba import load_tokenizer
from anymamba.models.checkpoints import find_tokenizer


@pytest.fixture
def words(tmp_path):
    """A tokenizer.json for the texts."""
    tokenizer = Tokenizer(models.WordLevel({"line": 0, "of": 1, "a": 2, "text": 3, "?": 4}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    return tmp_path / "words.json"


def test_a_run_and_its_checkpoints(run, texts, words, tmp_path):
    sizes = ["--preset", "nano", "--steps", 2, "--batch-size", 2, "--context", 16, "--data.held-out-fraction", 0]
    code, _, err = run("train", "--data", texts, "--tokenizer", words, "--out", tmp_path / "run", *sizes)
    assert code == 0, err
    places = [tmp_path / "run", *(tmp_path / "run" / "checkpoints").iterdir()]
    assert len(places) == 3
    for place in places:
        for tokenizer in (load_tokenizer(place), find_tokenizer(place), find_tokenizer(given=place)):
            assert tokenizer.encode("a line of text") == [2, 0, 1, 3], place
        arguments = ["--prompt", "a line", "--max-new-tokens", 1]
        assert run("generate", "--model", place, *arguments)[0] == 0
        assert run("generate", "--model", tmp_path / "run", "--tokenizer", place, *arguments)[0] == 0
