"""What differs between ranks: the rows of batches, their states, and random states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from anymamba.data.batches import Batch

CARRIED, RANDOM = "carried.", "random."
BY_ROWS = (Shard(0), Replicate())
"""How the states of rows lie on the mesh (dp, cp)."""


def rows_of_batch(batch: Batch, rank: int, size: int) -> Batch:
    """The rows of one of `size` ranks, as many as the others have. Rows that are missing have no labels."""
    n_rows, length = batch.input_ids.shape
    each = -(-n_rows // size)
    missing = each * size - n_rows
    ids = torch.cat([batch.input_ids, batch.input_ids[-1:].expand(missing, -1)])
    labels = torch.cat([batch.labels, torch.full_like(batch.labels[-1:], -100).expand(missing, -1)])
    carried = torch.cat([batch.carried, torch.zeros(missing, dtype=torch.bool)])
    ends = torch.arange(n_rows + 1, each * size + 1, dtype=batch.cu_seqlens.dtype) * length
    offsets = torch.cat([batch.cu_seqlens, ends])
    start, stop = rank * each, (rank + 1) * each
    inside = (offsets >= start * length) & (offsets <= stop * length)
    return batch._replace(
        input_ids=ids[start:stop],
        labels=labels[start:stop],
        carried=carried[start:stop],
        cu_seqlens=offsets[inside] - start * length,
    )


def rows_of_all(tensors: dict[str, Tensor], mesh: DeviceMesh, rank: int) -> dict[str, Tensor]:
    """The tensors of a rank under the names of a checkpoint: its rows as parts of all rows, its random state by rank.

    Args:
        mesh: (dp, cp).
    """
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(CARRIED):
            named[name] = DTensor.from_local(tensor, mesh, BY_ROWS, run_check=False)
        elif name.startswith(RANDOM):
            named[random_name(name, rank)] = tensor
        else:
            named[name] = tensor
    return named


def local_rows(tensors: dict[str, Tensor], rank: int, seed: int) -> dict[str, Tensor]:
    """The opposite of `rows_of_all`. A rank that was not there before gets a random state of its own."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(CARRIED) and isinstance(tensor, DTensor):
            found[name] = tensor.to_local()
        elif not name.startswith(RANDOM):
            found[name] = tensor
    for kind in ("torch", "cuda"):
        own = tensors.get(random_name(RANDOM + kind, rank))
        if own is not None:
            found[RANDOM + kind] = own
    if RANDOM + "torch" not in found:
        found[RANDOM + "torch"] = torch.Generator().manual_seed(seed + rank).get_state()
    return found


def random_name(name: str, rank: int) -> str:
    """The name of a rank's random state; that of rank 0 is the one of a run with one process."""
    return name if rank == 0 else f"{name}.rank-{rank}"


def empty_parts(model: nn.Module, mesh: DeviceMesh) -> Callable[[str, torch.Size, torch.dtype], Tensor]:
    """What makes the tensors into which a checkpoint is read: a rank reads only its parts.

    Args:
        model: sharded; its parameters and their optimizer states have the same parts.
        mesh: (dp, cp).
    The function raises RuntimeError for a parameter that has another size in the model.
    """
    parameters = dict(model.named_parameters())

    def make(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        if name.startswith(CARRIED):
            local = torch.empty(size[0] // mesh.size(0), *size[1:], dtype=dtype, device=mesh.device_type)
            return DTensor.from_local(local, mesh, BY_ROWS, run_check=False)
        kind, _, rest = name.partition(".")
        own = parameters.get(rest if kind == "model" else rest.rpartition(".")[0])
        if kind == "model" and own is not None and own.shape != size:
            raise RuntimeError(f"{rest} is {tuple(size)} in the checkpoint and {tuple(own.shape)} in the model")
        if isinstance(own, DTensor) and own.shape == size:
            return torch.empty_like(own, dtype=dtype, requires_grad=False)
        return torch.empty(size, dtype=dtype)

    return make
