"""Speculation: the text is what it is without, bit for bit; only the number of passes changes."""

from __future__ import annotations

import gc
import weakref
from unittest import mock

import pytest
import torch
from hash_model import HashModel

from anymamba.data.tokenizer import ByteTokenizer
from anymamba.generation.generate import generate, stream, stream_text
from anymamba.generation.sampling import RowDraws, SamplingConfig
from anymamba.generation.speculation import Speculation
from anymamba.generation.speculation.drafts import LookupDrafter
from anymamba.generation.speculation.pacing import Pacing
from anymamba.generation.speculation.passes import GraphVerification, near_ties
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.parts.options import AttentionOptions, MambaOptions
from anymamba.parts.state import map_state, state_tensors

SAMPLING = {
    "greedy": SamplingConfig(temperature=0),
    "sampled": SamplingConfig(temperature=0.7),
    "filters": SamplingConfig(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.1),
}
PROMPT = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Guess whenever there is a guess: how much depends on the time that steps take here."""
    monkeypatch.setattr(Pacing, "best", lambda self, chances: len(chances))


@pytest.fixture
def repeating() -> LanguageModel:
    """A model that likes to say again what it has just said."""
    torch.manual_seed(2)
    model = LanguageModel(ModelConfig(d_model=24, n_layers=2, vocab_size=37, mamba=MambaOptions(d_state=5)))
    with torch.no_grad():
        model.embedding.weight.mul_(30)
    return model


def same(ours, theirs) -> None:
    """The same tokens, the same log-probabilities and the same state, to the bit."""
    assert ours.ids == theirs.ids
    assert ours.log_probabilities == theirs.log_probabilities
    assert ours.finish_reasons == theirs.finish_reasons and ours.texts == theirs.texts
    assert all(map(torch.equal, state_tensors(ours.state), state_tensors(theirs.state)))


def drafters(model: LanguageModel) -> dict[str, Speculation]:
    other = LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=37))
    return {
        "lookup": Speculation(8),
        "one": Speculation(1),
        "itself": Speculation(5, draft=model),
        "other": Speculation(3, draft=other),
    }


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("kind", ["lookup", "one", "itself", "other"])
@pytest.mark.parametrize("weights", [None, "float32", "int8"])
def test_the_text_is_the_same_to_the_bit(repeating, weights, kind, sampling):
    model = repeating if weights is None else repeating.for_inference(weights)
    options = {"max_new_tokens": 40, "sampling": sampling, "seed": 3}
    wanted = generate(model, [PROMPT], **options)
    same(generate(model, [PROMPT], speculation=drafters(model)[kind], **options), wanted)


ROWS = [PROMPT, [3, 4, 3, 4, 3, 4, 3], [5, 6, 7] * 4]


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("kind", ["lookup", "itself", "other"])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_several_rows_have_the_same_text_to_the_bit(repeating, weights, kind, sampling):
    """Rows guess apart and end apart: the tokenizer's end of text is an id that they draw now and then."""
    model = repeating if weights is None else repeating.for_inference(weights)
    options = {"max_new_tokens": 40, "sampling": sampling, "seed": 3, "eos_id": 11}
    wanted = generate(model, ROWS, **options)
    found = generate(model, ROWS, speculation=drafters(model)[kind], **options)
    same(found, wanted)


def test_rows_that_repeat_share_passes():
    calls = []
    for speculation in (None, Speculation(8)):
        model = Counting()
        model.calls.clear()
        prompts = [[1, 2, 3, 4] * 3, [3, 4, 1, 2] * 3]
        output = generate(model, prompts, max_new_tokens=64, sampling=SAMPLING["greedy"], speculation=speculation)
        assert output.ids == [[1, 2, 3, 4] * 16, [3, 4, 1, 2] * 16]
        calls.append(len(model.calls))
    assert calls[0] == 64 and calls[1] <= 10


def test_rows_of_which_one_has_no_guess_are_stepped(repeating):
    steps = stream(repeating, [PROMPT, [1]], max_new_tokens=2, speculation=Speculation(4))
    list(steps)
    assert steps.speculation.n_passes == 0


@pytest.mark.parametrize("earlier", [(), PROMPT], ids=["unknown", "known"])
def test_guesses_look_into_the_text_that_a_state_has_read(repeating, earlier):
    state = generate(repeating, [PROMPT], max_new_tokens=0).state
    options = {"max_new_tokens": 30, "sampling": SAMPLING["greedy"], "state": state}
    steps = stream(repeating, [[8]], speculation=Speculation(4, earlier=earlier), **options)
    ids = [step.ids[0] for step in steps]
    assert ids == generate(repeating, [[8]], **options).ids[0]
    if earlier:
        assert steps.speculation.n_passes > 0


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_a_model_guesses_itself(repeating, sampling):
    """With the same random numbers the draft's tokens are the text's."""
    steps = stream(
        repeating, [PROMPT], max_new_tokens=60, sampling=sampling, seed=3, speculation=Speculation(4, draft=repeating)
    )
    list(steps)
    found = steps.speculation
    assert found.n_passes == 12 and found.n_guessed == 48
    assert found.n_right >= (48 - 4 if sampling.repetition_penalty == 1 else 30)


