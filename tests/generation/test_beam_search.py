"""Beam search against enumeration of all continuations."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from hash_model import HashModel
from test_prompts import prompts_of

from anymamba.data.tokenizer import ByteTokenizer
from anymamba.generation.beam import beam_search
from anymamba.generation.generate import generate
from anymamba.generation.prompts import read_prompts
from anymamba.generation.sampling import SamplingConfig
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel


def continuations(vocab_size: int, length: int, eos: int | None):
    """All continuations that beam search could return: up to the first eos, or of full length without one."""
    for n in range(1, length + 1):
        for ids in itertools.product(range(vocab_size), repeat=n):
            if eos in ids[:-1]:
                continue
            if ids[-1] == eos or n == length:
                yield list(ids)


def enumerated(log_probabilities_of, prompt, vocab_size, length, eos, penalty):
    """(score, ids) of all continuations, the best first."""
    found, after = [], functools.cache(lambda ids: log_probabilities_of(prompt + list(ids)).tolist())
    for ids in continuations(vocab_size, length, eos):
        total = sum(after(tuple(ids[:i]))[token] for i, token in enumerate(ids))
        found.append((total / len(ids) ** penalty, ids))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("eos", [None, 2])
@pytest.mark.parametrize("seed", range(3))
def test_enough_beams_find_the_best_of_all(seed, eos, penalty):
    model = HashModel(3, 8, seed=seed)
    wanted = enumerated(model.next_log_probabilities, [1], 3, 4, eos, penalty)
    (found,) = beam_search(model, [[1]], num_beams=81, max_new_tokens=4, n_best=81, length_penalty=penalty, eos_id=eos)
    assert len(found) == len(wanted)
    for hypothesis, (score, ids) in zip(found, wanted, strict=True):
        assert hypothesis.score == pytest.approx(score, abs=1e-5)
        assert hypothesis.ids == ids
        assert hypothesis.finish_reason == ("eos" if ids[-1] == eos else "length")
        assert hypothesis.log_probability == pytest.approx(score * len(ids) ** penalty, abs=1e-5)


def test_enough_beams_find_the_best_of_all_with_a_real_model():
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(d_model=16, n_layers=2, vocab_size=4, tie_embeddings=False))
    with torch.no_grad():
        model.embedding.weight.mul_(40)
        model.head.weight.mul_(4)

    def log_probabilities_of(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1, :4].log_softmax(-1)

    wanted = enumerated(log_probabilities_of, [1, 2], 4, 4, 3, 1.0)
    (found,) = beam_search(model, [[1, 2]], num_beams=64, max_new_tokens=4, n_best=10, eos_id=3)
    assert [h.ids for h in found] == [ids for _, ids in wanted[:10]]
    assert [h.score for h in found] == pytest.approx([score for score, _ in wanted[:10]], abs=1e-4)


@pytest.mark.parametrize("name", ["hash_model", "mamba"])
def test_the_states_follow_their_beams(request, name):
    """The log-probability of each result, computed again over its whole text, is the one that the search summed."""
    model = request.getfixturevalue(name)
    prompts = prompts_of((1, 9, 4), model.config.vocab_size)
    for prompt, best in zip(
        prompts, beam_search(model, prompts, num_beams=5, n_best=5, max_new_tokens=12), strict=True
    ):
        for hypothesis in best:
            n, ids = len(hypothesis.ids), torch.tensor([prompt + hypothesis.ids])
            with torch.no_grad():
                logits = model(ids[:, :-1], num_last_logits=n).logits[0, :, : model.config.vocab_size]
            total = logits.log_softmax(-1).gather(1, ids[0, -n:, None]).sum().item()
            assert hypothesis.log_probability == pytest.approx(total, abs=1e-3)
        assert [h.score for h in best] == sorted((h.score for h in best), reverse=True)
        assert len({tuple(h.ids) for h in best}) == 5


@pytest.mark.parametrize("early_stopping", [False, True])
def test_a_batch_equals_each_prompt_alone(hash_model, early_stopping):
    prompts = prompts_of((1, 9, 4, 30), 13)
    options = {"num_beams": 4, "n_best": 4, "max_new_tokens": 15, "eos_id": 3, "early_stopping": early_stopping}
    together = beam_search(hash_model, prompts, **options)
    assert [[h.ids for h in best] for best in together] == [
        [h.ids for h in beam_search(hash_model, [prompt], **options)[0]] for prompt in prompts
    ]


def test_one_beam_is_greedy(hash_model):
    greedy = generate(hash_model, [[1]], max_new_tokens=20, sampling=SamplingConfig(temperature=0), eos_id=4)
    ((best,),) = beam_search(hash_model, [[1]], num_beams=1, max_new_tokens=20, eos_id=4, early_stopping=True)
    assert best.ids == greedy.ids[0]
    assert best.log_probability == pytest.approx(sum(greedy.log_probabilities[0]), abs=1e-4)


def test_more_beams_find_better_continuations(hash_model):
    prompts = [[n] for n in range(6)]
    few, many = (beam_search(hash_model, prompts, num_beams=n, max_new_tokens=8) for n in (1, 32))
    assert sum(best[0].score for best in many) > sum(best[0].score for best in few)


def test_length_penalty_favours_long_continuations():
    model = HashModel(3, 8)
    lengths = [
        len(beam_search(model, [[1]], num_beams=9, max_new_tokens=6, eos_id=2, length_penalty=penalty)[0][0].ids)
        for penalty in (-3.0, 3.0)
    ]
    assert lengths[0] < lengths[1]


def test_early_stopping_ends_sooner():
    calls = []
    for early_stopping in (True, False):
        model = HashModel()
        with torch.no_grad():
            model.table[:, 3] += 3
        beam_search(model, [[1]], num_beams=3, max_new_tokens=200, eos_id=3, early_stopping=early_stopping)
        calls.append(len(model.calls))
    assert calls[0] < calls[1]


def test_the_search_ends_when_nothing_can_become_better():
    model = HashModel()
    with torch.no_grad():
        model.table[:, 3] += 20  # eos is nearly certain
    beam_search(model, [[1]], num_beams=1, max_new_tokens=500, eos_id=3, length_penalty=0)
    assert len(model.calls) < 5


def test_padding_is_never_emitted_and_text_is_cut():
    model, tokenizer = HashModel(257, 264), ByteTokenizer()
    with torch.no_grad():
        model.table[:, list(b"ab")] += 20
        model.table[:, 256] += 17
    (plain,) = beam_search(model, [[1]], tokenizer, num_beams=6, n_best=6, max_new_tokens=12)
    assert max(max(h.ids) for h in plain) <= 256
    for h in plain:
        assert h.text == tokenizer.decode(h.ids[:-1] if h.finish_reason == "eos" else h.ids)
    (stopped,) = beam_search(model, [[1]], tokenizer, num_beams=6, n_best=6, max_new_tokens=12, stop=["ba"])
    assert "stop" in {h.finish_reason for h in stopped}
    for h in stopped:
        assert "ba" not in h.text
        if h.finish_reason == "stop":
            assert tokenizer.decode(h.ids) == h.text + "ba"


def test_no_tokens_and_a_state(hash_model):
    assert beam_search(hash_model, [[1]], num_beams=2, max_new_tokens=0)[0][0].ids == []
    state = read_prompts(hash_model, [[1, 2]])
    ids = [h.ids for h in beam_search(hash_model, [[]], num_beams=3, max_new_tokens=5, state=state)[0]]
    assert ids == [h.ids for h in beam_search(hash_model, [[1, 2]], num_beams=3, max_new_tokens=5)[0]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"num_beams": 2, "n_best": 3}, "n_best must be at most num_beams, got 3 and 2"),
        ({"num_beams": 2, "n_best": 0}, "n_best must be"),
        ({"num_beams": 2, "max_new_tokens": -1}, "max_new_tokens must be"),
        ({"num_beams": 2, "length_penalty": math.inf}, "length_penalty must be a finite number, got inf"),
        ({"num_beams": 2, "stop": ["x"]}, "stop strings need a tokenizer"),
    ],
)
def test_misuse(hash_model, options, words):
    with pytest.raises(ValueError, match=words):
        beam_search(hash_model, [[1]], **options)


def test_logits_that_are_not_numbers_are_an_error(hash_model):
    with torch.no_grad():
        hash_model.table.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="logits are not finite"):
        beam_search(hash_model, [[1]], num_beams=2)
