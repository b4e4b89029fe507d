"""Requests on their way through an engine: waiting, being read, generating."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from anymamba.data.tokenizer import Tokenizer
from anymamba.generation.requests import Event, KeptState, PromptScores, Request, TokenScore, Usage
from anymamba.generation.running import Adjustments, Row
from anymamba.generation.sampling import RowDraws
from anymamba.generation.stops import StoppingDecoder
from anymamba.models.language_model import LanguageModelState
from anymamba.parts.state import map_state


class Job:
    """One request on its way.

    Args:
        id: of the request.
        request: what to generate.
        prompt: its checked tokens.
        sink: takes its events.
    """

    def __init__(self, id: int, request: Request, prompt: Sequence[int], sink: Callable[[Event], None]) -> None:
        self.id, self.request, self.sink = id, request, sink
        self.prompt = tuple(prompt)
        self.n_read = 0
        """Tokens of the prompt that were read."""
        self.n_cached = 0
        """How many of those did not have to be."""
        self.model: LanguageModelState | None = None
        """The state after these; None before the first token."""
        self.scores = self._no_scores()
        """Of the tokens after the first, if they are wanted."""
        self.n_scored = 0
        self.rows: list[AnswerRow] = []
        """One for each answer."""
        self.broken = False
        """Whether its sink has raised."""
        self.turn = 0
        """When a piece of the prompt was read last, in passes."""
        self.stops: list[int] = []
        """Lengths of the prompt after which the state is kept, ascending."""
        self.after_prompt: KeptState | None = None
        """The state after the prompt, if the request keeps its state."""

    def own_state(self) -> KeptState | None:
        """The request's state after as many tokens of the prompt as possible."""
        if self.request.state is None:
            return None
        return next((k for k in self.request.state.candidates() if self.prompt[: len(k.tokens)] == k.tokens), None)

    def to_keep(self, kept: KeptState | None) -> KeptState | None:
        """The state of an answer that has ended, with that after the prompt, if the request keeps its state."""
        before = self.after_prompt
        if kept is None or before is None:
            return None
        return kept if len(before.tokens) == len(kept.tokens) else replace(kept, earlier=before)

    def start_from(self, kept: KeptState, device: torch.device) -> None:
        """Go on from a state whose tokens begin the prompt, and which has the scores that are wanted."""
        self.n_read = self.n_cached = len(kept.tokens)
        self.model = map_state(lambda tensor: tensor.to(device), kept.model)
        if self.scores is not None:
            assert kept.scores is not None
            self._add_scores(kept.scores)
            rest = kept.logits.new_full((1, 1), kept.scores.rest)
            self.score(torch.cat((kept.logits, rest), 1), kept.logits.shape[1])

    def _no_scores(self) -> PromptScores | None:
        n_top, n = self.request.prompt_log_probabilities, len(self.prompt) - 1
        if n_top is None:
            return None
        return PromptScores(np.empty(n, np.float32), np.empty((n, n_top), np.int32), np.empty((n, n_top), np.float32))

    def _add_scores(self, found: PromptScores) -> None:
        assert self.scores is not None
        end = self.n_scored + len(found.chosen)
        for own, new in zip(self.scores[:3], found[:3], strict=True):
            own[self.n_scored : end] = new if own.ndim == 1 else new[:, : own.shape[1]]
        self.n_scored = end

    def score(self, logits: Float[Tensor, "length columns"], vocab_size: int) -> None:
        """Take the logits after some tokens, and score the tokens that follow each.

        Args:
            logits: of all columns. Those of the padding count in the probabilities, as in training and evaluation.
            vocab_size: without the padding.
        """
        assert self.scores is not None
        self.scores = self.scores._replace(rest=float(logits[-1, vocab_size:].logsumexp(-1)))
        first = self.n_scored + 1
        following = torch.tensor(self.prompt[first : first + len(logits)], dtype=torch.int64, device=logits.device)
        found = logits[: len(following)].log_softmax(-1)[:, :vocab_size]
        best = found.topk(self.scores.n_top)
        arrays = (found.gather(1, following[:, None])[:, 0], best.indices, best.values)
        chosen, top_ids, top = (tensor.cpu().numpy() for tensor in arrays)
        self._add_scores(PromptScores(chosen, top_ids, top))

    @property
    def known_scores(self) -> PromptScores | None:
        """The scores of the tokens read so far, after the first."""
        return None if self.scores is None else self.scores.first(self.n_read - 1)

    def token_scores(self) -> list[TokenScore] | None:
        """The scores as an event has them."""
        if self.scores is None:
            return None
        chosen, top_ids, top = (array.tolist() for array in self.scores[:3])
        pairs = (tuple(zip(ids, values, strict=True)) for ids, values in zip(top_ids, top, strict=True))
        return [TokenScore(*one) for one in zip(self.prompt[1:], chosen, pairs, strict=True)]

    def usage(self, n_new: int) -> Usage:
        """The counts of one answer."""
        return Usage(len(self.prompt), self.n_cached, n_new)

    def make_rows(self, tokenizer: Tokenizer | None, workers: Executor) -> None:
        """Make a row for each answer. Their masks begin to work."""
        request, draws = self.request, self._draws()
        self.rows = [
            AnswerRow(
                self,
                request.sampling,
                (draws, index),
                None if tokenizer is None else StoppingDecoder(tokenizer, request.stop),
                request.eos_id,
                request.max_new_tokens,
                self._adjustments(workers),
                request.n_top,
            )
            for index in range(request.n)
        ]

    def _draws(self) -> RowDraws:
        seed = self.request.seed
        number, first = (secrets.randbits(64), 0) if seed is None else seed if isinstance(seed, tuple) else (seed, 0)
        return RowDraws([(number, first + index) for index in range(self.request.n)], self.request.n)

    def _adjustments(self, workers: Executor) -> Adjustments | None:
        r = self.request
        if not r.is_adjusted:
            return None
        mask = None if r.mask is None else r.mask.fork()
        return Adjustments(r.logit_bias, r.frequency_penalty, r.presence_penalty, mask, workers)


class AnswerRow(Row):
    """The row of one answer; its number is the answer's index."""

    def __init__(self, job: Job, *row: object) -> None:
        super().__init__(*row)  # type: ignore[arg-type]
        self.job = job
        self.ids: list[int] = []
        """Its tokens so far."""
        self.n_read = 0
        """How many of them the model has read: all but the newest."""
