"""The engine: requests that come and go give what each gives alone."""

from __future__ import annotations

import copy
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hash_model import HashModel
from test_prompts import prompts_of

from anymamba.data.tokenizer import ByteTokenizer
from anymamba.generation.beam import beam_search
from anymamba.generation.engine import Engine
from anymamba.generation.generate import generate
from anymamba.generation.prefix_tree import PrefixTree
from anymamba.generation.requests import Beams, Failed, Finished, NewToken, PromptRead, Request
from anymamba.generation.sampling import SamplingConfig
from anymamba.generation.scheduling.reading import PassClock, Piece, PieceReader
from anymamba.generation.stepping import Stepper
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.parts.state import state_tensors

GREEDY = SamplingConfig(temperature=0)
SAMPLINGS = [GREEDY, SamplingConfig(), SamplingConfig(1.3, top_k=7, top_p=0.9, repetition_penalty=1.2)]


@pytest.fixture
def attention() -> LanguageModel:
    """A model whose state grows."""
    torch.manual_seed(1)
    model = LanguageModel(ModelConfig(d_model=32, n_layers=2, vocab_size=37, mixers=("s4d",), attention_layers=(1,)))
    with torch.no_grad():
        model.embedding.weight.mul_(30)
    return model


class Client:
    """Takes the events of one request."""

    def __init__(self, engine: Engine, **request) -> None:
        self.read: PromptRead | None = None
        self.ids: dict[int, list[int]] = defaultdict(list)
        self.texts: dict[int, str] = defaultdict(str)
        self.tokens: list[NewToken] = []
        self.ends: dict[int, Finished | Failed] = {}
        self.id = engine.submit(Request(**request), self.take)

    def take(self, event) -> None:
        if isinstance(event, PromptRead):
            assert self.read is None and not self.tokens
            self.read = event
        elif isinstance(event, NewToken):
            assert self.read is not None and event.index not in self.ends
            self.tokens.append(event)
            self.ids[event.index].append(event.id)
            self.texts[event.index] += event.text
        else:
            assert event.index not in self.ends
            self.ends[event.index] = event

    @property
    def reason(self) -> str:
        return self.ends[0].reason


def finish(engine: Engine) -> None:
    while engine.step():
        pass


def alone(model, prompt, tokenizer=None, **options) -> list[int]:
    return generate(model, [prompt], tokenizer, **options).ids[0]


@pytest.mark.parametrize("tree", [False, True], ids=["no tree", "tree"])
@pytest.mark.parametrize("name", ["hash_model", "mamba"])
def test_requests_that_come_at_any_time_give_what_each_gives_alone(request, name, tree):
    model = request.getfixturevalue(name)
    engine = Engine(model, max_rows=5, prefix_tree=PrefixTree(1 << 22, every=8) if tree else None)
    prompts = prompts_of((3, 40, 1, 17, 8, 33, 2, 21, 5, 60, 4, 9), model.config.vocab_size)
    clients = []
    for i, prompt in enumerate(prompts):
        options = {"sampling": SAMPLINGS[i % 3], "seed": i, "max_new_tokens": 3 + 5 * i, "eos_id": 5}
        clients.append((Client(engine, prompt=prompt, **options), alone(model, prompt, **options)))
        for _ in range(i % 4):
            engine.step()
    finish(engine)
    for client, wanted in clients:
        assert client.ids[0] == wanted
        assert client.reason == ("eos" if wanted[-1] == 5 else "length")
        assert client.ends[0].usage.new_tokens == len(wanted)


