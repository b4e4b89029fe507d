"""Weights to be written: the config and the tensors of a checkpoint or of a model, with our names, in any dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from anymamba.models.checkpoints.formats.files import StoredTensor
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


class Weights(Protocol):
    """A config and its tensors with our names, of a checkpoint or of a model."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def stored(self) -> dict[str, StoredTensor]: ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]: ...


class ModelWeights:
    """The weights of a model that is in memory."""

    def __init__(self, model: LanguageModel) -> None:
        self.config = model.config
        self._parameters = dict(model.named_parameters())
        self.stored = {name: StoredTensor(tuple(p.shape), p.dtype) for name, p in self._parameters.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters, in order, on the CPU."""
        for name, parameter in self._parameters.items():
            yield name, parameter.detach().cpu().contiguous()


class CastWeights:
    """Weights in another dtype; A_log, D and the step's bias stay float32 or wider."""

    def __init__(self, weights: Weights, dtype: torch.dtype | None, progress: Progress | None) -> None:
        self.config, self._weights, self._progress = weights.config, weights, progress
        self.stored = {
            name: StoredTensor(info.shape, target_dtype(name, info.dtype, dtype))
            for name, info in weights.stored.items()
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors in order; each is valid until the next one is requested."""
        done, total = 0, sum(info.nbytes for info in self.stored.values())
        for name, tensor in self._weights.tensors():
            yield name, tensor.to(self.stored[name].dtype)
            done += self.stored[name].nbytes
            if self._progress is not None:
                self._progress(done, total)


def is_wide(name: str) -> bool:
    """Whether one of our parameters is never narrower than float32: A_log, D, the step's bias."""
    return ".ssm." in name


def target_dtype(name: str, stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to write a parameter in; dtype None keeps the stored one."""
    if dtype is None:
        return stored
    return torch.promote_types(dtype, torch.float32) if is_wide(name) else dtype
