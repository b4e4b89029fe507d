"""What a model for inference is made of, from models in memory and from checkpoints, and how it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.models.weight_formats import format_table
from anymamba.ops.packed_linear import PackedWeight, pack, unpack

if TYPE_CHECKING:
    from anymamba.models.checkpoints import Checkpoint


class PackedParts(NamedTuple):
    """What an `InferenceModel` is made of."""

    config: ModelConfig
    matrices: dict[str, PackedWeight]
    """Packed weights by the names of the parameters that they stand for."""
    others: dict[str, Tensor]
    """All other parameters by name, in float32."""


def packed_copy(
    model: LanguageModel, formats: Mapping[str, str], device: torch.device | str | None = None
) -> PackedParts:
    """A copy of a model's weights.

    Args:
        formats: the format of each matrix, by the parameter's name.
        device: where the weights go; defaults to where they are.
    """
    matrices, others = {}, {}
    for name, parameter in model.named_parameters():
        if name in formats:
            found = pack(parameter.detach(), formats[name])
            shared = found.data.data_ptr() == parameter.data_ptr()
            matrices[name] = _on(device, found._replace(data=found.data.clone()) if shared else found)
        else:
            others[name] = parameter.detach().to(device, torch.float32, copy=True)
    return PackedParts(model.config, matrices, others)


def packed_checkpoint(
    checkpoint: Checkpoint, weights: str | None, device: torch.device | str | None = None
) -> PackedParts:
    """The weights of a checkpoint. A matrix that is stored in the wanted format stays in the mapped file.

    Args:
        weights: as in `format_table`; defaults to the formats in the file.
        device: where the weights go; defaults to the CPU.
    """
    from anymamba.models.checkpoints import stored_formats  # the readers of files take a while to import

    formats = stored_formats(checkpoint) if weights is None else format_table(checkpoint.config, weights)
    matrices = {}
    for name, format in formats.items():
        blocks = checkpoint.blocks(name)
        if blocks is not None and blocks.format == format:
            matrices[name] = _on(device, blocks)
    others = {}
    for name, tensor in checkpoint.tensors(checkpoint.stored.keys() - matrices.keys(), torch.float32):
        if name in formats:
            matrices[name] = _on(device, pack(tensor, formats[name]))
        else:
            others[name] = tensor.to(device=device, copy=True).contiguous()
    return PackedParts(checkpoint.config, matrices, others)


def packed_random(config: ModelConfig, weights: str, device: torch.device | str = "cpu") -> PackedParts:
    """Random weights, to measure speed and memory. One block at a time is in memory before it is packed."""
    formats = format_table(config, weights)
    model = LanguageModel(config, device="meta")
    matrices, others = {}, {}
    parts = {"embedding": model.embedding, "positions": model.positions, "norm": model.norm, "head": model.head}
    parts |= {f"blocks.{i}.{name}": m for i, block in enumerate(model.blocks) for name, m in block.named_children()}
    for prefix, part in parts.items():
        if part is None:
            continue
        part.to_empty(device=device)
        part.reset_parameters()
        for name, parameter in part.named_parameters(prefix):
            if name in formats:
                matrices[name] = pack(parameter.detach(), formats[name])
            else:
                others[name] = parameter.detach()
        part.to("meta")
    return PackedParts(config, matrices, others)


def _on(device: torch.device | str | None, weight: PackedWeight) -> PackedWeight:
    return weight if device is None else weight._replace(data=weight.data.to(device))


class PackedModelWeights:
    """The weights of a model for inference, to be written; see `checkpoints.weights.Weights`."""

    def __init__(self, parts: PackedParts) -> None:
        from anymamba.models.checkpoints import StoredTensor

        self.config, self._packed, self._others = parts
        self.formats = {name: weight.format for name, weight in self._packed.items()}
        shapes = LanguageModel(self.config, device="meta").named_parameters()
        self.stored = {name: StoredTensor(tuple(p.shape), torch.float32) for name, p in shapes}

    def blocks(self, name: str) -> PackedWeight | None:
        """A packed matrix as it is; None for other parameters."""
        return self._packed.get(name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters in float32, in order, on the CPU."""
        for name in self.stored:
            value = unpack(self._packed[name]) if name in self._packed else self._others[name].detach()
            yield name, value.cpu().contiguous()
