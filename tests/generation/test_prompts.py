"""Prompts: in chunks == whole, in a batch == alone, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hash_model import HashModel

from anymamba.generation.prompts import read_prompts
from anymamba.layers.state import select_rows, state_bytes, state_tensors

LENGTHS = (1, 7, 16, 17, 15, 40)


def prompts_of(lengths, vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, n).tolist() for n in lengths]


@pytest.mark.parametrize("chunk", [1, 3, 16, 100])
def test_a_batch_in_chunks_equals_each_alone(hash_model, chunk):
    prompts = prompts_of(LENGTHS, 13)
    together = read_prompts(hash_model, prompts, chunk=chunk)
    for row, prompt in enumerate(prompts):
        logits = together.logits[row]
        assert torch.equal(logits.log_softmax(-1), hash_model.next_log_probabilities(prompt))
        assert set(together.seen[row].nonzero()[:, 0].tolist()) == set(prompt)


@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
def test_a_batch_in_chunks_equals_each_alone_with_a_real_model(mamba, chunk):
    prompts = prompts_of(LENGTHS, 37)
    together = read_prompts(mamba, prompts, chunk=chunk)
    for row, prompt in enumerate(prompts):
        output = mamba(torch.tensor([prompt]))
        torch.testing.assert_close(together.logits[row], output.logits[0, -1, :37], atol=2e-4, rtol=1e-4)
        own = select_rows(together.model, torch.tensor([row]))
        for ours, theirs in zip(state_tensors(own), state_tensors(output.state), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_no_call_is_longer_than_the_chunk_and_short_rows_wait():
    model = HashModel()
    read_prompts(model, prompts_of((3, 100), 13), chunk=16)
    assert max(length for _, length in model.calls) == 16
    assert sum(rows * length for rows, length in model.calls) <= 100 + 16
    assert [rows for rows, _ in model.calls] == [1] * 6 + [2]


def test_reading_goes_on_from_a_state(hash_model):
    first, second = prompts_of((5, 9), 13), prompts_of((4, 30), 13, seed=1)
    state = read_prompts(hash_model, first, chunk=4)
    before = [t.clone() for t in state_tensors(state)]
    state_2 = read_prompts(hash_model, second, state=state, chunk=4)
    whole = read_prompts(hash_model, [a + b for a, b in zip(first, second, strict=True)])
    for a, b in zip(state_tensors(state_2), state_tensors(whole), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(state_tensors(state), before, strict=True):
        assert torch.equal(a, b)  # a state is a value


def test_an_empty_prompt_keeps_the_state_and_its_logits(hash_model):
    state = read_prompts(hash_model, prompts_of((5, 9), 13))
    again = read_prompts(hash_model, [[], [3]], state=state)
    assert torch.equal(again.logits[0], state.logits[0])
    assert not torch.equal(again.logits[1], state.logits[1])
    assert torch.equal(again.model.layers[0][0], state.model.layers[0][0])


def test_an_empty_prompt_begins_with_eos(hash_model):
    empty = read_prompts(hash_model, [[]], eos_id=12)
    assert torch.equal(empty.logits, read_prompts(hash_model, [[12]]).logits)


def test_the_state_does_not_grow_with_the_prompt(mamba):
    sizes = {state_bytes(read_prompts(mamba, prompts_of((n,), 37), chunk=256)) for n in (1, 10, 1000)}
    assert len(sizes) == 1


def test_a_state_can_be_trained_through(mamba):
    state = read_prompts(mamba, [[1, 2]])
    mamba(torch.tensor([[3]]), state.model).logits[..., 0].sum().backward()
    mamba.zero_grad()


@pytest.mark.parametrize(
    ("prompts", "error", "words"),
    [
        ([[0, 5, 13]], ValueError, "prompt 0 has the id 13 at position 2, outside the model's vocabulary of 13"),
        ([[0], [4, -1]], ValueError, "prompt 1 has the id -1 at position 1"),
        ([], ValueError, "no prompts"),
        ([[1], []], ValueError, "prompt 1 is empty and there is no eos_id"),
        ([[1.5]], TypeError, "prompt 0 must hold integer token ids, got float64"),
        ([3, 4], ValueError, "prompts is a list of lists"),
    ],
)
def test_bad_prompts(hash_model, prompts, error, words):
    with pytest.raises(error, match=words):
        read_prompts(hash_model, prompts)


def test_bad_options(hash_model):
    with pytest.raises(ValueError, match="prefill_chunk must be at least 1, got 0"):
        read_prompts(hash_model, [[1]], chunk=0)
    with pytest.raises(ValueError, match="eos_id must be an id of the vocabulary, 0 to 12, got 13"):
        read_prompts(hash_model, [[]], eos_id=13)
    state = read_prompts(hash_model, [[1], [2]])
    with pytest.raises(ValueError, match=r"\(1, 13\), got \(2, 13\); select_rows"):
        read_prompts(hash_model, [[1]], state=state)