def test_a_crowd_that_comes_goes_and_fails_loses_no_row(hash_model):
    """Requests at random moments, some cancelled, some with a sink or a mask that raises; the others are right."""
    rng = np.random.default_rng(0)
    tree = PrefixTree(1 << 14, every=8)
    engine = Engine(hash_model, max_rows=7, prefix_tree=tree)
    good, cancelled, kinds = [], [], rng.integers(0, 6, 80)
    for i, kind in enumerate(kinds):
        beginning = [int(rng.integers(0, 3))] * int(rng.integers(1, 30))  # many share one
        request = {"prompt": [*beginning, *rng.integers(0, 13, rng.integers(0, 9)).tolist()], "owner": str(i % 3)}
        request |= {"seed": i, "max_new_tokens": int(rng.integers(0, 12)), "n": int(rng.integers(1, 4))}
        if kind == 0:
            engine.submit(Request(**request), lambda event: 1 / 0)
        elif kind == 1:
            Client(engine, **request, mask=SimpleNamespace(fork=lambda: 1 / 0))
        else:
            (cancelled if kind == 2 else good).append((Client(engine, **request), request))
        for _ in range(rng.integers(0, 4)):
            engine.step()
        if cancelled and rng.random() < 0.5:
            engine.cancel(cancelled[-1][0].id)
    for client, _ in cancelled:
        engine.cancel(client.id)
    finish(engine)
    statistics = engine.statistics
    assert (statistics.n_rows, statistics.n_reading, statistics.n_queued) == (0, 0, 0)
    assert tree.nbytes <= 1 << 14
    for client, _ in cancelled:
        assert all(isinstance(end, Finished) for end in client.ends.values())
    for client, request in good:
        n, rest = request["n"], {k: request[k] for k in ("seed", "max_new_tokens")}
        wanted = generate(hash_model, [request["prompt"]] * n, **rest).ids
        assert [client.ids[index] for index in range(n)] == wanted
        assert set(client.ends) == set(range(n))


def test_states_that_grow(attention):
    engine = Engine(attention, prefix_tree=PrefixTree(1 << 22, every=8))
    prompts = [[1, 2, 3] * 3, [1, 2, 3] * 4, [5]]
    clients = [Client(engine, prompt=p, sampling=GREEDY, max_new_tokens=3 + i) for i, p in enumerate(prompts)]
    finish(engine)
    clients.append(Client(engine, prompt=prompts[0], sampling=GREEDY, max_new_tokens=5))
    finish(engine)
    assert clients[3].read.n_cached == 9
    for client, prompt in zip(clients, [*prompts, prompts[0]], strict=True):
        assert client.ids[0] == alone(attention, prompt, sampling=GREEDY, max_new_tokens=len(client.ids[0]))


def test_texts_and_stop_strings_are_those_of_generate():
    model, tokenizer = HashModel(257, 264), ByteTokenizer()
    with torch.no_grad():
        model.table[:, list(b"abc")] += 7.0
    engine = Engine(model, tokenizer)
    options = {"max_new_tokens": 60, "stop": ["ab", "cca"]}
    clients = [Client(engine, prompt=[n + 1], seed=n, eos_id=256, **options) for n in range(5)]
    finish(engine)
    for n, client in enumerate(clients):
        wanted = generate(model, [[n + 1]], tokenizer, seed=n, **options)
        assert (client.ids[0], client.texts[0], client.reason) == (
            wanted.ids[0],
            wanted.texts[0],
            wanted.finish_reasons[0],
        )


def test_answers_of_one_prompt_draw_as_the_rows_of_a_batch(hash_model):
    engine = Engine(hash_model)
    client = Client(engine, prompt=[1, 2], n=3, seed=4, max_new_tokens=9)
    later = Client(engine, prompt=[1, 2], seed=(4, 2), max_new_tokens=9)
    finish(engine)
    wanted = generate(hash_model, [[1, 2]] * 3, seed=4, max_new_tokens=9).ids
    assert [client.ids[i] for i in range(3)] == wanted
    assert later.ids[0] == wanted[2]
    assert set(client.ends) == {0, 1, 2}
    assert len(set(map(tuple, wanted))) == 3


