"""The collective operations on tensors, on a process group that is given by its name.

They run inside registered operators, so torch.compile and tracers do not see them. Every rank of a group must call them
in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def process_group(name: str) -> Any:
    """The process group of that name, as in `ProcessGroup.group_name`."""
    c10d: Any = dist.distributed_c10d
    return c10d._resolve_process_group(name)


def all_gather(x: Tensor, name: str, size: int) -> Tensor:
    """The tensors of all ranks, which have one shape, as (size, *shape)."""
    gathered = x.new_empty(size, *x.shape)
    dist.all_gather(list(gathered), x.contiguous(), group=process_group(name))
    return gathered


def reduce_scatter(x: Tensor, name: str) -> Tensor:
    """The sum over ranks of x[r], on rank r, from (size, *shape)."""
    total = x.new_empty(x.shape[1:])
    dist.reduce_scatter(total, [part.contiguous() for part in x], group=process_group(name))
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
