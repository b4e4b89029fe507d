"""Reading prompts in pieces between the steps of running rows, several prompts in one pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anymamba.generation.stepping import Stepper
from anymamba.models.inference.native_reading import read
from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.parts.state import concatenate_rows, map_state

MOST_TOKENS = 2048
"""Tokens of one pass at most; memory for activations grows with it."""
LEAST_TOKENS = 16
"""Tokens of one pass at least, however long they take."""


class Piece(NamedTuple):
    """Some of a prompt's tokens."""

    ids: Sequence[int]
    state: LanguageModelState
    """One row, after the tokens before these."""
    all_logits: bool
    """Whether the logits after every token are needed, and not only those after the last."""


class PieceRead(NamedTuple):
    """What reading a piece gives."""

    logits: Float[Tensor, "positions padded_vocab"]
    state: LanguageModelState


class PieceReader:
    """Reads pieces of prompts, and measures how long a token takes.

    Where the model has a compiled step, every token is computed as in a step, so that the result has the same bits
    however a prompt is cut and whatever is read beside it.

    Args:
        model: a language model.
        stepper: of the model.
    """

    def __init__(self, model: LanguageModel, stepper: Stepper) -> None:
        self._model, self._stepper = model, stepper
        self._device = next(model.parameters()).device
        self.seconds_per_token = 1e-3
        """A running mean over passes; one pass is counted for each token up to a few, so it rises with short ones."""

    def tokens_within(self, seconds: float) -> int:
        """How many tokens one pass may read so that it takes about so long."""
        return max(LEAST_TOKENS, min(MOST_TOKENS, int(seconds / self.seconds_per_token)))

    def read(self, pieces: Sequence[Piece]) -> list[PieceRead]:
        """Read pieces, those of the same length together."""
        start = time.perf_counter()
        found: dict[int, PieceRead] = {}
        for places in _of_one_kind(pieces):
            found.update(zip(places, self._read([pieces[i] for i in places]), strict=True))
        n = sum(len(piece.ids) for piece in pieces)
        self.seconds_per_token += 0.3 * ((time.perf_counter() - start) / n - self.seconds_per_token)
        return [found[i] for i in range(len(pieces))]

    def _read(self, pieces: Sequence[Piece]) -> list[PieceRead]:
        """Read pieces of the same length, which all need the same logits."""
        ids = torch.tensor([list(piece.ids) for piece in pieces], device=self._device)
        together = pieces[0].state if len(pieces) == 1 else concatenate_rows([piece.state for piece in pieces])
        logits, state = self._forward(ids, together, None if pieces[0].all_logits else 1)
        rows = [map_state(lambda t, i=i: t[i : i + 1], state) for i in range(len(pieces))]
        return [PieceRead(logits[i], row) for i, row in enumerate(rows)]

    def _forward(
        self, ids: Int[Tensor, "batch length"], state: LanguageModelState, n_logits: int | None
    ) -> tuple[Float[Tensor, "batch positions padded_vocab"], LanguageModelState]:
        native = self._stepper.native
        if native is not None and native.serves(ids[:, 0], state):
            logits, state = read(native, ids, state, num_last_logits=n_logits)
        else:
            logits, state = self._model(ids, state, num_last_logits=n_logits)
        return logits, state


def _of_one_kind(pieces: Sequence[Piece]) -> list[list[int]]:
    """The places of pieces that can be read together."""
    kinds: dict[tuple[int, bool], list[int]] = {}
    for i, piece in enumerate(pieces):
        kinds.setdefault((len(piece.ids), piece.all_logits), []).append(i)
    return list(kinds.values())