def test_a_request_that_is_cancelled_ends_before_the_next_step(hash_model):
    engine = Engine(hash_model, max_rows=2)
    running, other, waiting = (Client(engine, prompt=[n], max_new_tokens=50, seed=n) for n in (1, 2, 3))
    for _ in range(5):
        engine.step()
    assert engine.statistics.n_rows == 2 and engine.statistics.n_queued == 1
    engine.cancel(running.id)
    engine.step()
    assert running.reason == "cancelled" and len(running.ids[0]) == 5
    assert engine.statistics.n_rows == 2  # the one that waited has its place
    engine.cancel(waiting.id)
    finish(engine)
    assert waiting.reason == "cancelled" and not engine.statistics.n_rows
    assert other.ids[0] == alone(hash_model, [2], max_new_tokens=50, seed=2)


def test_logits_that_are_not_numbers_fail_their_request_only(hash_model):
    with torch.no_grad():
        hash_model.table[(31 * 8 + 7 + 1) % 9973] = torch.nan  # the state after [7, 7]
    engine = Engine(hash_model)
    good, bad = (Client(engine, prompt=p, max_new_tokens=20, seed=1) for p in ([1, 2], [7, 7]))
    finish(engine)
    assert isinstance(bad.ends[0], Failed) and "not finite at new token 1" in str(bad.ends[0].error)
    assert good.ids[0] == alone(hash_model, [1, 2], max_new_tokens=20, seed=1)


def test_a_model_that_raises_fails_what_was_in_the_pass_and_goes_on(hash_model, monkeypatch):
    engine = Engine(hash_model)
    client = Client(engine, prompt=[1], max_new_tokens=9)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(hash_model, "step", lambda *_: 1 / 0)
        engine.step()
    assert isinstance(client.ends[0].error, ZeroDivisionError)
    again = Client(engine, prompt=[1], max_new_tokens=9, seed=3)
    finish(engine)
    assert again.ids[0] == alone(hash_model, [1], max_new_tokens=9, seed=3)


def test_a_sink_that_raises_loses_its_request_only(hash_model):
    engine = Engine(hash_model)
    good = Client(engine, prompt=[1], max_new_tokens=9, seed=3)
    engine.submit(Request(prompt=[2]), lambda event: 1 / 0)
    finish(engine)
    assert good.reason == "length" and not engine.statistics.n_rows


def test_a_prompt_alone_and_its_scores():
    """The padding of the vocabulary counts in them, as in training and in lm-eval."""
    model = HashModel(padding=1.0)
    engine = Engine(model)
    prompt = prompts_of((600,), 13)[0]
    client = Client(engine, prompt=prompt, max_new_tokens=0, prompt_log_probabilities=2)
    finish(engine)
    assert client.reason == "length" and not client.tokens
    assert len(client.read.scores) == 599
    for i in (0, 255, 256, 598):
        wanted = model.next_log_probabilities(prompt[: i + 1], with_padding=True)
        score = client.read.scores[i]
        assert score.token == prompt[i + 1]
        assert score.log_probability == pytest.approx(wanted[score.token].item(), abs=1e-5)
        assert [token for token, _ in score.top] == wanted.topk(2).indices.tolist()


@pytest.mark.parametrize("n_top", [0, 13])
def test_a_prompt_of_one_token_has_no_scores(hash_model, n_top):
    engine = Engine(hash_model, prefix_tree=PrefixTree(1 << 20))
    for _ in range(2):
        client = Client(engine, prompt=[3], max_new_tokens=1, prompt_log_probabilities=n_top, n_top=99)
        finish(engine)
        assert client.read.scores == [] and client.reason == "length"
        assert len(client.tokens[0].score.top) == 13


def test_the_likeliest_tokens_are_reported(hash_model):
    engine = Engine(hash_model)
    client = Client(engine, prompt=[3], max_new_tokens=1, n_top=4, logit_bias={5: 100.0})
    finish(engine)
    wanted = hash_model.next_log_probabilities([3])
    score = client.tokens[0].score
    assert score.token == 5 and score.log_probability == pytest.approx(wanted[5].item(), abs=1e-5)  # without the bias
    assert [token for token, _ in score.top] == wanted.topk(4).indices.tolist()


