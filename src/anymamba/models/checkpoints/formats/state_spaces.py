"""The original format of the `mamba_ssm` package: its own kind of config.json and an archive of torch.save."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from anymamba.base.files import atomic_file, write_json
from anymamba.models.checkpoints.families import Spelling
from anymamba.models.checkpoints.formats.files import CONFIG, TORCH, failures_told
from anymamba.models.checkpoints.weights import CastWeights


def write(weights: CastWeights, folder: Path, spelling: Spelling) -> list[str]:
    """Write a folder and return the names of its files. Its config.json has no place for ids of special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_torch_archive(weights, folder, spelling)
    write_json(folder / CONFIG, spelling.to_fields(weights.config))
    return [TORCH, CONFIG]


def _write_torch_archive(weights: CastWeights, folder: Path, spelling: Spelling) -> None:
    """Write pytorch_model.bin. torch.save needs all tensors at once, so they are kept in temporary mapped files."""
    with atomic_file(folder / TORCH) as temporary:
        table: dict[str, Tensor] = {}
        for number, (name, tensor) in enumerate(weights.tensors()):
            mapped = _to_mapped_file(spelling.encode(name, tensor), temporary.with_name(str(number)))
            table[spelling.name(name)] = mapped
        if weights.config.tie_embeddings and spelling.tied_head is not None:
            table[spelling.tied_head] = table[spelling.name("embedding.weight")]
        with failures_told(TORCH):
            torch.save(table, temporary)
        del table, mapped


def _to_mapped_file(tensor: Tensor, path: Path) -> Tensor:
    """Write the tensor to a file and map it: the system can drop its pages when memory is scarce."""
    with open(path, "wb") as file:  # not through the mapping: on a full disk that would kill the process
        file.write(tensor.flatten().view(torch.uint8).numpy().data)
    return torch.from_file(str(path), shared=False, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
