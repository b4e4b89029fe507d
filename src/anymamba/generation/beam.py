"""Beam search: finds the likeliest continuations by keeping the num_beams likeliest prefixes at each length.

A continuation's score is its log-probability divided by length ** length_penalty, where the length is in tokens. When
the beams are reordered, their states are reordered with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from anymamba.base.sizes import require_at_least
from anymamba.data.tokenizer import Tokenizer
from anymamba.generation.prompts import PREFILL_CHUNK, GenerationState, Prompts, prefill, prompt_rows
from anymamba.generation.running import FinishReason, n_ids
from anymamba.generation.stepping import Stepper
from anymamba.generation.stops import StoppingDecoder
from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.parts.state import select_rows

Top = tuple[tuple[int, float], ...]
"""The likeliest ids in one place and their log-probabilities, likeliest first."""


class Hypothesis(NamedTuple):
    """A continuation of a prompt."""

    ids: list[int]
    """Its tokens, including an end-of-sequence token or the tokens of a stop string at the end."""
    log_probability: float
    """Log-probability of all its tokens under the model, in nats."""
    score: float
    """log_probability / length ** length_penalty; larger is better."""
    finish_reason: FinishReason
    """Why it ended: "eos", "stop" (a stop string) or "length" (max_new_tokens)."""
    text: str | None
    """Its text, cut before the end-of-sequence token or the stop string; None without a tokenizer."""
    log_probabilities: tuple[float, ...] = ()
    """Log-probability of each token."""
    tops: tuple[Top, ...] = ()
    """The likeliest ids in the place of each token, if the rules ask for them."""


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
    """Run beam search and return the n_best best continuations of each prompt, best first.

    Args:
        model: a language model.
        prompts: token ids of each, in any form that `generate` takes; each prompt is searched on its own.
        tokenizer: for text, stop strings and the end-of-sequence id; None: tokens only.
        num_beams: prefixes to keep at each length; 1 with early_stopping is greedy.
        max_new_tokens: most tokens to generate.
        n_best: continuations to return, at most num_beams. Fewer are returned only if no more exist.
        length_penalty: 0 compares log-probabilities, 1 compares them per token; above 0 favours long continuations.
        early_stopping: stop a prompt's search as soon as num_beams continuations have ended. False: search on until no
            running beam can become better than the num_beams best that have ended.
        eos_id: the token that ends a continuation; defaults to the tokenizer's, if there is a tokenizer.
        stop: strings that end a continuation; they need a tokenizer.
        state: the state to continue from, one row per prompt.
        prefill_chunk: tokens of each prompt to read at once.
    Raises ValueError for options out of range and prompts that the model cannot read, RuntimeError if the model's
        logits are not finite.
    """
    _check_options(num_beams, max_new_tokens, n_best, length_penalty, stop, tokenizer)
    eos_id = tokenizer.eos_id if eos_id is None and tokenizer is not None else eos_id
    rules = Rules(num_beams, max_new_tokens, length_penalty, early_stopping, end_test(eos_id, tokenizer, stop))
    rows = prompt_rows(prompts)
    searches = [Search(rules) for _ in rows]
    step = Stepper(model)
    with torch.inference_mode():
        read = prefill(model, rows, eos_id, state, prefill_chunk, step.native)
        beams = BeamRows(step, read, searches, n_ids(model, tokenizer))
        while beams.active:
            beams.advance()
    return [[_with_text(h, tokenizer, stop) for h in search.best(n_best)] for search in searches]


class Rules(NamedTuple):
    """The options that are the same for all prompts."""

    num_beams: int
    max_new_tokens: int
    length_penalty: float
    early_stopping: bool
    end_of: Callable[[list[int]], FinishReason | None]
    """The reason why these tokens end a continuation, or None if they do not."""
    n_top: int = 0
    """How many of the likeliest ids to note for each token."""

    def score(self, log_probability: float, length: int) -> float:
        return log_probability / max(length, 1) ** self.length_penalty


class _Beam(NamedTuple):
    """A prefix that is still being extended."""

    ids: list[int]
    log_probability: float
    log_probabilities: tuple[float, ...] = ()
    tops: tuple[Top, ...] = ()
    parent: int = 0
    """The beam that it was before its newest token."""


class Candidates(NamedTuple):
    """What the beams of one search may go on with."""

    best: list[tuple[int, int, float]]
    """(beam, token, log-probability) of the likeliest continuations, likeliest first."""
    tops: list[Top]
    """For each beam; empty if the rules do not ask for them."""


class Search:
    """The search for one prompt: running beams, likeliest first, and continuations that have ended.

    Args:
        rules: of the search.
        keep: gives what is to be kept of a beam, before its newest token; None keeps nothing.
    """

    def __init__(self, rules: Rules, keep: Callable[[int], Any] | None = None) -> None:
        self.rules, self._keep = rules, keep
        self.running = [_Beam([], 0.0)]
        self.ended: list[Hypothesis] = []
        self.kept: Any = None
        """What `keep` gave for the best continuation that has ended."""

    @property
    def is_done(self) -> bool:
        """Whether no running beam can change the result any more."""
        if not self.running:
            return True
        length = len(self.running[0].ids)
        if length == self.rules.max_new_tokens:
            return True
        if len(self.ended) < self.rules.num_beams:
            return False
        return self.rules.early_stopping or self._best_possible(length) <= self.ended[-1].score

    def _best_possible(self, length: int) -> float:
        """Upper bound on the scores of running beams: probability only falls, and the score is monotone in length."""
        likeliest = self.running[0].log_probability
        return max(self.rules.score(likeliest, n) for n in (length + 1, self.rules.max_new_tokens))

    def advance(self, candidates: Candidates) -> list[int]:
        """Replace the beams by the likeliest candidates. Returns the old beam that each new one extends."""
        running: list[_Beam] = []
        for rank, (parent, token, log_probability) in enumerate(candidates.best):
            before = self.running[parent]
            beam = _Beam(
                [*before.ids, token],
                log_probability,
                (*before.log_probabilities, log_probability - before.log_probability),
                (*before.tops, candidates.tops[parent]) if candidates.tops else (),
                parent,
            )
            reason = self.rules.end_of(beam.ids)
            if reason is None and len(running) < self.rules.num_beams:
                running.append(beam)
            elif reason is not None and rank < self.rules.num_beams:
                self._end(beam, reason)
        self.running = running
        return [beam.parent for beam in running]

    def _end(self, beam: _Beam, reason: FinishReason) -> None:
        score = self.rules.score(beam.log_probability, len(beam.ids))
        ended = Hypothesis(beam.ids, beam.log_probability, score, reason, None, beam.log_probabilities, beam.tops)
        self.ended.append(ended)
        self.ended.sort(key=lambda h: -h.score)
        del self.ended[self.rules.num_beams :]
        if self._keep is not None and self.ended[0] is ended:
            self.kept = self._keep(beam.parent)

    def best(self, n: int) -> list[Hypothesis]:
        """The best continuations; beams that are still running at max_new_tokens end there."""
        for beam in self.running:
            if len(beam.ids) == self.rules.max_new_tokens:
                self._end(beam, "length")
        return self.ended[:n]


class BeamRows:
    """The running beams of some searches. They are the rows of one batch and step together.

    Args:
        step: steps the model.
        read: the state after each search's prompt.
        searches: one for each row of `read`.
        n_ids: ids that may be generated.
    """

    def __init__(self, step: Stepper, read: GenerationState, searches: Sequence[Search], n_ids: int) -> None:
        self._step, self._n_ids = step, n_ids
        rows = [row for row, search in enumerate(searches) if not search.is_done]
        self.active = [searches[row] for row in rows]
        """The searches that are not done."""
        index = torch.tensor(rows, dtype=torch.int64, device=read.logits.device)
        self._logits, self._state = select_rows((read.logits, read.model), index)

    def before(self, row: int) -> tuple[LanguageModelState, Tensor]:
        """A copy of a row's state before the newest tokens, and of the logits that these were chosen from."""
        index = torch.tensor([row], device=self._logits.device)
        return select_rows((self._state, self._logits), index)

    def advance(self) -> None:
        """One more token of every search: choose the beams, and read their newest tokens."""
        sizes = [len(search.running) for search in self.active]
        parents: list[int] = []
        first = 0
        candidates = _candidates(self.active, self._logits[:, : self._n_ids])
        for search, size, best in zip(self.active, sizes, candidates, strict=True):
            going_on = search.advance(best)
            parents += [] if search.is_done else [first + beam for beam in going_on]
            first += size
        self.active = [search for search in self.active if not search.is_done]
        if self.active:
            device = self._logits.device
            last = torch.tensor([beam.ids[-1] for search in self.active for beam in search.running], device=device)
            state = select_rows(self._state, torch.tensor(parents, device=device))
            self._logits, self._state = self._step(last, state, reuse_state=True)


