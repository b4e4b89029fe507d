"""Weights to be written: the config and the tensors of a checkpoint or of a model, with our names, in any dtype or in
blocks of integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from anymamba.kernels.packed_linear.formats import row_bytes
from anymamba.models.checkpoints.formats.files import BLOCKS
from anymamba.models.checkpoints.formats.tensors import StoredTensor
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.ops.packed_linear import PackedWeight, pack
from anymamba.parts.parameters import wide_names

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


class Weights(Protocol):
    """A config and its tensors with our names, of a checkpoint or of a model."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def stored(self) -> dict[str, StoredTensor]: ...

    @property
    def wide(self) -> frozenset[str]: ...

    def tensors(self, *, dtypes: Mapping[str, torch.dtype] | None = None) -> Iterator[tuple[str, Tensor]]: ...

    def blocks(self, name: str) -> PackedWeight | None: ...


class ModelWeights:
    """The weights of a model that is in memory."""

    def __init__(self, model: LanguageModel) -> None:
        self.config = model.config
        self._parameters = dict(model.named_parameters())
        self.stored = {name: StoredTensor(tuple(p.shape), p.dtype) for name, p in self._parameters.items()}
        self.wide = wide_names(model)

    def tensors(self, *, dtypes: Mapping[str, torch.dtype] | None = None) -> Iterator[tuple[str, Tensor]]:
        """All parameters, in order, on the CPU, in these dtypes."""
        for name, parameter in self._parameters.items():
            yield name, parameter.detach().to("cpu", (dtypes or {}).get(name)).contiguous()

    def blocks(self, name: str) -> PackedWeight | None:
        """None: its tensors are not in blocks."""
        return None


class CastWeights:
    """Weights in another dtype, or matrices in blocks; those in `wide`, such as A_log and D, stay float32 or wider.

    Args:
        weights: the source. Blocks that have the wanted format are written as they are.
        dtype: of the weights; defaults to the stored one.
        progress: called after each tensor.
        formats: the format of each matrix; all other tensors are then float32. Defaults to `dtype` for all.
    """

    def __init__(
        self,
        weights: Weights,
        dtype: torch.dtype | None,
        progress: Progress | None,
        formats: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.wide, self._weights, self._progress = weights.config, weights.wide, weights, progress
        self.formats = {name: format for name, format in (formats or {}).items() if format in BLOCKS}
        """The formats of the matrices that are written in blocks; their tensors are bytes, (n_out, row_bytes)."""
        self.stored = {
            name: self._target(name, info, dtype) if formats is None else self._in_table(info, formats.get(name))
            for name, info in weights.stored.items()
        }

    def _target(self, name: str, info: StoredTensor, dtype: torch.dtype | None) -> StoredTensor:
        target = dtype or info.dtype
        return StoredTensor(info.shape, torch.promote_types(target, torch.float32) if name in self.wide else target)

    @staticmethod
    def _in_table(info: StoredTensor, format: str | None) -> StoredTensor:
        if format in BLOCKS:
            return StoredTensor((info.shape[0], row_bytes(format, info.shape[1])), torch.uint8)
        return StoredTensor(info.shape, torch.float32 if format is None else getattr(torch, format))

    def tensors(self, *, dtypes: Mapping[str, torch.dtype] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors in order; each is valid until the next one is requested.

        Args:
            dtypes: of some tensors, in place of those in `stored`. The source's numbers are rounded once.
        """
        done, total = 0, sum(info.nbytes for info in self.stored.values())
        wanted = {name: torch.float32 if name in self.formats else info.dtype for name, info in self.stored.items()}
        for name, tensor in self._weights.tensors(dtypes=wanted | dict(dtypes or {})):
            yield name, self._in_blocks(name, tensor) if name in self.formats else tensor
            done += self.stored[name].nbytes
            if self._progress is not None:
                self._progress(done, total)

    def _in_blocks(self, name: str, tensor: Tensor) -> Tensor:
        found, format = self._weights.blocks(name), self.formats[name]
        if found is None or found.format != format:
            found = pack(tensor, format)
        return found.data.cpu()