def test_penalties_by_count(hash_model):
    engine = Engine(hash_model)
    never_twice = Client(engine, prompt=[1], max_new_tokens=13, sampling=GREEDY, presence_penalty=1e3)
    evenly = Client(engine, prompt=[1], max_new_tokens=39, sampling=GREEDY, frequency_penalty=1e3)
    finish(engine)
    assert sorted(never_twice.ids[0]) == list(range(13))
    assert np.bincount(evenly.ids[0]).tolist() == [3] * 13


class Digits:
    """Allows ids that rise by one; ends after `last`."""

    def __init__(self, next_id: int, last: int) -> None:
        self.next_id, self.last = next_id, last

    def allowed(self):
        mask = np.zeros(self.next_id + 1, bool)
        mask[self.next_id] = self.next_id <= self.last
        return mask

    def accept(self, token: int) -> None:
        assert token == self.next_id
        self.next_id += 1

    def fork(self):
        return Digits(self.next_id, self.last)


def test_a_mask_decides_which_tokens_may_come(hash_model):
    engine = Engine(hash_model)
    client = Client(engine, prompt=[1], n=2, max_new_tokens=20, mask=Digits(3, 7))
    plain = Client(engine, prompt=[1], seed=1, max_new_tokens=20)
    finish(engine)
    assert client.ids == {0: [3, 4, 5, 6, 7], 1: [3, 4, 5, 6, 7]}
    assert client.reason == "stop"
    assert plain.ids[0] == alone(hash_model, [1], seed=1, max_new_tokens=20)


def test_a_mask_that_raises_fails_its_request_only(hash_model):
    engine = Engine(hash_model)
    masks = [Digits(3, 7), Digits(3, 7), Digits(3, 7)]
    masks[0].fork = lambda: 1 / 0
    masks[1].fork = lambda: SimpleNamespace(allowed=lambda: 1 / 0)
    masks[2].fork = lambda: SimpleNamespace(allowed=masks[2].allowed, accept=lambda token: 1 / 0)
    broken = [Client(engine, prompt=[1], mask=mask) for mask in masks]
    plain = Client(engine, prompt=[1], seed=1, max_new_tokens=20)
    finish(engine)
    assert all(isinstance(client.ends[0].error, ZeroDivisionError) for client in broken)
    assert plain.reason == "length"


def test_the_state_at_the_end_goes_on(hash_model):
    engine = Engine(hash_model)
    first = Client(engine, prompt=[1, 2], max_new_tokens=8, sampling=GREEDY, keep_state=True)
    finish(engine)
    kept = first.ends[0].state
    assert kept.tokens == (1, 2, *first.ids[0][:-1])
    prompt = [1, 2, *first.ids[0], 6]
    second = Client(engine, prompt=prompt, max_new_tokens=8, sampling=GREEDY, state=kept)
    other = Client(engine, prompt=[9, *prompt], max_new_tokens=8, sampling=GREEDY, state=kept)
    finish(engine)
    assert second.read.n_cached == 9 and second.ends[0].usage.cached_tokens == 9
    assert second.ids[0] == alone(hash_model, prompt, max_new_tokens=8, sampling=GREEDY)
    assert other.read.n_cached == 0


def test_a_kept_state_is_never_written_to(mamba):
    engine = Engine(mamba, prefix_tree=PrefixTree(1 << 22))
    first = Client(engine, prompt=[1, 2], max_new_tokens=8, keep_state=True)
    finish(engine)
    kept = first.ends[0].state
    before = [t.clone() for t in state_tensors((kept.model, kept.logits))]
    for _ in range(2):
        Client(engine, prompt=kept.tokens, max_new_tokens=8, state=kept)
        finish(engine)
    assert all(torch.equal(a, b) for a, b in zip(before, state_tensors((kept.model, kept.logits)), strict=True))


