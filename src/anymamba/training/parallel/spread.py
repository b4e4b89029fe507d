"""The loss of whole sequences whose parts are on the ranks of a group."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anymamba.models.language_model import LossOutput
from anymamba.ops.groups import context_parallel
from anymamba.parts.state import map_state


def part_lengths(length: int, n_parts: int) -> list[int]:
    """The lengths of parts that differ by one token at most."""
    edges = [length * i // n_parts for i in range(n_parts + 1)]
    return [stop - start for start, stop in itertools.pairwise(edges)]


def spread_loss(loss: Callable[..., LossOutput], group: dist.ProcessGroup) -> Callable[..., LossOutput]:
    """A loss that takes whole sequences on every rank, and computes that of this rank's part of them.

    Args:
        loss: `model.loss` of a model in whose `context_parallel` all ranks of the group are.
        group: the ranks.
    Returns a function of input_ids, labels, state and cu_seqlens. Its loss and count are those of the part, and its
    state is that of the whole sequences.
    """

    def of_part(
        input_ids: Tensor, labels: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None
    ) -> LossOutput:
        lengths = part_lengths(input_ids.shape[1], group.size())
        start = sum(lengths[: group.rank()])
        part = slice(start, start + lengths[group.rank()])
        with context_parallel(group, lengths):
            output = loss(input_ids[:, part], labels[:, part], state, cu_seqlens=cu_seqlens)
        return output._replace(state=map_state(lambda t: _sum(t, group), output.state))

    return of_part


@torch.no_grad()
def _sum(state: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The state of a sequence, which is on the rank that has its last token, with zeros on the others."""
    total = state.detach().clone()
    dist.all_reduce(torch.view_as_real(total) if total.is_complex() else total, group=group)
    return total
