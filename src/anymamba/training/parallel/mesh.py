"""The degrees of parallelism: how the ranks of a run are arranged, and what is split over them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from anymamba.layers.attention import Attention
from anymamba.training.config import ParallelConfig, TrainConfig

NAMES = ("dp_replicate", "dp_shard", "cp")
"""The dimensions of a mesh, the slowest first: neighbouring ranks, which have the fastest links, share a sequence."""


class Degrees(NamedTuple):
    """The sizes of a mesh."""

    dp_replicate: int
    dp_shard: int
    cp: int


def degrees(config: ParallelConfig, world_size: int) -> Degrees:
    """The degrees of a run with `world_size` ranks. Raises ValueError if their product is not that."""
    fixed = config.dp_replicate * config.cp
    shard = world_size // fixed if config.dp_shard == -1 else config.dp_shard
    if fixed * shard != world_size:
        words = f"dp_replicate {config.dp_replicate} x dp_shard {config.dp_shard} x cp {config.cp}"
        raise ValueError(
            f"{words} must give the number of processes, got {world_size}; change --dp-replicate, --dp-shard (-1: what "
            "is left) and --cp, or start another number with torchrun"
        )
    return Degrees(config.dp_replicate, shard, config.cp)


def require_splittable(config: TrainConfig, sizes: Degrees) -> None:
    """Raise ValueError unless each rank gets as many rows as the others, and a token of each."""
    if config.batch_size % (sizes.dp_replicate * sizes.dp_shard):
        raise ValueError(
            f"batch_size must be a multiple of dp_replicate x dp_shard, got {config.batch_size} and "
            f"{sizes.dp_replicate} x {sizes.dp_shard}; change --batch-size or the number of processes"
        )
    if config.context < sizes.cp:
        raise ValueError(
            f"context must be at least cp, so that each rank has a token, got {config.context} and {sizes.cp}; change "
            "--context or --cp"
        )


def require_splittable_layers(model: Any, carries_state: bool) -> None:
    """Raise ValueError for a model with layers that do not run on parts of sequences."""
    mixers = {type(block.mixer).__name__: block.mixer for block in model.blocks}
    refusing = [name for name, mixer in mixers.items() if not mixer.takes_parts]
    if refusing:
        raise ValueError(
            f"--cp splits sequences for Mamba, S6, attention and MLPs, and the model has {', '.join(refusing)}; use "
            "--dp-shard for more processes"
        )
    if carries_state and any(isinstance(mixer, Attention) for mixer in mixers.values()):
        raise ValueError(
            "attention on parts of sequences (--cp) does not carry its state from batch to batch; set carry_state to "
            "false (--no-carry-state)"
        )


def make_mesh(sizes: Degrees, device_type: str) -> DeviceMesh:
    """The mesh of a run, with all three dimensions."""
    return init_device_mesh(device_type, tuple(sizes), mesh_dim_names=NAMES)


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh of `fully_shard`: (dp_replicate, dp_shard * cp), or the second alone if there are no replicas.

    Raises ValueError for dimensions without names, or with others than those of `NAMES`.
    """
    ranks = _arranged(mesh)
    together = ranks.reshape(ranks.shape[0], -1)
    if together.shape[0] == 1:
        return DeviceMesh(mesh.device_type, together[0], mesh_dim_names=("dp_shard_cp",))
    return DeviceMesh(mesh.device_type, together, mesh_dim_names=("dp_replicate", "dp_shard_cp"))


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh of what has a row per sequence: (dp_replicate * dp_shard, cp), of which the first splits the rows."""
    ranks = _arranged(mesh)
    return DeviceMesh(mesh.device_type, ranks.reshape(-1, ranks.shape[2]), mesh_dim_names=("dp", "cp"))


def context_group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The ranks that share this rank's sequences; None if it has them alone."""
    names = _names(mesh)
    if "cp" not in names or mesh.size(names.index("cp")) == 1:
        return None
    return mesh.get_group("cp")


def _names(mesh: DeviceMesh) -> tuple[str, ...]:
    names = mesh.mesh_dim_names or ()
    if len(names) != mesh.ndim or set(names) - set(NAMES):
        raise ValueError(
            f"the dimensions of the mesh must be called {', '.join(NAMES)}, got {names or 'no names'}; give "
            "init_device_mesh these names as mesh_dim_names"
        )
    return names


def _arranged(mesh: DeviceMesh) -> torch.Tensor:
    """The mesh's ranks as (dp_replicate, dp_shard, cp)."""
    names = _names(mesh)
    present = [name for name in NAMES if name in names]
    ranks = mesh.mesh.permute(*(names.index(name) for name in present))
    return ranks.reshape([mesh.size(names.index(name)) if name in names else 1 for name in NAMES])
