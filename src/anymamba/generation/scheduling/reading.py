"""Reading prompts in pieces between the steps of running rows, several prompts in one pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from anymamba.generation.stepping import Stepper
from anymamba.models.inference.native_reading import read
from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.parts.state import concatenate_rows, map_state

MOST_TOKENS = 2048
"""Tokens of one pass at most; memory for activations grows with it."""
LEAST_TOKENS = 8
"""Tokens of one pass at least, however long they take."""


class Piece(NamedTuple):
    """Some of a prompt's tokens."""

    ids: Sequence[int]
    state: LanguageModelState
    """One row, after the tokens before these."""
    n_logits: int | None
    """After how many of the last tokens logits are needed: 0, 1, or all (None)."""


class PieceRead(NamedTuple):
    """What reading a piece gives."""

    logits: Float[Tensor, "positions padded_vocab"]
    state: LanguageModelState


class PassClock:
    """How long passes take, by their number of tokens: a running mean for each power of two."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # of a pass of so many tokens

    def add(self, n_tokens: int, seconds: float) -> None:
        """Take note of a pass. One with fewer tokens than the least tells nothing about others."""
        if n_tokens < LEAST_TOKENS:
            return
        size = 1 << (n_tokens.bit_length() - 1)
        seconds *= size / n_tokens
        before = self._seconds.get(size, seconds)
        self._seconds[size] = before + 0.3 * (seconds - before)

    def seconds(self, n_tokens: int) -> float:
        """The time of a pass, as a multiple of that of the largest smaller one that was measured."""
        known = [size for size in self._seconds if size <= n_tokens] or list(self._seconds)
        if not known:
            return n_tokens * 1e-3
        nearest = max(known) if max(known) <= n_tokens else min(known)
        return self._seconds[nearest] * n_tokens / nearest

    def tokens_within(self, seconds: float) -> int:
        """How many tokens a pass may read so that it takes about so long."""
        n = LEAST_TOKENS
        while n < MOST_TOKENS and self.seconds(2 * n) <= seconds:
            n *= 2
        low, high = self.seconds(n), self.seconds(2 * n)
        more = (seconds - low) / (high - low) if low < seconds < high else 0.0
        return min(MOST_TOKENS, n + int(n * more))


class PieceReader:
    """Reads pieces of prompts, and measures how long it takes.

    Where the model has a compiled step, every token is computed as in a step, so that the result has the same bits
    however a prompt is cut and whatever is read beside it. Pieces of the same length are then read together. Otherwise
    all pieces are packed into one row.

    Args:
        model: a language model.
        stepper: of the model.
    """

    def __init__(self, model: LanguageModel, stepper: Stepper) -> None:
        self._model, self._stepper = model, stepper
        self._device = next(model.parameters()).device
        self.clock = PassClock()
        """How long passes have taken."""

    def read(self, pieces: Sequence[Piece]) -> list[PieceRead]:
        """Read pieces."""
        found: dict[int, PieceRead] = {}
        for places in self._groups(pieces):
            group = [pieces[i] for i in places]
            start = time.perf_counter()
            found.update(zip(places, self._read(group), strict=True))
            self.clock.add(sum(len(piece.ids) for piece in group), time.perf_counter() - start)
        return [found[i] for i in range(len(pieces))]

    def _groups(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """The places of pieces that can be read together."""
        can_pack = self._stepper.native is None and isinstance(self._model, LanguageModel)
        groups: dict[tuple[int | None, int | None], list[int]] = {}
        for i, piece in enumerate(pieces):
            is_packed = can_pack and piece.n_logits is not None
            groups.setdefault((None, 1) if is_packed else (len(piece.ids), piece.n_logits), []).append(i)
        return list(groups.values())

    def _read(self, pieces: Sequence[Piece]) -> list[PieceRead]:
        """Read pieces together, which are of the same length or can be packed."""
        state = pieces[0].state if len(pieces) == 1 else concatenate_rows([piece.state for piece in pieces])
        if len({len(piece.ids) for piece in pieces}) == 1:
            logits, state = self._read_batch(pieces, state)
        else:
            logits, state = self._read_packed(pieces, state)
        rows = [map_state(lambda t, i=i: t[i : i + 1], state) for i in range(len(pieces))]
        return [PieceRead(logits[i], row) for i, row in enumerate(rows)]

    def _read_batch(
        self, pieces: Sequence[Piece], state: LanguageModelState
    ) -> tuple[Float[Tensor, "pieces positions padded_vocab"], LanguageModelState]:
        ids = torch.tensor([list(piece.ids) for piece in pieces], device=self._device)
        n_logits = pieces[0].n_logits if len({piece.n_logits for piece in pieces}) == 1 else 1
        native = self._stepper.native
        if native is not None and native.serves(ids[:, 0], state):
            logits, state = read(native, ids, state, num_last_logits=n_logits)
        else:
            logits, state = self._model(ids, state, num_last_logits=n_logits)
        self._wait()
        return logits, state

    def _read_packed(
        self, pieces: Sequence[Piece], state: LanguageModelState
    ) -> tuple[Float[Tensor, "pieces one padded_vocab"], LanguageModelState]:
        ids = torch.tensor([[token for piece in pieces for token in piece.ids]], device=self._device)
        offsets = [0, *accumulate(len(piece.ids) for piece in pieces)]
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=self._device)
        x, state = self._model.hidden(ids, state, cu_seqlens=cu_seqlens)
        logits = self._model.logits(x[0, cu_seqlens[1:].long() - 1])[:, None]
        self._wait()
        return logits, state

    def _wait(self) -> None:
        """Wait for a GPU, so that a pass is measured and not only begun."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