def test_a_beam_search_beside_other_requests(hash_model):
    engine = Engine(hash_model, max_rows=5)
    plain = Client(engine, prompt=[1], seed=1, max_new_tokens=20)
    search = Client(engine, prompt=[1, 2], n=2, beams=Beams(4, 0.5), eos_id=5, max_new_tokens=9)
    waiting = Client(engine, prompt=[4, 2], beams=Beams(4), max_new_tokens=9)
    engine.step()
    assert engine.statistics.n_queued == 1
    finish(engine)
    best = beam_search(hash_model, [[1, 2]], num_beams=4, n_best=2, length_penalty=0.5, eos_id=5, max_new_tokens=9)[0]
    assert [search.ids[i] for i in range(2)] == [hypothesis.ids for hypothesis in best]
    assert [search.ends[i].reason for i in range(2)] == [hypothesis.finish_reason for hypothesis in best]
    total = sum(event.score.log_probability for event in search.tokens if event.index == 0)
    assert total == pytest.approx(best[0].log_probability, abs=1e-4)
    assert waiting.reason == "length"
    assert plain.ids[0] == alone(hash_model, [1], seed=1, max_new_tokens=20)
    assert not engine.statistics.n_rows


def test_the_text_of_a_beam_search_is_that_of_the_function():
    model, tokenizer = HashModel(257, 264), ByteTokenizer()
    with torch.no_grad():
        model.table[:, list(b"abc")] += 7.0
    engine = Engine(model, tokenizer)
    found = [Client(engine, prompt=[n], beams=Beams(3), max_new_tokens=9, stop=["ab"], eos_id=256) for n in range(4)]
    finish(engine)
    best = beam_search(model, [[n] for n in range(4)], tokenizer, num_beams=3, max_new_tokens=9, stop=["ab"])
    assert [client.texts[0] for client in found] == [answers[0].text for answers in best]


