"""What all ranks of a run must have in common, as values that are compared and named in an error."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch.distributed as dist

from anymamba.data.table import TokenTable
from anymamba.training.config import TrainConfig, file_values
from anymamba.training.genomes import GenomeData

PIECES, PIECE = 256, 64
"""Pieces of so many tokens or bases, spread over the data, that its digest is made of beside its sizes."""


def require_equal(what: str, values: dict[str, Any]) -> None:
    """Raise ValueError on all ranks, naming what differs, unless all have the same values."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    for rank, others in enumerate(everyone):
        for name in sorted(values.keys() | others.keys()):
            if others.get(name) != everyone[0].get(name):
                raise ValueError(
                    f"the ranks have different {what}: {name} is {everyone[0].get(name)} on rank 0 and "
                    f"{others.get(name)} on rank {rank}; start all of them with the same command and files"
                )


def flat_values(config: TrainConfig) -> dict[str, Any]:
    """A config's values by their dotted names, as in its file. The device is not among them: each rank has its own."""

    def flat(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return found

    return {name: value for name, value in flat(file_values(config), "").items() if name != "device"}


def data_values(training: Any, held_out: Any) -> dict[str, Any]:
    """What tells the data of a run from other data."""
    found: dict[str, Any] = {}
    for name, data in (("training", training), ("held-out", held_out)):
        if data is not None:
            found |= {f"{name} {key}": value for key, value in of_data(data).items()}
    return found


def of_data(data: TokenTable | GenomeData) -> dict[str, Any]:
    """Sizes of the data, and a digest of them and of what is found at places spread over it."""
    lengths = data.lengths
    digest = hashlib.sha256(np.ascontiguousarray(lengths, np.int64).tobytes())
    ends = np.cumsum(lengths, dtype=np.int64)
    n_tokens = int(ends[-1]) if len(ends) else 0
    for place in np.unique(np.arange(PIECES) * n_tokens // PIECES) if n_tokens else ():
        number = int(np.searchsorted(ends, place, side="right"))
        start = int(place - ends[number] + lengths[number])
        piece = data.read(number, start, int(min(start + PIECE, lengths[number])))
        digest.update(np.asarray(piece, np.int64).tobytes())
    return {"documents": data.n_documents, "tokens": n_tokens, "digest": digest.hexdigest()[:16]}
