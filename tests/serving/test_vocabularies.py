"""Models whose tokenizers are not byte-level are served; forms of answers are refused where they cannot be kept."""

from __future__ import annotations

import re

import pytest
import tokenizers
import torch
from live_server import live

from anymamba.data.dna import DnaTokenizer
from anymamba.data.tokenizer import load_tokenizer
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel

BODY = {"prompt": "ACGT", "max_tokens": 30, "seed": 1}


def save_model(folder, tokenizer):
    torch.manual_seed(0)
    LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=tokenizer.vocab_size)).save_pretrained(
        folder, tokenizer
    )


def test_an_answer_of_a_dna_model_is_held_to_a_form(tmp_path):
    save_model(tmp_path, DnaTokenizer())
    with live(tmp_path) as server:
        assert len(server.good("/v1/completions", BODY)["choices"][0]["text"]) >= 30
        choice = server.good("/v1/completions", {**BODY, "guided_regex": "[ACGT]{9}TATA"})["choices"][0]
        assert re.fullmatch("[ACGT]{9}TATA", choice["text"]) and choice["finish_reason"] == "stop"


@pytest.mark.parametrize("decoder", [None, tokenizers.decoders.WordPiece()])
def test_a_form_is_refused_where_the_text_of_a_token_depends_on_the_others(tmp_path, decoder):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"A": 0, "C": 1, "G": 2, "T": 3}, unk_token="A"))
    if decoder is not None:
        words.decoder = decoder
    words.save(str(tmp_path / "tokenizer.json"))
    save_model(tmp_path, load_tokenizer(tmp_path / "tokenizer.json"))
    with live(tmp_path) as server:
        assert server.good("/v1/completions", BODY)["choices"][0]["text"]
        error = server.refused(400, "/v1/completions", {**BODY, "guided_regex": "A+"})
        assert error["param"] == "guided_regex" and "tokenizer" in error["message"]
