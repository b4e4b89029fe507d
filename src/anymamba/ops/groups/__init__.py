"""Sequences that are spread over processes: which part is where, and how rows of the parts are exchanged."""

from anymamba.ops.groups.contexts import (
    context_parallel,
    current_group,
    is_spread,
    one_sequence,
    recomputation_contexts,
)
from anymamba.ops.groups.exchange import from_previous_rank, gathered_parts
from anymamba.ops.groups.group import SequenceGroup, sequence_group
from anymamba.ops.groups.transport import all_gather

__all__ = [
    "SequenceGroup",
    "all_gather",
    "context_parallel",
    "current_group",
    "from_previous_rank",
    "gathered_parts",
    "is_spread",
    "one_sequence",
    "recomputation_contexts",
    "sequence_group",
]
