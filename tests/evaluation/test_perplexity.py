"""Evaluation: any cut of the stream gives the same as one document at a time, and the result says what was counted."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from anymamba.data.table import TokenTable
from anymamba.evaluation import perplexity
from anymamba.evaluation.perplexity import EvaluationResult, evaluate
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel

VOCAB, EOS = 21, 20
LENGTHS = (1, 17, 2, 3, 1, 1, 8, 37, 5)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(3)
    model = LanguageModel(ModelConfig(d_model=16, n_layers=2, vocab_size=VOCAB, tie_embeddings=False))
    with torch.no_grad():
        model.embedding.weight.mul_(30)
        model.head.weight.mul_(3)
    return model


def table_of(lengths, seed=0, factor=1) -> TokenTable:
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, EOS, n).astype(np.uint16) for n in lengths]
    return TokenTable.from_arrays(documents, np.array(lengths) * factor)


@torch.no_grad()
def nats_of(model: LanguageModel, tokens: list[int], eos: int | None) -> float:
    """The loss on one document, in one pass without state."""
    ids = torch.tensor([([] if eos is None else [eos]) + tokens])
    if ids.shape[1] < 2:
        return 0.0
    log_probabilities = model.double()(ids[:, :-1]).logits[0].log_softmax(-1)
    model.float()
    return -log_probabilities.gather(1, ids[0, 1:, None]).sum().item()


@pytest.mark.parametrize("eos", [EOS, None])
@pytest.mark.parametrize("chunk", [1, 7, 16, 41, 1000])
def test_any_cut_equals_one_document_at_a_time(model, chunk, eos):
    table = table_of(LENGTHS, factor=3)
    wanted = sum(nats_of(model, table.read(i, 0, n).tolist(), eos) for i, n in enumerate(table.lengths))
    result = evaluate(model, table, eos, chunk=chunk)
    assert result.nats == pytest.approx(wanted, rel=1e-5)
    if eos is None:
        assert (result.n_tokens, result.n_documents, result.n_bytes) == (sum(LENGTHS) - len(LENGTHS), 6, None)
        assert result.bits_per_byte is None and not result.counts_first_tokens
    else:
        assert (result.n_tokens, result.n_documents, result.n_bytes) == (sum(LENGTHS), 9, 3 * sum(LENGTHS))
        assert result.bits_per_byte == pytest.approx(wanted / math.log(2) / (3 * sum(LENGTHS)), rel=1e-5)
    assert result.nats_per_token == pytest.approx(wanted / result.n_tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(wanted / result.n_tokens), rel=1e-4)


def test_the_order_of_documents_and_their_neighbours_do_not_matter(model):
    table = table_of(LENGTHS)
    parts = [evaluate(model, table.select([i]), EOS).nats for i in range(len(LENGTHS))]
    assert evaluate(model, table, EOS, chunk=50).nats == pytest.approx(sum(parts), rel=1e-5)


def test_few_documents_share_a_pass_where_states_are_large(model, monkeypatch):
    table = table_of(LENGTHS)
    wanted = evaluate(model, table, EOS).nats
    monkeypatch.setattr(perplexity, "STATE_BYTES", 1)
    calls = count_calls(model, monkeypatch)
    assert evaluate(model, table, EOS).nats == pytest.approx(wanted, rel=1e-5)
    assert calls == list(LENGTHS)


def count_calls(model, monkeypatch) -> list[int]:
    calls, loss = [], type(model).loss
    monkeypatch.setattr(
        type(model), "loss", lambda self, ids, *a, **k: calls.append(ids.shape[1]) or loss(self, ids, *a, **k)
    )
    return calls


def test_passes_are_full_whatever_the_documents_lengths(model, monkeypatch):
    calls = count_calls(model, monkeypatch)
    evaluate(model, table_of([3] * 100 + [250] + [1] * 50), EOS, chunk=64)
    assert calls == [64] * 9 + [600 - 9 * 64]


def test_a_long_document_is_read_and_run_in_chunks(model, monkeypatch):
    """The tokens in memory at once do not depend on the document's length; the table is read in chunks."""

    class Endless:
        """A table of one document whose tokens are made when they are read."""

        n_documents, names = 1, ("endless",)

        def __init__(self, length: int) -> None:
            self.lengths, self.n_bytes, self.most_read = np.array([length]), length, 0

        def read(self, document: int, start: int, stop: int) -> np.ndarray:
            self.most_read = max(self.most_read, stop - start)
            return np.arange(start, stop) % EOS

    table, calls = Endless(2000), count_calls(model, monkeypatch)
    assert evaluate(model, table, EOS, chunk=64).n_tokens == 2000
    assert table.most_read <= 65
    assert max(calls) == 64 and len(calls) == 32


