"""Guesses at the next tokens of a text: what followed the same tokens earlier in it, or what a smaller model says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from anymamba.generation.prompts import PREFILL_CHUNK
from anymamba.generation.stepping import Stepper
from anymamba.models.language_model import LanguageModel, LanguageModelState

Choose = Callable[[Tensor, int], int]
"""Chooses an id from logits (1, padded_vocab) as the text's own token would be chosen. The number says how many tokens
come between the text and this one."""

RATE_WEIGHT = 0.06
"""Of the newest token in the rates of right guesses."""


class Drafter(Protocol):
    """Guesses how a text goes on."""

    def push(self, token: int) -> None:
        """Add a token to the text."""

    def chances(self, n_tokens: int) -> list[float]:
        """The probabilities that at least the first 1, 2, ... n_tokens of a draft are right; empty without a guess."""

    def draft(self, n_tokens: int) -> list[int]:
        """The next tokens, if there are chances."""

    def judge(self, n_drafted: int, n_right: int) -> None:
        """How many tokens of the last draft were right."""


class LookupDrafter:
    """Drafts what followed the latest earlier place that ended in the same tokens (prompt lookup).

    It counts how often such a place predicts the next token, by the number of tokens that are the same there, also
    while nothing is drafted.

    Args:
        ids: the text so far.
    """

    KEY = 3
    """So many tokens must be the same."""
    LONGEST = 24
    """Longer matches count as this long."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}  # the place after each run of KEY tokens
        self._at = 0  # the place that is being followed; its token is the guess
        self._length = 0  # how many tokens before it are the same as the text's last ones
        self._rates = [0.5 + 0.4 * n / self.LONGEST for n in range(self.LONGEST + 1)]  # by length
        for token in ids:
            self.push(int(token))

    def push(self, token: int) -> None:
        ids = self._ids
        if self._length:
            hit = ids[self._at] == token
            self._rates[self._length] += RATE_WEIGHT * (hit - self._rates[self._length])
            self._at, self._length = self._at + 1, min(self._length + 1, self.LONGEST) if hit else 0
        ids.append(token)
        key = tuple(ids[-self.KEY :])
        if not self._length and len(key) == self.KEY and key in self._places:
            self._follow(self._places[key])
        self._places[key] = len(ids)

    def _follow(self, place: int) -> None:
        ids, end = self._ids, len(self._ids)
        length = self.KEY
        while length < min(self.LONGEST, place) and ids[place - 1 - length] == ids[end - 1 - length]:
            length += 1
        self._at, self._length = place, length

    def chances(self, n_tokens: int) -> list[float]:
        if not self._length:
            return []
        found, chance = [], 1.0
        for i in range(n_tokens):
            chance *= self._rates[min(self._length + i, self.LONGEST)]
            found.append(chance)
        return found

    def draft(self, n_tokens: int) -> list[int]:
        period = len(self._ids) - self._at  # a draft that reaches the end of the text goes on with itself
        return [self._ids[self._at + i % period] for i in range(n_tokens)]

    def judge(self, n_drafted: int, n_right: int) -> None:
        """Nothing to do: `push` counts."""


class ModelDrafter:
    """Drafts with a smaller model.

    Args:
        model: with the same vocabulary as the text's model.
        ids: the text so far.
        choose: how to choose the tokens.
    """

    HOPE, FORGET = 0.6, 0.004
    """A low rate moves towards HOPE by this share for each token that was not drafted. So drafts are tried again."""

    def __init__(self, model: LanguageModel, ids: Sequence[int], choose: Choose) -> None:
        self._model, self._step, self._choose = model, Stepper(model), choose
        self._device = next(model.parameters()).device
        self._state = model.init_state(1)
        self._unread = [int(token) for token in ids]
        self._ahead: list[tuple[int, LanguageModelState | None]] = []  # drafted tokens with the states after them
        self._before = (0, self._state)  # the newest right guess and the state before it
        self._rate = self.HOPE

    def push(self, token: int) -> None:
        guess, state = self._ahead.pop(0) if self._ahead else (None, None)
        if guess is None:
            self._rate += self.FORGET * max(0.0, self.HOPE - self._rate)
        if guess == token and state is not None:
            self._before, self._state = (token, self._state), state
            return
        self._unread.append(token)
        self._ahead = []

    def chances(self, n_tokens: int) -> list[float]:
        return [self._rate**i for i in range(1, n_tokens + 1)]

    def draft(self, n_tokens: int) -> list[int]:
        logits, self._state = self._read()
        state, ids = self._state, list[int]()
        while True:
            ids.append(self._choose(logits, len(ids)))
            if len(ids) == n_tokens:
                break
            logits, state = self._step(torch.tensor(ids[-1:], device=self._device), state)
            self._ahead.append((ids[-1], state))
        self._ahead.append((ids[-1], None))
        return ids

    def judge(self, n_drafted: int, n_right: int) -> None:
        self._ahead = []
        for i in range(min(n_drafted, n_right + 1)):
            self._rate += RATE_WEIGHT * ((i < n_right) - self._rate)

    def _read(self) -> tuple[Tensor, LanguageModelState]:
        """Logits (1, padded_vocab) and the state after the text."""
        if not self._unread:  # a right guess, whose logits were not kept
            token, self._state = self._before
            self._unread = [token]
        ids, self._unread = torch.tensor(self._unread, device=self._device), []
        if len(ids) == 1:
            return self._step(ids, self._state)
        state = self._state
        for piece in ids.split(PREFILL_CHUNK):
            logits, state = self._model(piece[None], state, num_last_logits=1)
        return logits[:, -1], state
