"""The compiled step over several tokens: the same bits whole, in pieces, token by token, alone, in a batch, and after a
pass that is taken back."""

from __future__ import annotations

import pytest
import torch
from test_native_step import OPTIONS, SETS, SMALL, build, compiled, difference, packed, state_after_some

from anymamba.models.config import ModelConfig
from anymamba.models.inference.native_reading import Verifier, read
from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.parts.state import map_state, select_rows, state_tensors
from anymamba.runtimes import native

CASES = [(SETS[0], name) for name in OPTIONS] + [(other, "odd") for other in SETS[1:]]


@pytest.fixture
def on_set():
    """Chooses an instruction set for the test."""
    before = native.module().instruction_set()
    yield native.module().choose_instruction_set
    native.module().choose_instruction_set(before)


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(101, shape, generator=torch.Generator().manual_seed(5))


def same_states(ours: LanguageModelState, theirs: LanguageModelState) -> bool:
    return all(map(torch.equal, state_tensors(ours), state_tensors(theirs)))


def step_by_step(step, ids: torch.Tensor, state: LanguageModelState) -> tuple[torch.Tensor, list[LanguageModelState]]:
    """Logits of every token, and the state after each."""
    logits, states = [], []
    for t in range(ids.shape[1]):
        out, state = step.step(ids[:, t], state)
        logits.append(out)
        states.append(state)
    return torch.stack(logits, 1), states


@pytest.mark.parametrize(("instruction_set", "name"), CASES)
def test_whole_equals_pieces_and_steps(moved, on_set, instruction_set, name):
    on_set(instruction_set)
    step = compiled(build(moved, OPTIONS[name]))
    state, ids = state_after_some(step.model, 2), random_ids(2, 11)
    wanted, states = step_by_step(step, ids, state)
    whole = read(step, ids, state)
    assert torch.equal(whole.logits, wanted) and same_states(whole.state, states[-1])
    first = read(step, ids[:, :4], state)
    rest = read(step, ids[:, 4:], first.state)
    assert torch.equal(torch.cat([first.logits, rest.logits], 1), wanted) and same_states(rest.state, states[-1])


@pytest.mark.parametrize("format", ["float32", "bfloat16", "q8_0", "q4_0", "q6_k"])
def test_batches_and_long_texts_in_every_format(moved, format):
    """A pass of the kernel takes 64 rows: sequences begin and end inside passes."""
    model = build(moved, ModelConfig(d_model=256, n_layers=2, vocab_size=101, tie_embeddings=False))
    step = compiled(packed(model, format))
    state, ids = state_after_some(model, 3), random_ids(3, 47)
    together = read(step, ids, state)
    for row in range(3):
        alone = read(step, ids[row : row + 1], select_rows(state, torch.tensor([row])))
        assert torch.equal(alone.logits[0], together.logits[row])
        assert same_states(alone.state, select_rows(together.state, torch.tensor([row])))
    assert torch.equal(step_by_step(step, ids, state)[0], together.logits)


@pytest.mark.parametrize("wanted", [0, 1, 2, 46, 47, 99])
def test_only_the_last_logits(moved, wanted):
    step = compiled(build(moved, SMALL))
    state, ids = state_after_some(step.model, 3), random_ids(3, 47)
    whole, last = read(step, ids, state), read(step, ids, state, num_last_logits=wanted)
    assert torch.equal(last.logits, whole.logits[:, 47 - min(wanted, 47) :]) and same_states(last.state, whole.state)


def test_near_the_models_own_forward(moved):
    model = build(moved, SMALL)
    state, ids = state_after_some(model, 2), random_ids(2, 70)
    with torch.no_grad():
        got, wanted = read(compiled(model), ids, state), model(ids, state)
    assert difference(got.logits, wanted.logits) < 2e-5
    for ours, theirs in zip(state_tensors(got.state), state_tensors(wanted.state), strict=True):
        assert difference(ours, theirs) < 2e-5


@pytest.mark.parametrize(("instruction_set", "name"), CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_pass_is_taken_back_to_any_token(moved, on_set, instruction_set, name, batch):
    on_set(instruction_set)
    step = compiled(build(moved, OPTIONS[name]))
    state = map_state(torch.Tensor.clone, state_after_some(step.model, batch))
    verifier = Verifier(step)
    for n_read, n_accepted in ((9, 1), (9, 9), (1, 1), (5, 3), (9, 8), (4, 2)):
        ids = random_ids(batch, n_read)
        wanted, states = step_by_step(step, ids, map_state(torch.Tensor.clone, state))
        assert torch.equal(verifier.read(ids, state), wanted)
        state = verifier.accept(n_accepted)
        assert same_states(state, states[n_accepted - 1])


def test_plain_steps_between_passes(moved):
    step = compiled(build(moved, SMALL))
    state = map_state(torch.Tensor.clone, state_after_some(step.model, 1))
    expected, verifier = map_state(torch.Tensor.clone, state), Verifier(step)
    for token in range(5):
        verifier.read(torch.tensor([[token, 7, 8, 9]]), state)
        state = step.step(torch.tensor([50]), verifier.accept(2), reuse=True).state
        expected = step_by_step(step, torch.tensor([[token, 7, 50]]), expected)[1][-1]
        assert same_states(state, expected)


@pytest.mark.parametrize("format", ["float32", "bfloat16", "q8_0"])
def test_bits_do_not_depend_on_the_threads(moved, format):
    model = build(moved, ModelConfig(d_model=256, n_layers=2, vocab_size=101))
    step = compiled(packed(model, format))
    state, ids, found = state_after_some(model, 1), random_ids(1, 64), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        verifier = Verifier(step)
        logits = verifier.read(ids, map_state(torch.Tensor.clone, state))
        found.append((logits, verifier.accept(40)))
    torch.set_num_threads(2)
    for logits, after in found[1:]:
        assert torch.equal(logits, found[0][0]) and same_states(after, found[0][1])


def test_an_id_outside_the_vocabulary_is_an_index_error(moved):
    step = compiled(build(moved, SMALL))
    with pytest.raises(IndexError, match="token id 104 is outside"):
        read(step, torch.tensor([[1, 104]]), step.model.init_state(1))


def test_a_changed_weight_is_seen(moved):
    model: LanguageModel = build(moved, SMALL)
    step, ids = compiled(model), random_ids(1, 5)
    before = read(step, ids, model.init_state(1)).logits
    with torch.no_grad():
        model.blocks[1].mixer.ssm.D.mul_(1.5)
    after = read(step, ids, model.init_state(1)).logits
    assert not torch.equal(before, after) and torch.equal(after, step_by_step(step, ids, model.init_state(1))[0])
