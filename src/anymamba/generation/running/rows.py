"""The rows that are being generated: one step of the model for all of them, and the choice of each row's next token.

This is the one loop under `generate`, `stream` and the engine. Rows join and leave between any two steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anymamba.data.tokenizer import Tokenizer
from anymamba.generation.prompts import GenerationState
from anymamba.generation.running.adjustments import Adjustments
from anymamba.generation.running.slots import Slots, moves
from anymamba.generation.sampling import RowDraws, SamplingConfig, sample
from anymamba.generation.stops import StoppingDecoder
from anymamba.models.language_model import LanguageModel, LanguageModelState

FinishReason = Literal["eos", "stop", "length"]


class Step(Protocol):
    """What steps a model: a `Stepper`, or a `Speculator`."""

    def __call__(self, token_ids: Tensor, state: LanguageModelState, *, reuse_state: bool = False) -> Any:
        """Logits of the next tokens and the new state, as `LanguageModel.step`."""

    def runs_ahead(self, n_rows: int) -> bool:
        """Whether so many rows should be stepped before their tokens reach the CPU, with `reuse_state=False`."""


class Row:
    """One answer while it is generated.

    Args:
        sampling: how its tokens are chosen.
        draws: random numbers, and the row in them.
        decoder: turns tokens into text; None: no text.
        eos_id: the token that ends it.
        most: tokens of the answer.
        adjustments: what changes its logits before a token is chosen.
        n_top: likeliest tokens to report.
    """

    def __init__(
        self,
        sampling: SamplingConfig,
        draws: tuple[RowDraws, int],
        decoder: StoppingDecoder | None,
        eos_id: int | None,
        most: int,
        adjustments: Adjustments | None = None,
        n_top: int = 0,
    ) -> None:
        self.sampling, self.adjustments, self.n_top = sampling, adjustments, n_top
        self.draws, self.number = draws
        self._decoder, self._eos_id, self._most = decoder, eos_id, most
        self.n_new = 0
        """Number of its tokens so far."""

    @property
    def is_last(self) -> bool:
        """Whether the next token is the last of the answer."""
        return self.n_new + 1 >= self._most

    def push(self, token: int) -> tuple[str, FinishReason | None]:
        """Add a token. Returns the text that is final now, and why the row ends with it (None if it does not)."""
        self.n_new += 1
        reason: FinishReason | None = "length" if self.n_new == self._most else None
        if token == self._eos_id:
            reason = "eos"
        text = ""
        if self._decoder is not None:
            text = "" if reason == "eos" else self._decoder.push(token)
            if reason is not None:
                text += self._decoder.flush()
            if self._decoder.stopped:
                reason = "stop"
        if reason is None and self.adjustments is not None:
            self.adjustments.push(token)
        return text, reason


RowT = TypeVar("RowT", bound=Row)


class Chosen(NamedTuple):
    """A row's new token."""

    token: int | None
    """None if no token may come next: the row has ended before it."""
    log_probability: float
    """In nats, under the model, before penalties, temperature and filters."""
    top: tuple[tuple[int, float], ...]
    """The likeliest ids with their log-probabilities."""
    text: str
    """The text that is final now and was not before."""
    reason: FinishReason | None
    """Why the row ends with this token; None if it goes on."""
    error: Exception | None
    """Why no token could be chosen."""


class _Held(NamedTuple):
    """What slots hold of each row."""

    model: LanguageModelState
    """The state before the row's last token."""
    seen: Bool[Tensor, "rows vocab_size"]


