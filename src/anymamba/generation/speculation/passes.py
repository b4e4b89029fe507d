"""Passes over several tokens on a GPU as CUDA graphs, and how often their rounding may decide a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anymamba.models.inference import InferenceModel
from anymamba.models.inference.gpu_weights import activation_dtype
from anymamba.models.inference.graphs import Graphs
from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.parts.state import map_state, state_tensors

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""How far a pass and a step may differ in a logit, in standard deviations of logits, by the dtype of activations."""


def near_ties(logits: Float[Tensor, "*rows vocab"], dtype: torch.dtype) -> Bool[Tensor, "*rows"]:
    """Where the two likeliest ids are so close that rounding may exchange them.

    Args:
        logits: of the ids that may be chosen.
        dtype: of the activations.
    """
    logits = logits.float()
    first, second = logits.topk(2, -1).values.unbind(-1)
    return first - second < ROUNDING.get(dtype, 0.0) * logits.std(-1)


def dtype_of_activations(model: LanguageModel) -> torch.dtype:
    """In which a model computes a pass over several tokens."""
    place = next(model.parameters())
    if isinstance(model, InferenceModel) and place.device.type == "cuda":
        return activation_dtype(model)
    return place.dtype


class _Pass:
    """The forward pass over so many tokens of one row, on memory of its own."""

    def __init__(self, model: LanguageModel, length: int) -> None:
        self._model = ref(model)  # the model's graphs must not keep it alive
        self.ids = torch.zeros(1, length, dtype=torch.int64, device=next(model.parameters()).device)
        self.before = map_state(torch.clone, model.init_state(1))
        self.logits, self.after = torch.empty(0), self.before

    @torch.no_grad()
    def __call__(self) -> None:
        model = self._model()
        assert model is not None
        self.logits, self.after = model(self.ids, self.before)


class _Recorded(NamedTuple):
    run: _Pass
    replay: Callable[[], object]


class _Passes:
    """The graphs of a model's passes, by the number of tokens, and where its weights are."""

    def __init__(self, model: InferenceModel, place: int) -> None:
        self.place, self.recorded = place, dict[int, _Recorded]()
        self.graphs = Graphs(next(model.parameters()).device)


_passes: WeakKeyDictionary[InferenceModel, _Passes] = WeakKeyDictionary()
"""Streams of one model share its graphs: recording one takes as long as a few hundred steps."""


class GraphVerification:
    """Verification by the model's forward pass on a GPU: a graph for each number of tokens, recorded when it is needed.

    Args:
        model: one whose state does not grow.
    """

    def __init__(self, model: InferenceModel) -> None:
        place = next(model.parameters()).data_ptr()
        kept = _passes.get(model)
        if kept is None or kept.place != place:  # the model was moved
            kept = _passes[model] = _Passes(model, place)
        self._model, self._graphs, self._recorded = model, kept.graphs, kept.recorded
        self.has_recorded = False
        """Whether a graph was recorded; what was done since this was set to False took longer than it will."""

    def read(
        self, token_ids: Int[Tensor, "one length"], state: LanguageModelState
    ) -> Float[Tensor, "one length padded_vocab"]:
        """Logits after each token of one row."""
        self._ids, self._before = token_ids[0].tolist(), state
        with self._graphs.turn():
            run = self._run(self._ids)
            self._after = _copied(run.after)
            return run.logits.clone()

    def accept(self, n_tokens: int) -> LanguageModelState:
        """The state after the first n_tokens, which are read again unless all are accepted."""
        if n_tokens == len(self._ids):
            return self._after
        with self._graphs.turn():
            return _copied(self._run(self._ids[:n_tokens]).after)

    def _run(self, ids: list[int]) -> _Pass:
        if len(ids) not in self._recorded:
            run = _Pass(self._model, len(ids))
            self._recorded[len(ids)] = _Recorded(run, self._graphs.capture(run, 1))
            self.has_recorded = True
        run, replay = self._recorded[len(ids)]
        run.ids.copy_(torch.tensor([ids]))
        _copy(self._before, run.before)
        replay()
        return run


def _copied(state: LanguageModelState) -> LanguageModelState:
    found = map_state(torch.empty_like, state)
    _copy(state, found)
    return found


def _copy(state: LanguageModelState, to: LanguageModelState) -> None:
    """Few kernels copy all tensors."""
    torch._foreach_copy_(list(state_tensors(to)), list(state_tensors(state)))
