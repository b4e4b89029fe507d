"""Many processes: models that are sharded over them, and sequences that are spread over them."""

from anymamba.base import lazy_names

TYPE_CHECKING = False  # as typing has it

__all__ = [
    "SequenceGroup",
    "clip_gradients",
    "context_parallel",
    "copy_from_first_rank",
    "parallelize",
    "reduce_gradients",
    "sequence_group",
    "sum_over_ranks",
    "whole_tensors",
]

_HOMES = {
    "SequenceGroup": "anymamba.ops.groups",
    "clip_gradients": "anymamba.training.parallel",
    "context_parallel": "anymamba.ops.groups",
    "copy_from_first_rank": "anymamba.training.parallel",
    "parallelize": "anymamba.training.parallel",
    "reduce_gradients": "anymamba.training.parallel",
    "sequence_group": "anymamba.ops.groups",
    "sum_over_ranks": "anymamba.training.parallel",
    "whole_tensors": "anymamba.training.parallel",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)

if TYPE_CHECKING:
    from anymamba.ops.groups import SequenceGroup, context_parallel, sequence_group
    from anymamba.training.parallel import (
        clip_gradients,
        copy_from_first_rank,
        parallelize,
        reduce_gradients,
        sum_over_ranks,
        whole_tensors,
    )
