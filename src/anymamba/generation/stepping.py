"""The step of one stream or search: one compiled call where the model allows it, otherwise block by block."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from anymamba.models.inference import InferenceModel
from anymamba.models.inference.gpu_step import GpuStep
from anymamba.models.inference.native_step import NativeStep
from anymamba.models.language_model import LanguageModel, LanguageModelOutput, LanguageModelState
from anymamba.parts.derived import KeptTensors

MOST_AHEAD = 8
"""Rows of a step that is queued ahead: their states take twice the memory, and the CPU's share of a step of more rows
is small."""


class Stepper:
    """Steps a model during one generation. What is derived from the weights is kept until they change.

    Args:
        model: a language model; one with a step of its own keeps it.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model, self._kept = model, KeptTensors(model)
        self._may_reuse = isinstance(model, InferenceModel)
        native = NativeStep.of(model) if type(model) is LanguageModel else None
        self._native = native if isinstance(native, NativeStep) else None

    @property
    def native(self) -> NativeStep | None:
        """The compiled step of the whole model, if calls go through it."""
        return self._model.native_step if isinstance(self._model, InferenceModel) else self._native

    def runs_ahead(self, n_rows: int) -> bool:
        """Whether a step of so many rows should be queued before its tokens reach the CPU: a GPU would wait for the
        CPU otherwise."""
        return self._may_reuse and n_rows <= MOST_AHEAD and isinstance(self._model.gpu_step, GpuStep)

    def __call__(
        self, token_ids: Int[Tensor, " batch"], state: LanguageModelState, *, reuse_state: bool = False
    ) -> LanguageModelOutput:
        """`LanguageModel.step`.

        Args:
            token_ids: (batch,).
            state: one row per sequence.
            reuse_state: the given state is not needed any more, so its memory may hold the new one.
        """
        if self._native is not None and self._native.serves(token_ids, state):
            return self._native.step(token_ids, state, reuse=reuse_state)
        if self._may_reuse:
            return self._model.step(token_ids, state, reuse_state=reuse_state)  # type: ignore[call-arg]
        with self._kept:
            return self._model.step(token_ids, state)