def _candidates(active: list[Search], logits: Float[Tensor, "rows n_ids"]) -> list[Candidates]:
    """The likeliest continuations of each search; at least num_beams of them do not end in eos."""
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
        best = [(p // n_ids, p % n_ids, v) for p, v in pairs if v > -math.inf]
        found.append(Candidates(best, _tops(part, search.rules.n_top)))
    return found


def _tops(log_probabilities: Float[Tensor, "rows n_ids"], n_top: int) -> list[Top]:
    """The likeliest ids of each row; none if n_top is 0."""
    if not n_top:
        return []
    best = log_probabilities.topk(min(n_top, log_probabilities.shape[1]))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [tuple(zip(ids, values, strict=True)) for ids, values in rows]


def end_test(
    eos_id: int | None, tokenizer: Tokenizer | None, stop: Sequence[str]
) -> Callable[[list[int]], FinishReason | None]:
    """Make the function that returns the reason why tokens end a continuation, or None."""

    def end_of(ids: list[int]) -> FinishReason | None:
        if ids[-1] == eos_id:
            return "eos"
        if stop and tokenizer is not None and _decode(ids, tokenizer, stop)[1]:
            return "stop"
        return None

    return end_of


def _decode(ids: list[int], tokenizer: Tokenizer, stop: Sequence[str]) -> tuple[str, bool]:
    """The text of tokens up to the first stop string, and whether there is one."""
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
        raise ValueError("stop strings need a tokenizer to turn tokens into text; got tokenizer=None")