def test_repeated_text_needs_few_passes():
    calls = []
    for speculation in (None, Speculation(8)):
        model = Counting()
        model.calls.clear()
        output = generate(
            model, [[1, 2, 3, 4] * 3], max_new_tokens=64, sampling=SAMPLING["greedy"], speculation=speculation
        )
        assert output.ids == [[1, 2, 3, 4] * 16]
        calls.append(len(model.calls))
    assert calls[0] == 64 and calls[1] <= 10


class Counting(HashModel):
    """Continues 1 2 3 4 1 2 3 4 ..., whatever the state."""

    def _next(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(ids % 4 + 1, self.config.padded_vocab_size).float()

    def forward(self, input_ids, state=None, *, attention_mask=None, num_last_logits=None):
        output = super().forward(input_ids, state, attention_mask=attention_mask, num_last_logits=num_last_logits)
        kept = input_ids.shape[1] if num_last_logits is None else num_last_logits
        return output._replace(logits=self._next(input_ids)[:, input_ids.shape[1] - kept :])

    def step(self, token_ids, state):
        return super().step(token_ids, state)._replace(logits=self._next(token_ids))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_models_without_a_compiled_step(hash_model, kind, seed):
    """Verification by the forward pass; HashModel computes the same bits in any cut."""
    speculation = Speculation(4, draft=HashModel(seed=1 + seed % 2) if kind == "model" else None)
    options = {"max_new_tokens": 80, "sampling": SamplingConfig(temperature=0.3), "seed": seed}
    same(
        generate(hash_model, [[1, 2, 3] * 3], speculation=speculation, **options),
        generate(hash_model, [[1, 2, 3] * 3], **options),
    )


def test_a_hybrid_is_near(repeating):
    """Its passes round differently from its steps, so only the log-probabilities of a given text can be compared."""
    torch.manual_seed(4)
    config = ModelConfig(
        d_model=24, n_layers=2, vocab_size=37, mixers=("mamba", "attention"), attention=AttentionOptions(n_heads=2)
    )
    model = LanguageModel(config)
    options = {"max_new_tokens": 40, "sampling": SamplingConfig(temperature=0.7)}
    steps = stream(model, [PROMPT], speculation=Speculation(4, draft=model), **options)
    ids, found = [], []
    for step in steps:
        ids += step.ids
        found += step.log_probabilities
    wanted = model(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1, :37].log_softmax(-1)
    assert torch.tensor(found) == pytest.approx(wanted[range(len(ids)), ids].detach(), abs=1e-5)
    assert steps.speculation.n_guessed > 0


@pytest.mark.parametrize("kind", ["lookup", "itself"])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 20])
def test_the_state_in_the_middle_continues_the_text(repeating, kind, n):
    """A stream with guesses ahead has the state after its tokens, and going on from it gives the rest."""
    greedy = {"sampling": SAMPLING["greedy"], "speculation": drafters(repeating)[kind]}
    whole = generate(repeating, [PROMPT], max_new_tokens=30, sampling=SAMPLING["greedy"]).ids[0]
    steps = stream(repeating, [PROMPT], max_new_tokens=30, **greedy)
    first = [next(steps).ids[0] for _ in range(n)]
    state = steps.state
    assert first + generate(repeating, [[]], max_new_tokens=30 - n, state=state, **greedy).ids[0] == whole
    assert first + [step.ids[0] for step in steps] == whole


def test_text_ends_and_stop_strings(repeating):
    model = HashModel(257, 264)
    with torch.no_grad():
        model.table[:, list(b"abc")] += 7.0
    options = {"max_new_tokens": 300, "stop": ["abca", "cc"], "seed": 4}
    wanted = stream_text(model, ByteTokenizer(), "abcab", **options)
    ours = stream_text(model, ByteTokenizer(), "abcab", speculation=Speculation(6), **options)
    assert list(ours) == list(wanted) and ours.finish_reason == wanted.finish_reason == "stop"
    assert ours.ids == wanted.ids


def test_mistakes(repeating):
    with pytest.raises(ValueError, match="n_tokens must be at least 1, got 0"):
        Speculation(0)
    draft = LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=38))
    with pytest.raises(ValueError, match="the draft model must have the model's vocabulary of 37 ids, got 38; take"):
        stream(repeating, [PROMPT], speculation=Speculation(draft=draft))
    with pytest.raises(TypeError, match=r"speculation must be a Speculation, such as Speculation\(8\), got 8"):
        stream(repeating, [PROMPT], speculation=8)
    with pytest.raises(TypeError, match="draft must be a model, got 'a folder'; load it with"):
        Speculation(draft="a folder")


