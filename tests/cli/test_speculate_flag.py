"""`anymamba generate --speculate` and `--draft`: the same text, and what is refused."""

from __future__ import annotations

import io
import json
import sys

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


def test_batches_have_the_same_text(run, model_folder):
    prompts = ["--prompt", "abab", "--prompt", "cdcd"]
    command = ["generate", "--model", model_folder, *prompts, "--max-new-tokens", 9, "--json"]
    assert json.loads(run(*command, "--speculate", 4)[1]) == json.loads(run(*command)[1])


def test_a_chat_has_the_same_text(run, model_folder, draft_folder, monkeypatch):
    command, said = ["chat", "--model", model_folder, "--max-new-tokens", 9], []
    for flags in ((), ("--speculate", 4), ("--draft", draft_folder)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abab\nabab\n")))
        code, out, _ = run(*command, *flags)
        assert code == 0
        said.append(out)
    assert said[0] == said[1] == said[2] != ""


def test_what_is_refused(refused, model_folder, tmp_path):
    command = [2, "generate", "--model", model_folder, "--prompt", "a"]
    assert "--speculate must be at least 1, got 0" in refused(*command, "--speculate=0")
    assert "--num-beams 2 searches without guesses" in refused(*command, "--num-beams", 2, "--speculate", 3)
    other = LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=256))
    other.save_pretrained(tmp_path / "other", load_tokenizer(None).__class__(end_of_document=False))
    assert "the draft model must have the tokenizer of --model" in refused(*command, "--draft", tmp_path / "other")
