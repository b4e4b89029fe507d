"""Beam search: the likeliest continuations, found by keeping the best num_beams beginnings at every length.

A continuation's score is its log-probability divided by its length in tokens to the power of length_penalty. The
state of the beams is reordered with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from anymamba.base.sizes import require_at_least
from anymamba.data.tokenizer import Tokenizer
from anymamba.generation.prompts import PREFILL_CHUNK, GenerationState, Prompts, prefill, prompt_rows
from anymamba.generation.stops import StoppingDecoder
from anymamba.models.language_model import LanguageModel
from anymamba.parts.state import select_rows

FinishReason = Literal["eos", "stop", "length"]


class Hypothesis(NamedTuple):
    """A continuation of a prompt."""

    ids: list[int]
    """Its tokens; an end-of-sequence token is the last, as are the tokens of a stop string."""
    log_probability: float
    """Of all of them under the model, in nats."""
    score: float
    """log_probability / length ** length_penalty; the best is the largest."""
    finish_reason: FinishReason
    """Why it ended: "eos", "stop" (a stop string) or "length" (max_new_tokens)."""
    text: str | None
    """Its text, cut before the end-of-sequence token or the stop string; None without a tokenizer."""


def beam_search(
    model: LanguageModel,
    prompts: Prompts,
    tokenizer: Tokenizer | None = None,
    *,
    num_beams: int,
    max_new_tokens: int = 256,
    n_best: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    eos_id: int | None = None,
    stop: Sequence[str] = (),
    state: GenerationState | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> list[list[Hypothesis]]:
    """The n_best best continuations of each prompt that beam search finds, the best first.

    Args:
        model: a language model.
        prompts: token ids of each, in any form that `generate` takes; none depends on the others.
        tokenizer: makes text of tokens, finds stop strings, gives the end-of-sequence id; None: tokens only.
        num_beams: beginnings that are kept at every length; 1 with early_stopping is greedy.
        max_new_tokens: tokens at most.
        n_best: continuations that are returned, at most num_beams. There are fewer only where no more exist.
        length_penalty: 0 compares log-probabilities, 1 those per token; above 0 favours long continuations.
        early_stopping: end a prompt as soon as num_beams continuations have ended. False: go on until none that still
            runs can become better than the num_beams best that have ended.
        eos_id: the token that ends a continuation; None: the tokenizer's, if there is one.
        stop: strings that end a continuation; they need a tokenizer.
        state: where to continue from, one row a prompt.
        prefill_chunk: tokens of the prompts that are read at once.
    Raises ValueError for options out of range and prompts that the model cannot read, RuntimeError when the model's
        logits are not numbers.
    """
    _check_options(num_beams, max_new_tokens, n_best, length_penalty, stop, tokenizer)
    eos_id = tokenizer.eos_id if eos_id is None and tokenizer is not None else eos_id
    rules = _Rules(num_beams, max_new_tokens, length_penalty, early_stopping, _end_test(eos_id, tokenizer, stop))
    rows = prompt_rows(prompts)
    searches = [_Search(rules) for _ in rows]
    with torch.inference_mode():
        read = prefill(model, rows, eos_id, state, prefill_chunk)
        _run(model, read, searches, tokenizer)
    return [[_with_text(h, tokenizer, stop) for h in search.best(n_best)] for search in searches]


class _Rules(NamedTuple):
    """What holds for all prompts."""

    num_beams: int
    max_new_tokens: int
    length_penalty: float
    early_stopping: bool
    end_of: Callable[[list[int]], FinishReason | None]
    """Why tokens end a continuation; None where they do not."""

    def score(self, log_probability: float, length: int) -> float:
        return log_probability / max(length, 1) ** self.length_penalty


class _Beam(NamedTuple):
    """A beginning that still runs."""

    ids: list[int]
    log_probability: float


class _Search:
    """The search for one prompt: beams that run, in order of their probability, and continuations that have ended."""

    def __init__(self, rules: _Rules) -> None:
        self.rules = rules
        self.running = [_Beam([], 0.0)]
        self.ended: list[Hypothesis] = []

    @property
    def is_done(self) -> bool:
        """Whether nothing that runs can change the result any more."""
        if not self.running:
            return True
        length = len(self.running[0].ids)
        if length == self.rules.max_new_tokens:
            return True
        if len(self.ended) < self.rules.num_beams:
            return False
        return self.rules.early_stopping or self._best_possible(length) <= self.ended[-1].score

    def _best_possible(self, length: int) -> float:
        """Bound of the score of anything that runs: probability is only lost, and the score is monotone in length."""
        likeliest = self.running[0].log_probability
        return max(self.rules.score(likeliest, n) for n in (length + 1, self.rules.max_new_tokens))

    def advance(self, candidates: list[tuple[int, int, float]]) -> list[int]:
        """Take the likeliest candidates (beam, token, log-probability), best first; return the beams that go on."""
        parents: list[int] = []
        running: list[_Beam] = []
        for rank, (beam, token, log_probability) in enumerate(candidates):
            ids = [*self.running[beam].ids, token]
            reason = self.rules.end_of(ids)
            if reason is None and len(running) < self.rules.num_beams:
                parents.append(beam)
                running.append(_Beam(ids, log_probability))
            elif reason is not None and rank < self.rules.num_beams:
                self._end(ids, log_probability, reason)
        self.running = running
        return parents

    def _end(self, ids: list[int], log_probability: float, reason: FinishReason) -> None:
        score = self.rules.score(log_probability, len(ids))
        self.ended.append(Hypothesis(ids, log_probability, score, reason, None))
        self.ended.sort(key=lambda h: -h.score)
        del self.ended[self.rules.num_beams :]

    def best(self, n: int) -> list[Hypothesis]:
        """The best continuations; beams that still run at max_new_tokens have ended there."""
        for beam in self.running:
            if len(beam.ids) == self.rules.max_new_tokens:
                self._end(beam.ids, beam.log_probability, "length")
        return self.ended[:n]


def _run(model: LanguageModel, read: GenerationState, searches: list[_Search], tokenizer: Tokenizer | None) -> None:
    """Advance all searches together until each is done; every row is a running beam of one of them."""
    vocab_size = model.config.vocab_size
    n_ids = vocab_size if tokenizer is None else min(vocab_size, tokenizer.vocab_size)
    logits, state = read.logits, read.model
    active = [search for search in searches if not search.is_done]
    rows = [row for row, search in enumerate(searches) if not search.is_done]
    logits, state = logits[rows], select_rows(state, torch.tensor(rows, dtype=torch.int64, device=logits.device))
    while active:
        sizes = [len(search.running) for search in active]
        parents: list[int] = []
        first = 0
        for search, size, candidates in zip(active, sizes, _candidates(active, logits[:, :n_ids]), strict=True):
            going_on = search.advance(candidates)
            parents += [] if search.is_done else [first + beam for beam in going_on]
            first += size
        active = [search for search in active if not search.is_done]
        if active:
            last = [beam.ids[-1] for search in active for beam in search.running]
            state = select_rows(state, torch.tensor(parents, device=logits.device))
            logits, state = model.step(torch.tensor(last, device=logits.device), state)


def _candidates(active: list[_Search], logits: Float[Tensor, "rows n_ids"]) -> list[list[tuple[int, int, float]]]:
    """Of each search, the likeliest (beam, token, log-probability): enough that num_beams of them do not end in eos."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    token_log_probabilities = logits.to(wide).log_softmax(-1)
    if not bool(torch.isfinite(token_log_probabilities.amax(-1)).all()):
        raise RuntimeError("the model's logits are not finite; its weights are broken, or their dtype overflows")
    found, n_ids = [], logits.shape[-1]
    sizes = [len(search.running) for search in active]
    for search, part in zip(active, token_log_probabilities.split(sizes), strict=True):
        before = torch.tensor([beam.log_probability for beam in search.running], dtype=wide, device=part.device)
        total = (before[:, None] + part).flatten()
        values, places = total.topk(min(2 * search.rules.num_beams, total.numel()))
        pairs = zip(places.tolist(), values.tolist(), strict=True)
        found.append([(p // n_ids, p % n_ids, v) for p, v in pairs if v > -math.inf])
    return found


def _end_test(
    eos_id: int | None, tokenizer: Tokenizer | None, stop: Sequence[str]
) -> Callable[[list[int]], FinishReason | None]:
    """The test that tells why tokens end a continuation."""

    def end_of(ids: list[int]) -> FinishReason | None:
        if ids[-1] == eos_id:
            return "eos"
        if stop and tokenizer is not None and _decode(ids, tokenizer, stop)[1]:
            return "stop"
        return None

    return end_of


def _decode(ids: list[int], tokenizer: Tokenizer, stop: Sequence[str]) -> tuple[str, bool]:
    """The text of tokens before a stop string, and whether there was one."""
    decoder = StoppingDecoder(tokenizer, stop)
    text = "".join(decoder.push(token) for token in ids) + decoder.flush()
    return text, decoder.stopped


def _with_text(hypothesis: Hypothesis, tokenizer: Tokenizer | None, stop: Sequence[str]) -> Hypothesis:
    if tokenizer is None:
        return hypothesis
    ids = hypothesis.ids[:-1] if hypothesis.finish_reason == "eos" else hypothesis.ids
    return hypothesis._replace(text=_decode(ids, tokenizer, stop)[0])


def _check_options(
    num_beams: int,
    max_new_tokens: int,
    n_best: int,
    length_penalty: float,
    stop: Sequence[str],
    tokenizer: Tokenizer | None,
) -> None:
    for name, value, minimum in (
        ("num_beams", num_beams, 1),
        ("max_new_tokens", max_new_tokens, 0),
        ("n_best", n_best, 1),
    ):
        require_at_least(name, value, minimum)
    if n_best > num_beams:
        raise ValueError(f"n_best must be at most num_beams, got {n_best} and {num_beams}; raise num_beams")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be a finite number, got {length_penalty}")
    if stop and tokenizer is None:
        raise ValueError("stop strings need the tokenizer that makes text of tokens; got tokenizer=None")