def test_more_guesses_than_pay_cost_nothing(repeating):
    """What guesses are worth is worked out for 64 of them at most, however many are allowed."""
    chances = []
    options = {"max_new_tokens": 60, "sampling": SAMPLING["greedy"]}
    wanted = generate(repeating, [PROMPT], **options)
    kept = LookupDrafter.chances
    with mock.patch.object(LookupDrafter, "chances", lambda own, n: chances.append(n) or kept(own, n)):
        found = generate(repeating, [PROMPT], speculation=Speculation(10**9), **options)
    assert found.ids == wanted.ids and chances and max(chances) == 64


# ---------------------------------------------------------------------------------------------- the parts


def test_looking_up():
    drafter = LookupDrafter([1, 2, 3, 4, 5, 9, 1, 2])
    assert drafter.chances(4) == []
    drafter.push(3)
    assert len(drafter.chances(4)) == 4 and drafter.draft(4) == [4, 5, 9, 1]
    drafter.push(4)
    assert drafter.draft(2) == [5, 9]
    drafter.push(7)
    assert drafter.chances(4) == []


def test_looking_up_goes_round_in_a_period():
    assert LookupDrafter([1, 2, 1, 2, 1]).draft(5) == [2, 1, 2, 1, 2]


def test_chances_follow_what_happens():
    sure, unsure = LookupDrafter([1, 2, 3, 4] * 20), LookupDrafter([])
    torch.manual_seed(0)
    for token in torch.randint(3, (300,)).tolist():
        unsure.push(token)
    assert sure.chances(8)[-1] > 0.7
    assert not unsure.chances(1) or unsure.chances(1)[0] < 0.6


def test_numbers_looked_at_come_later():
    plain, peeked = RowDraws(5, 2), RowDraws(5, 2)
    numbers = [plain.next([0, 1]) for _ in range(6)]
    assert peeked.peek(0, 3) == numbers[3][0] and peeked.peek(0, 0) == numbers[0][0]
    assert all(torch.equal(peeked.next([0, 1]), wanted) for wanted in numbers)


class TestPacing:
    @pytest.fixture(autouse=True)
    def always(self):
        """The real one."""

    def paced(self, costs: dict[int, float]) -> Pacing:
        pacing = Pacing(8)
        pacing.add_step(1.0)
        for size, cost in costs.items():
            pacing.add_pass(size, cost)
        return pacing

    def test_a_step_is_measured_first(self):
        assert Pacing(8).best([1.0] * 8) == 0

    def test_cheap_passes_and_sure_guesses_are_long(self):
        assert self.paced({8: 1.3}).best([0.99] * 8) == 8

    def test_unsure_guesses_are_short(self):
        assert self.paced({8: 1.8}).best([0.5**i for i in range(1, 9)]) == 2

    def test_passes_that_cost_what_they_save_are_left_out(self):
        assert self.paced({size: 1 + size for size in (1, 2, 4, 8)}).best([0.9] * 8) == 0

    def test_a_slow_pass_is_tried_again_after_a_while(self):
        pacing = self.paced(dict.fromkeys((1, 2, 4, 8), 9.0))
        n = 0
        while not pacing.best([0.9] * 8):
            pacing.add_step(1.0)
            n += 1
        assert 50 < n < 2000


def test_near_ties_are_counted():
    logits = torch.tensor([[0.0, 1.0, 5.0], [0.0, 5.0 - 1e-3, 5.0], [0.0, 5.0, 5.0]])
    assert near_ties(logits, torch.float32).tolist() == [False, False, True]
    assert near_ties(logits, torch.bfloat16).tolist() == [False, True, True]


@pytest.mark.parametrize("n_tokens", [1, 3, 5])
def test_passes_in_graphs(repeating, n_tokens):
    """On a CPU what would be a graph runs each time, on the same memory."""
    model = repeating.for_inference("float32")
    passes = GraphVerification(model)
    state = model(torch.tensor([PROMPT])).state
    for ids in ([1, 2, 3, 4, 5], [3, 1, 1, 7, 0]):
        kept, logits = map_state(torch.clone, state), passes.read(torch.tensor([ids]), state)
        assert torch.equal(logits, model(torch.tensor([ids]), state).logits)
        after = model(torch.tensor([ids[:n_tokens]]), state).state
        assert all(map(torch.equal, state_tensors(state), state_tensors(kept)))
        state = passes.accept(n_tokens)
        assert all(map(torch.equal, state_tensors(state), state_tensors(after)))


def test_streams_share_the_graphs_of_a_model_and_do_not_keep_it(repeating):
    model = repeating.for_inference("float32")
    first, second = GraphVerification(model), GraphVerification(model)
    state = model.init_state(1)
    want = first.read(torch.tensor([[1, 2]]), state)
    assert (
        first.has_recorded and torch.equal(second.read(torch.tensor([[1, 2]]), state), want) and not second.has_recorded
    )
    gone = weakref.ref(model)
    del model, first, second
    gc.collect()
    assert gone() is None


def test_a_pass_that_gives_the_bits_of_steps_counts_no_ties(repeating):
    steps = stream(repeating, [PROMPT], max_new_tokens=20, seed=3, speculation=Speculation(4))
    list(steps)
    assert steps.speculation.n_passes > 0 and steps.speculation.n_near_ties == 0
