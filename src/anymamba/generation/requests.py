"""What an engine is asked to generate, and the events that tell what it did."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anymamba.generation.prompts import GenerationState
from anymamba.generation.sampling import SamplingConfig
from anymamba.models.language_model import LanguageModelState
from anymamba.parts.state import state_bytes

EndReason = Literal["eos", "stop", "length", "cancelled"]


class TokenMask(Protocol):
    """Says which tokens may come next in one answer, for structured output."""

    def allowed(self) -> Bool[np.ndarray, " ids"]:
        """True for each id that may come next; ids beyond the end may not. All false ends the answer.

        It is called in a thread of its own while the model runs, never at the same time as `accept`.
        """
        ...

    def accept(self, token: int) -> None:
        """Go on after a token that was chosen."""
        ...

    def fork(self) -> TokenMask:
        """A copy that goes on by itself."""
        ...


class PromptScores(NamedTuple):
    """Log-probabilities of the tokens of a prompt after the first."""

    chosen: Float[np.ndarray, " n"]
    """Of each token."""
    top_ids: Int[np.ndarray, "n n_top"]
    """The likeliest ids in its place, likeliest first."""
    top: Float[np.ndarray, "n n_top"]
    """Their log-probabilities."""
    rest: float = -math.inf
    """The logarithm of the sum of exp over the logits of the vocabulary's padding, after the last token."""

    @property
    def n_top(self) -> int:
        """How many of the likeliest ids there are."""
        return self.top.shape[1]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.chosen.nbytes + self.top_ids.nbytes + self.top.nbytes

    def first(self, n: int) -> PromptScores:
        """Those of the first n, as views."""
        return PromptScores(self.chosen[:n], self.top_ids[:n], self.top[:n], self.rest)


@dataclass(frozen=True)
class KeptState:
    """The state after some tokens, to go on from without reading them again. Its tensors are never written to."""

    tokens: tuple[int, ...]
    model: LanguageModelState
    """The model's state after all tokens; one row."""
    logits: Float[Tensor, "one vocab_size"]
    """Logits of the next token, without the padding of the vocabulary."""
    scores: PromptScores | None = None
    """Of the tokens after the first, if they are known."""
    earlier: KeptState | None = None
    """The state after fewer of the tokens, for a text that goes on from there: that at the end of the prompt."""

    @property
    def nbytes(self) -> int:
        """The size of the states and the logits in bytes."""
        own = state_bytes((self.model, self.logits)) + 8 * len(self.tokens)
        return own if self.earlier is None else own + self.earlier.nbytes

    def candidates(self) -> Iterator[KeptState]:
        """This state and the earlier one, longest first."""
        kept: KeptState | None = self
        while kept is not None:
            yield kept
            kept = kept.earlier

    def generation_state(self) -> GenerationState:
        """The same as `generate` and `save_state` take it."""
        seen = torch.zeros_like(self.logits, dtype=torch.bool)
        seen[:, list(set(self.tokens))] = True
        return GenerationState(self.model, self.logits, seen)


@dataclass(frozen=True)
class Beams:
    """Beam search in place of drawing tokens, with the arguments of `beam_search`.

    The n best answers are sent when the search is done. Of a kept state only the best one has it.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate after one prompt."""

    prompt: Sequence[int]
    max_new_tokens: int = 256
    """Most tokens of each answer. 0 only reads the prompt."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int | tuple[int, int] | None = None
    """Answer i draws as row i of a batch with this seed; a pair (seed, row) counts from that row. None: a new seed."""
    eos_id: int | None = None
    """The token that ends an answer; None: none does."""
    stop: Sequence[str] = ()
    """Strings that end an answer; its text is cut before them."""
    n: int = 1
    """Answers. They share the reading of the prompt."""
    n_top: int = 0
    """How many of the likeliest tokens to report for each new token."""
    prompt_log_probabilities: int | None = None
    """Report the log-probability of each token of the prompt and so many of the likeliest ones; None: do not."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these ids before the choice."""
    frequency_penalty: float = 0.0
    """Subtracted from an id's logit once for each time it occurs in the answer."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each id that occurs in the answer."""
    mask: TokenMask | None = None
    """Which tokens may come; None: all."""
    beams: Beams | None = None
    """Search for the likeliest answers; then nothing may change the logits."""
    owner: str = ""
    """Who asks: owners get equal shares, and see only the states of their own prompts in the prefix tree."""
    state: KeptState | None = None
    """A state to go on from if its tokens begin the prompt. If they do not, its earlier state is tried, then none."""
    keep_state: bool = False
    """Whether `Finished` carries the state after the prompt and the answer, and the one after the prompt with it."""
    invariant: bool = False
    """The answer must have the same bits whatever runs beside it. A model that cannot do this refuses the request."""

    @property
    def n_rows(self) -> int:
        """Rows that it takes while it runs."""
        return self.n if self.beams is None else self.beams.num_beams

    @property
    def is_adjusted(self) -> bool:
        """Whether anything changes logits before a token is chosen, apart from `sampling`."""
        return bool(self.logit_bias or self.frequency_penalty or self.presence_penalty or self.mask is not None)


class TokenScore(NamedTuple):
    """How likely a token was under the model, before penalties, temperature and filters."""

    token: int
    log_probability: float
    """In nats."""
    top: tuple[tuple[int, float], ...]
    """The likeliest ids and their log-probabilities, likeliest first."""


@dataclass(frozen=True)
class PromptRead:
    """The prompt has been read; tokens follow."""

    n_cached: int
    """Tokens of the prompt that did not have to be read."""
    scores: list[TokenScore] | None
    """One for each token of the prompt after the first, if they were asked for."""


@dataclass(frozen=True)
class NewToken:
    """One more token of an answer."""

    index: int
    """Of the answer, 0 to n - 1."""
    score: TokenScore
    text: str
    """The text that is final after this token and was not before; "" without a tokenizer."""

    @property
    def id(self) -> int:
        """The token."""
        return self.score.token


class Usage(NamedTuple):
    """Counts of tokens."""

    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt that did not have to be read."""
    new_tokens: int
    """Tokens of this answer."""


@dataclass(frozen=True)
class Finished:
    """An answer has ended. It is the last event of this answer."""

    index: int
    reason: EndReason
    usage: Usage
    state: KeptState | None


@dataclass(frozen=True)
class Failed:
    """An answer has ended by an error. It is the last event of this answer."""

    index: int
    error: Exception


Event = PromptRead | NewToken | Finished | Failed