def test_misuse(hash_model):
    engine = Engine(hash_model, max_rows=2)
    for wrong, words in (
        ({"prompt": [99]}, "has the id 99"),
        ({"prompt": []}, "is empty"),
        ({"prompt": [1], "n": 3}, "n must be at most the engine's 2 rows, got 3"),
        ({"prompt": [1], "beams": Beams(3)}, "num_beams must be at most the engine's 2 rows, got 3"),
        ({"prompt": [1], "beams": Beams(2), "presence_penalty": 1.0}, "a beam search takes no"),
        ({"prompt": [1], "stop": ["x"]}, "stop strings need a tokenizer"),
        ({"prompt": [1], "logit_bias": {13: 1.0}}, "logit_bias must have ids of the vocabulary, 0 to 12, got 13"),
        ({"prompt": [1], "prompt_log_probabilities": 14}, "prompt_log_probabilities must be 0 to 13"),
        ({"prompt": [1], "invariant": True}, "invariant=True needs the compiled step"),
        ({"prompt": [1], "max_new_tokens": -1}, "max_new_tokens must be at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.submit(Request(**wrong), print)
    assert not engine.step()


@pytest.mark.parametrize("name", ["mamba", "attention"])
def test_pieces_of_several_prompts_are_read_in_one_pass(request, name, monkeypatch):
    model = request.getfixturevalue(name)
    stepper = Stepper(model)
    monkeypatch.setattr(Stepper, "native", None)  # as on a GPU
    passes = []
    monkeypatch.setattr(model, "hidden", lambda *a, hidden=model.hidden, **k: passes.append(1) or hidden(*a, **k))
    texts = prompts_of((9, 1, 5), 37)
    with torch.inference_mode():
        states = [model(torch.tensor([text])).state for text in texts]
        passes.clear()
        pieces = [Piece(text[::-1], state, 1) for text, state in zip(texts, states, strict=True)]
        for found, text in zip(PieceReader(model, stepper).read(pieces), texts, strict=True):
            wanted = model(torch.tensor([text + text[::-1]]), num_last_logits=1).logits[0]
            assert torch.allclose(found.logits, wanted, atol=1e-4)
    assert len(passes) == 1 + len(texts)


def test_a_pass_has_as_many_tokens_as_fit_into_its_time():
    clock = PassClock()
    for n in (8, 16, 20, 40, 100, 300, 600, 1500):
        clock.add(n, 0.005 + n * 1e-3)
    assert clock.tokens_within(0) == 8
    for seconds in (0.03, 0.1, 0.3, 0.7):
        n = clock.tokens_within(seconds)
        assert 0.7 * seconds < 0.005 + n * 1e-3 < 1.1 * seconds
    assert clock.tokens_within(100) == 2048


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_seeded_answer_has_the_same_bits_alone_among_32_and_after_a_cache_hit(mamba, weights):
    model = mamba if weights is None else mamba.for_inference(weights)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 37, n).tolist() for n in rng.integers(1, 40, 31)]
    watched = {"prompt": prompts_of((53,), 37)[0], "seed": 7, "n_top": 3, "max_new_tokens": 12, "invariant": True}
    watched |= {"sampling": SamplingConfig(0.9, top_p=0.9), "frequency_penalty": 0.1}

    def bits(client: Client) -> list:
        return [event.score for event in client.tokens]

    alone, crowded = Engine(model), Engine(model, prefix_tree=PrefixTree(1 << 24, every=16))
    first = Client(alone, **watched)
    finish(alone)
    for i, prompt in enumerate(prompts):
        Client(crowded, prompt=prompt, seed=i, sampling=SAMPLINGS[i % 3], max_new_tokens=3 + i // 2)
        if i == 15:
            among = Client(crowded, **watched)
            crowded.step()
    finish(crowded)
    edited = Client(crowded, **(watched | {"prompt": [*watched["prompt"][:40], 3]}))
    finish(crowded)
    again = Client(crowded, **watched)
    finish(crowded)
    assert edited.read.n_cached and again.read.n_cached == 53
    assert bits(among) == bits(first) and bits(again) == bits(first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which is not here")
@pytest.mark.parametrize("weights", [None, "bfloat16"])
def test_requests_on_a_gpu(mamba, weights):
    model = copy.deepcopy(mamba).cuda() if weights is None else mamba.for_inference(weights, device="cuda")
    engine = Engine(model, max_rows=5, prefix_tree=PrefixTree(1 << 22, every=8))
    prompts = prompts_of((3, 40, 1, 17, 8, 33, 40), 37)
    prompts[-1] = [*prompts[1], 4]
    clients = []
    for i, prompt in enumerate(prompts):
        clients.append(Client(engine, prompt=prompt, sampling=GREEDY, max_new_tokens=3 + i, n_top=1))
        engine.step()
    finish(engine)
    again = Client(engine, prompt=prompts[1], sampling=SAMPLINGS[2], seed=1, logit_bias={3: 5.0}, keep_state=True)
    finish(engine)
    assert again.read.n_cached == 40 and again.ends[0].state.logits.is_cuda
    for client, prompt in zip(clients, prompts, strict=True):
        n = len(client.ids[0])
        batch = torch.tensor([[*prompt, *client.ids[0][:-1]]], device="cuda")
        logits = model(batch, num_last_logits=n).logits[0, :, :37].float()
        chosen = logits.gather(1, torch.tensor(client.ids[0], device="cuda")[:, None])[:, 0]
        assert (logits.amax(-1) - chosen).max() < 0.05 * logits.std()  # the likeliest, up to rounding


@pytest.mark.parametrize("packed", [False, True])
def test_a_seed_gives_the_same_bits_in_generate_and_in_the_engine(mamba, packed):
    """Prompts of one batch and of one engine are cut in other places, and read beside others."""
    model = mamba.for_inference(weights="int8") if packed else mamba
    prompts = prompts_of((1, 2, 7, 7, 64, 65, 150), 37)
    options = {"max_new_tokens": 6, "sampling": SamplingConfig(1.2, top_p=0.9)}
    wanted = generate(model, prompts, seed=list(range(7)), prefill_chunk=19, **options)
    engine = Engine(model, prefix_tree=PrefixTree(10**6, every=16))
    clients = [Client(engine, prompt=prompt, seed=seed, **options) for seed, prompt in enumerate(prompts)]
    while engine.step():
        pass
    for client, ids, scores in zip(clients, wanted.ids, wanted.log_probabilities, strict=True):
        assert client.ids[0] == ids and [token.score.log_probability for token in client.tokens] == scores
