"""A folder for the states that a prefix tree has no room for in memory."""

from __future__ import annotations

import itertools
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from anymamba.base.errors import CheckpointError
from anymamba.generation.prompts import GenerationState
from anymamba.generation.state_store import load_state, save_state
from anymamba.models.language_model import LanguageModel, LanguageModelState

PREFIX = "prefix-state-"


class StateFolder:
    """States in files, for as long as a process runs. Files that an earlier process left are deleted.

    Args:
        path: a folder of its own; it is made if there is none.
        model: whose states they are.
        most_bytes: of the states in it.
    """

    def __init__(self, path: str | Path, model: LanguageModel, most_bytes: int) -> None:
        self._path, self._model, self.most_bytes = Path(path), model, most_bytes
        self._path.mkdir(parents=True, exist_ok=True)
        for old in self._path.glob(f"{PREFIX}*"):
            old.unlink(missing_ok=True)
        self._numbers = itertools.count()
        self._writer = ThreadPoolExecutor(1, "anymamba-states")  # in order, and rows do not wait for the disk
        self._writes: dict[str, Future[None]] = {}

    def save(self, model: LanguageModelState, logits: Tensor) -> str:
        """Begin to write a state, which must not be written to any more, and return its key."""
        key = f"{PREFIX}{next(self._numbers)}"
        seen = torch.zeros_like(logits, dtype=torch.bool)  # a state in the tree does not need it
        state = GenerationState(model, logits, seen)
        self._writes[key] = self._writer.submit(save_state, self._path / key, state, self._model)
        return key

    def load(self, key: str) -> tuple[LanguageModelState, Tensor] | None:
        """A state on the model's device; None if it could not be written, or its file is gone or damaged."""
        try:
            self._writes[key].result()
            state = load_state(self._path / key, self._model)
        except (OSError, CheckpointError):
            return None
        return state.model, state.logits

    def delete(self, key: str) -> None:
        """Delete a state."""
        del self._writes[key]
        self._writer.submit(self._delete, key)

    def flush(self) -> None:
        """Wait until everything is written and deleted."""
        self._writer.submit(int).result()

    def _delete(self, key: str) -> None:
        with suppress(OSError):
            (self._path / key).unlink(missing_ok=True)