def test_padding_of_the_vocabulary_counts_as_the_loss_does_and_ids_outside_are_refused(model):
    documents = [np.array([1, 2, 3]), np.array([4, 5, 6, VOCAB, 7])]
    with pytest.raises(ValueError, match=r"document 1 \(document 1\) has the id 21 at position 3, outside .* of 21"):
        evaluate(model, TokenTable.from_arrays(documents), EOS, chunk=3)
    with pytest.raises(ValueError, match="eos_id must be an id of the vocabulary of 21, got 21"):
        evaluate(model, table_of([3]), VOCAB)
    first = TokenTable.from_arrays([np.array([VOCAB, 1])])
    with pytest.raises(ValueError, match="has the id 21 at position 0"):
        evaluate(model, first, None)


def test_nothing_to_count(model):
    with pytest.raises(ValueError, match="nothing to count in 0 documents; a document needs at least one token"):
        evaluate(model, table_of([]), EOS)
    with pytest.raises(ValueError, match="nothing to count in 2 documents; a document needs two tokens"):
        evaluate(model, table_of([1, 1]), None)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        evaluate(model, table_of([1]), EOS, chunk=0)


def test_a_loss_that_is_not_a_number_is_an_error(model):
    broken = LanguageModel(model.config)
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"the loss is nan from document 0 \(document 0\) on"):
        evaluate(broken, table_of([4]), EOS)


def test_progress_reaches_the_whole(model):
    seen = []
    evaluate(model, table_of(LENGTHS), EOS, chunk=32, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (sum(LENGTHS), sum(LENGTHS))
    assert seen == sorted(set(seen)) and len(seen) == math.ceil(sum(LENGTHS) / 32)


def test_a_uniform_model_takes_log2_of_the_vocabulary():
    model = LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=256))
    with torch.no_grad():
        model.embedding.weight.zero_()
    result = evaluate(model, TokenTable.from_arrays([np.arange(100)]), 0)
    assert result.bits_per_byte == pytest.approx(8, rel=1e-6)
    assert result.perplexity == pytest.approx(256, rel=1e-6)


def test_the_result_says_what_was_counted():
    result = EvaluationResult(1000 * math.log(2), 1234, 2000, 2, True)
    assert result.summary() == (
        "0.5000 bits per byte, 0.5617 nats per token, perplexity 1.75 over 2 documents, 1,234 tokens, 2,000 bytes "
        "(first tokens included, ends of documents not counted)"
    )
    assert json.loads(json.dumps(result.to_dict())) == {
        "bits_per_byte": pytest.approx(0.5),
        "nats_per_token": pytest.approx(result.nats / 1234),
        "perplexity": pytest.approx(result.perplexity),
        "nats": result.nats,
        "n_tokens": 1234,
        "n_bytes": 2000,
        "n_documents": 2,
        "counts_first_tokens": True,
        "counts_end_of_document": False,
    }
    unknown = EvaluationResult(10.0, 5, None, 1, False)
    assert unknown.summary() == (
        "2.0000 nats per token, perplexity 7.39 over 1 document, 5 tokens "
        "(the first token of each document not counted, ends of documents not counted)"
    )
    assert EvaluationResult(1e6, 1, 1, 1, True).perplexity == math.inf
