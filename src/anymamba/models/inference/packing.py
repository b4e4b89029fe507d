"""What a model for inference is made of, from models in memory and from checkpoints, and how it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from anymamba.kernels.packed_linear.formats import row_bytes
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.models.weight_formats import format_table
from anymamba.ops.packed_linear import PackedWeight, pack, unpack
from anymamba.parts.init import WithoutMetaValues
from anymamba.parts.parameters import wide_names

if TYPE_CHECKING:
    from anymamba.models.checkpoints import Checkpoint


AT_ONCE = 1 << 22
"""Random weights that are in memory in float32."""
BOUND = 0.02 * 3**0.5
"""Of a uniform distribution with a standard deviation of 0.02."""


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
    names = checkpoint.stored.keys() - matrices.keys()
    for name, tensor in checkpoint.tensors(names, dict.fromkeys(names, torch.float32)):
        if name in formats:
            matrices[name] = _on(device, pack(tensor, formats[name]))
        else:
            others[name] = tensor.to(device=device, copy=True).contiguous()
    return PackedParts(checkpoint.config, matrices, others)


def packed_random(config: ModelConfig, weights: str, device: torch.device | str = "cpu") -> PackedParts:
    """Random weights, to measure speed and memory. Some rows at a time are in memory before they are packed.

    Matrices are uniform with a standard deviation of 0.02, all other parameters as in a new model.
    """
    formats = format_table(config, weights)
    model = LanguageModel(config, device="meta")
    matrices, others = {}, {}
    for name, parameter in list(model.named_parameters()):
        if name in formats:
            n_out, n_in = parameter.shape
            matrices[name] = _random_matrix(n_out, n_in, formats[name], device)
        else:
            module, _, last = name.rpartition(".")
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            others[name] = empty
            setattr(model.get_submodule(module), last, nn.Parameter(empty, requires_grad=False))
    with WithoutMetaValues():  # the matrices are still on the meta device
        model.reset_parameters()
    return PackedParts(config, matrices, others)


def _random_matrix(n_out: int, n_in: int, format: str, device: torch.device | str) -> PackedWeight:
    data = torch.empty(n_out, row_bytes(format, n_in), dtype=torch.uint8, device=device)
    for rows in data.split(max(1, AT_ONCE // n_in)):
        rows.copy_(pack(torch.empty(len(rows), n_in, device=device).uniform_(-BOUND, BOUND), format).data)
    return PackedWeight(data, format, n_in)


def _on(device: torch.device | str | None, weight: PackedWeight) -> PackedWeight:
    return weight if device is None else weight._replace(data=weight.data.to(device))


class PackedModelWeights:
    """The weights of a model for inference, to be written; see `checkpoints.weights.Weights`."""

    def __init__(self, parts: PackedParts) -> None:
        from anymamba.models.checkpoints import StoredTensor

        self.config, self._packed, self._others = parts
        self.formats = {name: weight.format for name, weight in self._packed.items()}
        model = LanguageModel(self.config, device="meta")
        self.stored = {name: StoredTensor(tuple(p.shape), torch.float32) for name, p in model.named_parameters()}
        self.wide = wide_names(model)

    def blocks(self, name: str) -> PackedWeight | None:
        """A packed matrix as it is; None for other parameters."""
        return self._packed.get(name)

    def tensors(self, *, dtypes: Mapping[str, torch.dtype] | None = None) -> Iterator[tuple[str, Tensor]]:
        """All parameters, in order, on the CPU, in these dtypes or float32."""
        for name in self.stored:
            value = unpack(self._packed[name]) if name in self._packed else self._others[name].detach()
            yield name, value.to("cpu", (dtypes or {}).get(name)).contiguous()
