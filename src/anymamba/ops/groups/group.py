"""The ranks over which a sequence is spread, and where each rank's part begins."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from anymamba.ops.groups import transport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SequenceGroup(NamedTuple):
    """The processes that hold one sequence. Each has a contiguous part, in the order of ranks. Parts may be empty.

    Offsets (`cu_seqlens`) are those of the whole sequence. A packed sequence crosses an edge between two parts if it
    has tokens on both sides. It arrives at a rank if it crosses the edge before the rank's part, and departs from it if
    it crosses the edge after the part.
    """

    name: str
    """Of torch's process group: `ProcessGroup.group_name`."""
    rank: int
    """Of this process in the group."""
    starts: tuple[int, ...]
    """The offset of each rank's part, and the length of the whole sequence."""

    @property
    def size(self) -> int:
        return len(self.starts) - 1

    @property
    def start(self) -> int:
        """The offset of this rank's part."""
        return self.starts[self.rank]

    @property
    def stop(self) -> int:
        """The offset after this rank's part."""
        return self.starts[self.rank + 1]

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.starts[-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each rank's part."""
        return tuple(stop - start for start, stop in itertools.pairwise(self.starts))

    @property
    def has_end(self) -> bool:
        """Whether this rank has the last token of the whole sequence."""
        return self.stop == self.length and (self.rank == 0 or self.start < self.length)

    def local_offsets(self, cu_seqlens: Tensor) -> Tensor:
        """The offsets inside this rank's part. Sequences that have no tokens here are empty."""
        return cu_seqlens.clamp(self.start, self.stop) - self.start

    def arriving(self, cu_seqlens: Tensor) -> Tensor:
        """(n_sequences,) true for the sequence that arrives here."""
        return (cu_seqlens[:-1] < self.start) & (cu_seqlens[1:] > self.start)

    def departing(self, cu_seqlens: Tensor) -> Tensor:
        """(n_sequences,) true for the sequence that departs from here."""
        return (cu_seqlens[:-1] < self.stop) & (cu_seqlens[1:] > self.stop)

    def passing(self, cu_seqlens: Tensor) -> Tensor:
        """(size,) true for each rank at which a sequence arrives that departs from it again."""
        edges = torch.tensor(self.starts).to(cu_seqlens.device, non_blocking=True)[:, None]
        return ((cu_seqlens[:-1] < edges[:-1]) & (cu_seqlens[1:] > edges[1:])).any(1)

    def ending(self, cu_seqlens: Tensor) -> Tensor:
        """(n_sequences,) true for the sequences whose last token is here. An empty one has it where it would lie."""
        ends = cu_seqlens[1:]
        before = ends <= self.stop
        return before if self.rank == 0 else before & (ends > self.start)

    def only_where_it_ends(self, states: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Last states (n_sequences, ...), with zeros for sequences whose last token is on another rank."""
        ending = torch.full((1,), self.has_end, device=states.device)
        if cu_seqlens is not None:
            ending = self.ending(cu_seqlens)
        return torch.where(ending.view(-1, *[1] * (states.ndim - 1)), states, 0)

    def positions(self, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
        """(length of the part,) the position of each token of this rank in its sequence."""
        tokens = torch.arange(self.start, self.stop, device=device)
        return tokens if cu_seqlens is None else tokens - cu_seqlens[:-1].long()[self.sequences(cu_seqlens)]

    def sequences(self, cu_seqlens: Tensor) -> Tensor:
        """(length of the part,) the index of the packed sequence that has each token of this rank."""
        tokens = torch.arange(self.start, self.stop, device=cu_seqlens.device)
        return torch.searchsorted(cu_seqlens[1:].long(), tokens, right=True)


def sequence_group(group: ProcessGroup, length: int, lengths: Sequence[int] | None = None) -> SequenceGroup:
    """The group of a sequence of which this process has a part.

    Args:
        group: the process group, in the order of the parts.
        length: tokens of this process's part, at least 0.
        lengths: tokens of the part of each rank. By default the ranks ask each other, for which a GPU's queue is
            waited for. All ranks must call this function then.
    Raises ValueError if lengths do not fit the group or this rank's length.
    """
    rank, size = group.rank(), group.size()
    if lengths is None:
        lengths = _exchanged(length, group.group_name, size)
    if len(lengths) != size or lengths[rank] != length:
        raise ValueError(
            f"lengths must be the tokens of each of the {size} ranks, {length} on rank {rank}, got {tuple(lengths)}"
        )
    return SequenceGroup(group.group_name, rank, (0, *itertools.accumulate(lengths)))


def _exchanged(length: int, name: str, size: int) -> list[int]:
    """The lengths of all ranks."""
    if torch.compiler.is_compiling():
        raise ValueError("torch.compile needs to know the tokens of each rank; give lengths to context_parallel")
    kinds = [device.type for device in transport.process_group(name)._device_types]
    mine = torch.tensor([length], device="cpu" if "cpu" in kinds else kinds[0])
    return transport.all_gather(mine, name, size).flatten().tolist()
