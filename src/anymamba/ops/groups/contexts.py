"""The context in which layers and models take their sequences as parts of sequences that a group of processes holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

from anymamba.ops.groups.group import SequenceGroup, sequence_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Given(NamedTuple):
    """A group whose parts are not known before a sequence is given."""

    group: ProcessGroup
    lengths: tuple[int, ...] | None


_active: list[SequenceGroup | _Given | None] = []


@contextmanager
def context_parallel(group: ProcessGroup, lengths: Sequence[int] | None = None) -> Iterator[None]:
    """Spread sequences over a process group: inside the `with` block each process gives a model its part of them.

        with context_parallel(group):
            loss, n_tokens, _ = model.loss(part_of_ids, part_of_labels)

    Parts are contiguous, in the order of the group's ranks, and of any length, also empty. Every process must run the
    same layers, and then the backward pass, which may also be outside the block. Labels are given like ids, so that the
    label of a part's last token is the first token of the next part. Results belong to the part; sums over the group
    are the caller's: those of losses, of counts and of the gradients of parameters.

    `cu_seqlens` are the offsets of the whole sequence, on every rank. An `attention_mask` is that of the part. States
    that are given are those of whole sequences, on every rank. States that are returned are those of sequences whose
    last token is on this rank, and zeros for others, so that their sum over ranks is the state of one process.
    Attention returns NaN for its state.

    Mamba, S6, MLPs and attention run on spread sequences; other layers raise ValueError. The setting applies to the
    whole process, like `backend`. A group of one process changes nothing.

    Args:
        group: a process group, such as that of a dimension of a DeviceMesh: `mesh["cp"].get_group()`.
        lengths: tokens of each rank's part. By default the ranks exchange them once for each call of a model, for which
            a GPU's queue is waited for.
    Raises ValueError, when a layer runs, if lengths do not fit the group or the part.
    """
    with _pushed(_Given(group, None if lengths is None else tuple(lengths)) if group.size() > 1 else None):
        yield


@contextmanager
def _pushed(entry: SequenceGroup | _Given | None) -> Iterator[None]:
    _active.append(entry)
    try:
        yield
    finally:
        _active.pop()


def is_spread() -> bool:
    """Whether sequences are parts of longer ones: the innermost context has a group."""
    return bool(_active) and _active[-1] is not None


def current_group(length: int) -> SequenceGroup | None:
    """The group of the innermost context, for sequences of which this rank has so many tokens; None if there is none.

    Raises ValueError if the rank's part has another length.
    """
    entry = _active[-1] if _active else None
    if isinstance(entry, _Given):
        return sequence_group(entry.group, length, entry.lengths)
    if entry is not None and length != entry.lengths[entry.rank]:
        raise ValueError(
            f"the part of rank {entry.rank} has {entry.lengths[entry.rank]} tokens, got a sequence of {length}; layers "
            "of one model take sequences of one length inside context_parallel"
        )
    return entry


def one_sequence(length: int) -> AbstractContextManager[None]:
    """A context in which all layers take parts of one sequence, so that the ranks exchange lengths only once."""
    return _pushed(current_group(length)) if is_spread() else nullcontext()


def recomputation_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a forward pass and of its repetition in the backward pass, for torch's checkpointing."""
    return nullcontext(), _pushed(_active[-1] if _active else None)