class RunningRows(Generic[RowT]):
    """Rows that generate together.

    Args:
        step: steps the model.
        vocab_size: of the model, without padding.
        n_ids: ids that may be generated: a published model's vocabulary may be padded beyond its tokenizer's.
    """

    def __init__(self, step: Step, vocab_size: int, n_ids: int) -> None:
        self._step, self._vocab_size, self._n_ids = step, vocab_size, n_ids
        self.rows: list[RowT] = []
        """The rows that are running, in the order of their states."""
        self._slots = Slots()
        self._last: list[int] = []  # the newest token of each row that has one
        self._ids: Tensor | None = None  # the same on the device; None after rows were removed
        self._ahead: Any = None  # logits and state after these tokens, if the model has read them already
        self._first: Tensor | None = None  # logits of the first token of the rows after those
        self._logits: Tensor | None = None  # that the newest tokens were chosen from

    def add(self, rows: Sequence[RowT], state: GenerationState) -> None:
        """Add rows after their prompts. The state's tensors are used as memory and must not be used again."""
        self._slots.append(_Held(state.model, state.seen))
        self._first = state.logits if self._first is None else torch.cat([self._first, state.logits])
        self.rows = [*self.rows, *rows]

    def advance(self) -> list[Chosen]:
        """Choose one more token for every row. Rows that end with it stay until they are removed."""
        self._logits = logits = self._next_logits()
        seen = self._slots.state.seen
        ids, log_probabilities, failures = choose(self.rows, logits[:, : self._n_ids], seen[:, : self._n_ids])
        seen.scatter_(1, ids[:, None], True)
        self._ids = ids
        self._ahead = None if failures else self._run_ahead(ids)  # before `tolist` waits for the device
        self._last = ids.tolist()
        tops = _tops(self.rows, logits[:, : self._n_ids])
        found = []
        for i, (row, value) in enumerate(zip(self.rows, log_probabilities.tolist(), strict=True)):
            if i in failures:
                found.append(failures[i])
            elif not math.isfinite(value):
                found.append(Chosen(None, value, (), "", None, _not_finite(row.n_new + 1)))
            else:
                found.append(Chosen(self._last[i], value, tops.get(i, ()), *row.push(self._last[i]), None))
        return found

    def before_last(self, places: Sequence[int]) -> GenerationState:
        """A copy of the states of rows before their newest tokens, with the logits that these were chosen from."""
        assert self._logits is not None
        index = self._index(places)
        held = self._slots.select(index)
        return GenerationState(held.model, self._logits.index_select(0, index), held.seen)

    def select(self, places: Sequence[int]) -> tuple[Int[Tensor, " rows"], Any]:
        """The newest tokens of some rows, and a copy of their states before these."""
        index = self._index(places)
        last = torch.tensor([self._last[place] for place in places], dtype=torch.int64, device=index.device)
        return last, self._slots.select(index)

    def settle(self, settle: Callable[[LanguageModelState], LanguageModelState]) -> None:
        """Bring the state to the last token that was read, where a speculator has read ahead of it."""
        if self._last:
            held = self._slots.state
            self._slots.replace(len(self._last), held._replace(model=settle(held.model)))

    @property
    def seen(self) -> Bool[Tensor, "rows vocab_size"]:
        """Ids that have occurred in each row."""
        return self._slots.state.seen

    def remove(self, places: Sequence[int]) -> None:
        """Remove rows by their places in `rows`. The last rows take their places."""
        assert self._first is None, "rows are removed between their tokens, not before their first one"
        self._ids = self._ahead = None
        self._slots.remove(places)
        for to, source in moves(len(self.rows), places):
            self.rows[to], self._last[to] = self.rows[source], self._last[source]
        self.rows, self._last = self.rows[: self._slots.n], self._last[: self._slots.n]

    def _index(self, places: Sequence[int]) -> Int[Tensor, " rows"]:
        return torch.tensor(places, dtype=torch.int64, device=self._slots.state.seen.device)

    def _next_logits(self) -> Float[Tensor, "rows vocab_size"]:
        """Logits of each row's next token; rows that have a token read it first."""
        found, n = [], len(self._last)
        if n:
            held = self._slots.front(n)
            last = torch.tensor(self._last, device=held.seen.device) if self._ids is None else self._ids
            logits, model = self._ahead or self._step(last, held.model, reuse_state=True)
            self._ahead = None
            self._slots.replace(n, held._replace(model=model))
            found.append(logits[:, : self._vocab_size].float())
        if self._first is not None:
            found.append(self._first.float())
            self._first = None
        return found[0] if len(found) == 1 else torch.cat(found)

    def _run_ahead(self, ids: Int[Tensor, " rows"]) -> Any:
        """What the model gives for the newest tokens of all rows; None if that should wait. The states before them are
        kept: a row may end with its token."""
        if not self._step.runs_ahead(len(self.rows)) or any(row.is_last for row in self.rows):
            return None
        return tuple(self._step(ids, self._slots.state.model))


def choose(
    rows: Sequence[Row], logits: Float[Tensor, "rows n_ids"], seen: Bool[Tensor, "rows n_ids"]
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"], dict[int, Chosen]]:
    """One token per row, its log-probability under the model, and the rows that have no next token."""
    adjusted, failures = logits, dict[int, Chosen]()
    if any(row.adjustments is not None for row in rows):
        adjusted = logits.clone()
        for i, row in enumerate(rows):
            failure = None if row.adjustments is None else _adjust(row.adjustments, adjusted[i])
            if failure is not None:
                failures[i] = failure
    ids = _sampled(rows, adjusted, seen)
    return ids, logits.log_softmax(-1).gather(1, ids[:, None])[:, 0], failures


def _adjust(adjustments: Adjustments, logits: Float[Tensor, " n_ids"]) -> Chosen | None:
    try:
        return None if adjustments.apply(logits) else Chosen(None, 0.0, (), "", "stop", None)
    except Exception as error:  # whatever a mask raises is this row's alone
        return Chosen(None, 0.0, (), "", None, error)


def _sampled(
    rows: Sequence[Row], logits: Float[Tensor, "rows n_ids"], seen: Bool[Tensor, "rows n_ids"]
) -> Int[Tensor, " rows"]:
    """One call for all rows with the same options."""
    first = rows[0].sampling
    if len(rows) == 1:
        return sample(logits, first, _draws(rows), seen)
    places: dict[SamplingConfig, list[int]] = {}
    for i, row in enumerate(rows):
        places.setdefault(row.sampling, []).append(i)
    if len(places) == 1:
        return sample(logits, first, _draws(rows), seen)
    ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for sampling, which in places.items():
        index = torch.tensor(which, device=logits.device)
        ids[index] = sample(logits[index], sampling, _draws([rows[i] for i in which]), seen[index])
    return ids


def _draws(rows: Sequence[Row]) -> Float[Tensor, " rows"] | None:
    if rows[0].sampling.is_greedy:
        return None
    return torch.tensor([row.draws.draw(row.number) for row in rows], dtype=torch.float64)


def _tops(rows: Sequence[Row], logits: Float[Tensor, "rows n_ids"]) -> dict[int, tuple[tuple[int, float], ...]]:
    """The likeliest tokens of the rows that report them, by the row's place."""
    found = {}
    for i, row in enumerate(rows):
        if row.n_top:
            best = logits[i].log_softmax(-1).topk(min(row.n_top, logits.shape[1]))
            found[i] = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return found


def _not_finite(n: int) -> RuntimeError:
    return RuntimeError(
        f"the model's logits are not finite at new token {n}; its weights are broken, or their dtype overflows "
        f"(float32 does not)"
    )


def n_ids(model: LanguageModel, tokenizer: Tokenizer | None) -> int:
    """Ids that may be generated: a published model's vocabulary may be padded beyond its tokenizer's."""
    vocab_size = model.config.vocab_size
    return vocab_size if tokenizer is None else min(vocab_size, tokenizer.vocab_size)
