"""Prompts: in chunks == whole, in a batch == alone, and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hash_model import HashModel

from anymamba.generation.prompts import read_prompts
from anymamba.parts.state import select_rows, state_bytes, state_tensors

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


ROWS = [[3, 1, 2], [0, 12, 4]]
FORMS = {
    "lists": ROWS,
    "tuples": tuple(map(tuple, ROWS)),
    "numpy's integers in lists": [[np.int64(3), np.uint8(1), 2], np.array(ROWS[1]).tolist()],
    "tensors of no dimension in lists": [[torch.tensor(3), torch.tensor(1), 2], list(torch.tensor(ROWS[1]))],
    "a 2-D array": np.array(ROWS),
    "arrays": [np.array(row, np.uint16) for row in ROWS],
    "arrays of objects": [np.array(row, object) for row in ROWS],
    "parts of an array": list(np.array(ROWS)[:, ::-1][:, ::-1]),
    "a 2-D tensor": torch.tensor(ROWS),
    "a 2-D tensor that is transposed": torch.tensor(ROWS).T.contiguous().T,
    "a tensor and a list": [torch.tensor(ROWS[0]), ROWS[1]],
    "a generator": iter(ROWS),
    **{
        str(dtype): [torch.tensor(row, dtype=dtype) for row in ROWS]
        for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.uint64)
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_prompts_are_what_tensors_arrays_and_lists_can_be(hash_model, form):
    prompts = FORMS[form]
    assert torch.equal(read_prompts(hash_model, prompts).logits, read_prompts(hash_model, ROWS).logits)


def test_ragged_prompts_of_every_kind_at_once(hash_model):
    mixed = [range(2, 9), torch.tensor([5]), np.array([1, 2], np.int16), [7, 7, 7]]
    want = read_prompts(hash_model, [list(range(2, 9)), [5], [1, 2], [7, 7, 7]])
    assert torch.equal(read_prompts(hash_model, mixed).logits, want.logits)
    nested = torch.nested.nested_tensor([torch.tensor([5]), torch.tensor([1, 2])], layout=torch.jagged)
    assert torch.equal(read_prompts(hash_model, nested).logits, want.logits[1:3])


def test_empty_tensors_are_empty_prompts(hash_model):
    state = read_prompts(hash_model, [[1], [2]])
    for empty in (torch.tensor([]), np.array([]), torch.zeros(0, dtype=torch.int64), range(0)):
        again = read_prompts(hash_model, [empty, torch.tensor([3])], state=state)
        assert torch.equal(again.logits[0], state.logits[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which is not here")
def test_prompts_on_a_gpu(hash_model):
    for prompts in (
        torch.tensor(ROWS).cuda(),
        [torch.tensor(row).cuda() for row in ROWS],
        [list(torch.tensor(ROWS[0]).cuda())],
    ):
        want = read_prompts(hash_model, ROWS[: len(prompts)])
        assert torch.equal(read_prompts(hash_model, prompts).logits, want.logits)


@pytest.mark.parametrize(
    ("prompts", "error", "words"),
    [
        ([[0, 5, 13]], ValueError, "prompt 0 has the id 13 at position 2, outside the model's vocabulary of 13"),
        ([[0], [4, -1]], ValueError, "prompt 1 has the id -1 at position 1"),
        ([], ValueError, "no prompts"),
        ([[1], []], ValueError, "prompt 1 is empty and there is no eos_id"),
        ([[1.5]], TypeError, r"prompt 0 must hold integer token ids, got 1\.5"),
        ([np.array([1.5])], TypeError, "prompt 0 must hold integer token ids, got float64"),
        (
            torch.ones(1, 2, dtype=torch.bfloat16),
            TypeError,
            r"prompt 0 must hold integer token ids, got torch\.bfloat16",
        ),
        ([[3], [2, True]], TypeError, "prompt 1 must hold integer token ids, got True"),
        ([torch.tensor([True])], TypeError, r"prompt 0 must hold integer token ids, got torch\.bool"),
        (np.ones((1, 2), bool), TypeError, "prompt 0 must hold integer token ids, got bool"),
        ([[1, None]], TypeError, "prompt 0 must hold integer token ids, got None"),
        ([[1, 2**70]], ValueError, "prompt 0 has the id 1180591620717411303424, which is too large for any vocabulary"),
        ([torch.tensor([4, -1])], ValueError, "prompt 0 has the id -1 at position 1"),
        (np.array([[0, 5, 13]], np.uint8), ValueError, "prompt 0 has the id 13 at position 2"),
        ([3, 4], ValueError, "prompt 0 must be a list of token ids, got 3; prompts is a list of lists: write .ids."),
        (torch.tensor([3, 4]), ValueError, r"prompt 0 must be a list of token ids, got tensor\(3\); prompts is"),
        (
            [torch.tensor([[3, 4]])],
            ValueError,
            r"prompt 0 must be a list of token ids, got shape \(1, 2\); give one row",
        ),
        ([[[3], [4]]], ValueError, "prompt 0 must be a list of token ids, got a list in it; give one row"),
        ("ab", TypeError, "prompts must be a list of lists of token ids, got str"),
        (["ab"], TypeError, "prompt 0 must hold integer token ids, got text; encode it with the tokenizer"),
        ([b"ab"], TypeError, "prompt 0 must hold integer token ids, got bytes; encode them with the tokenizer"),
        (3, TypeError, "prompts must be a list of lists of token ids, got int"),
        ({"input_ids": [[1]]}, TypeError, "prompts must be a list of lists of token ids, got dict"),
        ([{"input_ids": [1]}], TypeError, "prompt 0 must hold integer token ids, got a dict; give its 'input_ids'"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, "prompt 0 is empty and there is no eos_id"),
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
