"""Answers in OpenAI's form, whole or in pieces, put together from the engine's events."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from anymamba.generation.requests import Finished, NewToken, PromptRead, TokenScore, Usage
from anymamba.serving.protocol.events import TextEvent
from anymamba.serving.protocol.token_texts import TokenTexts

Piece = dict[str, Any] | bytes
"""A piece of a stream: a JSON object, or the bytes of its event."""


@dataclass(frozen=True)
class Heading:
    """What is the same in all pieces of an answer."""

    model: str
    fingerprint: str
    stream: bool
    """Whether the answer is sent in pieces."""
    include_usage: bool
    """Whether a stream ends with the counts of tokens."""
    eos_id: int | None
    """The token that ends an answer, which has no text."""


@dataclass(eq=False)
class Row:
    """One row of the engine."""

    prompt: int
    """The number of its prompt."""
    text: list[str] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    reason: str | None = None
    usage: Usage = field(default_factory=lambda: Usage(0, 0, 0))

    @property
    def mean_log_probability(self) -> float:
        """Nats for each token, by which the best rows are chosen."""
        return sum(score.log_probability for score in self.scores) / max(1, len(self.scores))


class Answer(ABC):
    """An answer to one HTTP request, for one or several prompts with one or several rows each.

    Args:
        heading: what is the same in all pieces.
        texts: texts of single tokens.
        n_prompts: prompts.
        n: answers for each prompt.
        n_rows: rows for each prompt, of which the n best are answers.
        n_top: the likeliest tokens to report with log-probabilities; None: report none.
    """

    kind: str
    prefix: str
    """Of the id."""

    def __init__(
        self, heading: Heading, texts: TokenTexts, n_prompts: int, n: int, n_rows: int, n_top: int | None
    ) -> None:
        self.heading, self.texts, self.n, self.n_rows, self.n_top = heading, texts, n, n_rows, n_top
        self.id, self.created = self.prefix + secrets.token_hex(12), int(time.time())
        self._keeps_scores = n_top is not None or n_rows > n
        self.rows = [Row(number // n_rows) for number in range(n_prompts * n_rows)]
        self._text_events: dict[int, TextEvent] = {}

    # ------------------------------------------------------------------------------------ events

    def prompt_read(self, prompt: int, event: PromptRead) -> list[Piece]:
        """Take a prompt that was read. Returns the pieces of a stream."""
        return []

    def token(self, prompt: int, event: NewToken) -> list[Piece]:
        """Take a token. Returns the pieces of a stream."""
        number = prompt * self.n_rows + event.index
        row = self.rows[number]
        is_end = event.id == self.heading.eos_id
        if event.text:
            row.text.append(event.text)
        if not is_end and self._keeps_scores:
            row.scores.append(event.score)
        return self.piece(number, event.text, [] if is_end else [event.score]) if self.heading.stream else []

    def finished(self, prompt: int, event: Finished) -> list[Piece]:
        """Take the end of a row. Returns the pieces of a stream."""
        number = prompt * self.n_rows + event.index
        row = self.rows[number]
        row.reason, row.usage = "length" if event.reason == "length" else "stop", event.usage
        return self.last_piece(number) if self.heading.stream else []

    # ------------------------------------------------------------------------------------ results

    @abstractmethod
    def piece(self, number: int, text: str, scores: list[TokenScore]) -> list[Piece]:
        """Pieces of a stream for new text of a row."""

    @abstractmethod
    def last_piece(self, number: int) -> list[Piece]:
        """The last pieces of a row in a stream."""

    @abstractmethod
    def choice(self, index: int, row: Row) -> dict[str, Any]:
        """One whole answer."""

    @abstractmethod
    def text_piece(self, number: int, text: str) -> dict[str, Any]:
        """A piece of a stream with some text of a row, and nothing else."""

    def text_event(self, number: int, text: str) -> bytes:
        """The event of `text_piece`."""
        if number not in self._text_events:
            self._text_events[number] = TextEvent(lambda text: self.text_piece(number, text))
        return self._text_events[number](text)

    def first_pieces(self) -> list[Piece]:
        """Pieces of a stream before all others."""
        return []

    def whole(self) -> dict[str, Any]:
        """The whole answer."""
        best = [row for start in range(0, len(self.rows), self.n_rows) for row in self._best(start)]
        choices = [self.choice(index, row) for index, row in enumerate(best)]
        return {**self._head(self.kind), "choices": choices, "usage": self.usage()}

    def chunk(self, choices: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """One piece of a stream."""
        usage = {"usage": None} if self.heading.include_usage else {}
        return {**self._head(self.stream_kind), "choices": list(choices), **usage}

    def usage_chunk(self) -> dict[str, Any]:
        """The piece that ends a stream with the counts of tokens."""
        return {**self._head(self.stream_kind), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """The counts of tokens."""
        firsts = self.rows[:: self.n_rows]
        prompt = sum(row.usage.prompt_tokens for row in firsts)
        new = sum(row.usage.new_tokens for row in self.rows)
        cached = sum(row.usage.cached_tokens for row in firsts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    @property
    def stream_kind(self) -> str:
        """The `object` of the pieces of a stream."""
        return self.kind

    def _best(self, start: int) -> Sequence[Row]:
        rows = self.rows[start : start + self.n_rows]
        return rows if self.n == self.n_rows else sorted(rows, key=lambda r: -r.mean_log_probability)[: self.n]

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.heading.model,
            "system_fingerprint": self.heading.fingerprint,
        }


@dataclass(frozen=True)
class Echo:
    """A prompt that is repeated before its answers."""

    ids: Sequence[int]
    text: str


class CompletionAnswer(Answer):
    """An answer of /v1/completions.

    Args:
        echoes: the prompts if they are repeated before their answers; else empty.
    """

    kind, prefix = "text_completion", "cmpl-"

    def __init__(self, *answer: Any, echoes: Sequence[Echo] = ()) -> None:
        super().__init__(*answer)
        self._echoes = echoes
        self._prompt_scores: dict[int, list[TokenScore]] = {}
        self._offsets = [self.texts.offsets(len(echoes[row.prompt].text) if echoes else 0) for row in self.rows]

    def prompt_read(self, prompt: int, event: PromptRead) -> list[Piece]:
        """`Answer.prompt_read`; an echo comes first."""
        self._prompt_scores[prompt] = event.scores or []
        if not self._echoes or not self.heading.stream:
            return []
        numbers = range(prompt * self.n_rows, (prompt + 1) * self.n_rows)
        text, scores = self._echoes[prompt].text, self._echo_scores(prompt)
        return [self.chunk([self._choice(number, text, scores)]) for number in numbers]

    def piece(self, number: int, text: str, scores: list[TokenScore]) -> list[Piece]:
        """`Answer.piece`."""
        if self.n_top is None or not scores:
            return [self.text_event(number, text)] if text else []
        return [self.chunk([self._choice(number, text, self._scores(scores, number))])]

    def text_piece(self, number: int, text: str) -> dict[str, Any]:
        """`Answer.text_piece`."""
        return self.chunk([self._choice(number, text, None)])

    def last_piece(self, number: int) -> list[Piece]:
        """`Answer.last_piece`."""
        return [self.chunk([{**self._choice(number, "", None), "finish_reason": self.rows[number].reason}])]

    def choice(self, index: int, row: Row) -> dict[str, Any]:
        """`Answer.choice`."""
        number = self.rows.index(row)
        text = "".join(row.text)
        scores = self._scores(row.scores, number)
        if self._echoes:
            text = self._echoes[row.prompt].text + text
            before = self._echo_scores(row.prompt)
            scores = None if scores is None or before is None else _joined(before, scores)
        return {**self._choice(index, text, scores), "finish_reason": row.reason}

    def _scores(self, scores: list[TokenScore], number: int) -> dict[str, Any] | None:
        if self.n_top is None:
            return None
        return self.texts.completion(scores, self.n_top, self._offsets[number])

    def _echo_scores(self, prompt: int) -> dict[str, Any] | None:
        if self.n_top is None:
            return None
        first = self._echoes[prompt].ids[0] if len(self._echoes[prompt].ids) else None
        return self.texts.completion(self._prompt_scores[prompt], self.n_top, self.texts.offsets(), first)

    def _choice(self, index: int, text: str, scores: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": scores, "finish_reason": None}


def _joined(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if before[name] is None or after[name] is None else before[name] + after[name] for name in before
    }
