"""`anymamba generate --speculate` and `--draft`: the same text, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from anymamba.data.tokenizer import load_tokenizer
from anymamba.generation.speculation.pacing import Pacing
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Guess whenever there is a guess."""
    monkeypatch.setattr(Pacing, "best", lambda self, chances: len(chances))


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("draft") / "draft"
    torch.manual_seed(1)
    LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=257)).save_pretrained(folder, load_tokenizer(None))
    return folder


@pytest.mark.parametrize("flags", [("--speculate", 6), ("--draft", "DRAFT"), ("--draft", "DRAFT", "--speculate", 2)])
def test_the_text_is_the_same(run, model_folder, draft_folder, flags):
    flags = [draft_folder if flag == "DRAFT" else flag for flag in flags]
    command = ["generate", "--model", model_folder, "--prompt", "abc abc abc", "--max-new-tokens", 40, "--json"]
    code, plain, _ = run(*command)
    assert code == 0
    code, ahead, err = run(*command, *flags)
    assert code == 0 and json.loads(ahead)["results"] == json.loads(plain)["results"]
    if "--draft" in flags:
        assert "guesses were right" in err


def test_a_batch_runs_without_and_says_so(run, model_folder):
    command = ["generate", "--model", model_folder, "--prompt", "ab", "--prompt", "cd", "--max-new-tokens", 5, "--json"]
    _, plain, _ = run(*command)
    _, together, err = run(*command, "--speculate", 4)
    assert json.loads(together) == json.loads(plain)
    assert "speculation serves one continuation at a time, so batches run without it; --batch-size 1 runs" in err
    _, _, err = run(*command, "--speculate", 4, "--batch-size", 1)
    assert "serves one" not in err


def test_what_is_refused(refused, model_folder, tmp_path):
    command = [2, "generate", "--model", model_folder, "--prompt", "a"]
    assert "--speculate must be at least 1, got 0" in refused(*command, "--speculate=0")
    assert "--num-beams 2 searches without guesses" in refused(*command, "--num-beams", 2, "--speculate", 3)
    other = LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=256))
    other.save_pretrained(tmp_path / "other", load_tokenizer(None).__class__(end_of_document=False))
    assert "the draft model must have the tokenizer of the model" in refused(*command, "--draft", tmp_path / "other")
