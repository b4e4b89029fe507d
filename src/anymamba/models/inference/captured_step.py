"""The step of any model on a GPU as CUDA graphs of its own layers, for models that `GpuStep` does not serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from anymamba.models.inference.graphs import Graphs, bucket_of
from anymamba.models.language_model import LanguageModel, LanguageModelOutput, LanguageModelState
from anymamba.ops import observers
from anymamba.parts.state import map_state, state_tensors


class Recorded(NamedTuple):
    """A step of up to so many rows, and the memory that its graph reads."""

    run: _Run
    replay: Callable[[], object]


class CapturedStep:
    """Steps block by block inside a graph. States are copied to the graph's memory and back.

    Args:
        model: a model whose state does not grow. Its weights must not change.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        template = model.init_state(1)
        self._kinds = [(t.shape[1:], t.dtype) for t in state_tensors(template)]
        self._device = next(model.parameters()).device
        self._graphs = Graphs(self._device)
        self._recorded: dict[int, Recorded] = {}
        self.failure: str | None = None
        """Why the step cannot be recorded, after it was tried; None if it can, or was not tried yet."""

    def serves(self, token_ids: Tensor, state: LanguageModelState) -> bool:
        """Whether `step` can take these arguments: one dense row of ids on the GPU and a state of this model, outside a
        graph that is being captured. It is False after recording has failed."""
        return (
            self.failure is None
            and type(token_ids) is Tensor
            and token_ids.device == self._device
            and token_ids.ndim == 1
            and token_ids.shape[0] > 0
            and token_ids.dtype in (torch.int64, torch.int32)
            and type(state) is LanguageModelState
            and observers.plain(token_ids)
            and self._fits(list(state_tensors(state)), token_ids.shape[0])
            and not torch.cuda.is_current_stream_capturing()
        )

    def _fits(self, tensors: list[Tensor], rows: int) -> bool:
        return len(tensors) == len(self._kinds) and all(
            t.shape == (rows, *shape) and t.dtype == dtype and t.device == self._device and not t.requires_grad
            for t, (shape, dtype) in zip(tensors, self._kinds, strict=True)
        )

    @torch.no_grad()
    def step(
        self, token_ids: Int[Tensor, " batch"], state: LanguageModelState, *, reuse: bool = False
    ) -> LanguageModelOutput:
        """`LanguageModel.step`, for arguments that it `serves`.

        Args:
            token_ids: (batch,).
            state: one row per sequence.
            reuse: write the new state into the memory of the given one.
        """
        rows = token_ids.shape[0]
        with self._graphs.turn():
            recorded = self._bucket(bucket_of(rows))
            if recorded is None:
                return LanguageModel.step(self._model, token_ids, state)
            given = list(state_tensors(state))
            recorded.run.ids[:rows].copy_(token_ids)
            _copy([t[:rows] for t in state_tensors(recorded.run.state)], given)
            recorded.replay()
            output = recorded.run.output
            new = state if reuse else map_state(torch.empty_like, state)
            _copy(list(state_tensors(new)), [t[:rows] for t in state_tensors(output.state)])
            return LanguageModelOutput(output.logits[:rows].clone(), new)

    def _bucket(self, rows: int) -> Recorded | None:
        if rows not in self._recorded:
            run = _Run(self._model, rows)
            try:
                self._recorded[rows] = Recorded(run, self._graphs.capture(run, rows))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a layer that waits for the GPU, say
                self.failure = f"its step cannot be recorded as a graph: {str(error).splitlines()[0]}"
                return None
        return self._recorded[rows]


def _copy(to: list[Tensor], values: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, values)


class _Run:
    """The step on memory of its own."""

    def __init__(self, model: LanguageModel, rows: int) -> None:
        self._model = model
        self.state = model.init_state(rows)
        self.ids = torch.zeros(rows, dtype=torch.int64, device=next(model.parameters()).device)
        self.output: LanguageModelOutput

    def __call__(self) -> None:
        self.output = LanguageModel.step(self._model, self.ids, self.state)
