"""The collective operations on tensors, on a process group that is given by its name.

They run inside registered operators, so torch.compile and tracers do not see them. Every rank of a group must call them
in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 has new names for these
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def process_group(name: str) -> Any:
    """The process group of that name, as in `ProcessGroup.group_name`."""
    c10d: Any = dist.distributed_c10d
    return c10d._resolve_process_group(name)


def all_gather(x: Tensor, name: str, size: int) -> Tensor:
    """The tensors of all ranks, which have one shape, as (size, *shape)."""
    gathered = x.new_empty(size, *x.shape)
    all_gather_single(gathered.view(-1), x.contiguous().view(-1), group=process_group(name))
    return gathered


def reduce_scatter(x: Tensor, name: str) -> Tensor:
    """The sum over ranks of x[r], on rank r, from (size, *shape)."""
    total = x.new_empty(x.shape[1:])
    reduce_scatter_single(total.view(-1), x.contiguous().view(-1), group=process_group(name))
    return total


def shifted(x: Tensor, name: str, rank: int, size: int, by: int) -> Tensor:
    """The tensor of rank - by, where by is 1 or -1; zeros if there is no such rank. All have one shape."""
    group, received = process_group(name), torch.zeros_like(x, memory_format=torch.contiguous_format)
    operations = []
    if 0 <= rank + by < size:
        operations.append(dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=rank + by))
    if 0 <= rank - by < size:
        operations.append(dist.P2POp(dist.irecv, received, group=group, group_peer=rank - by))
    for work in dist.batch_isend_irecv(operations) if operations and x.numel() else ():
        work.wait()
    return received
