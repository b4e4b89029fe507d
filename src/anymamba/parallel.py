"""Many processes: sequences that are spread over them."""

from anymamba.base import lazy_names

TYPE_CHECKING = False  # as typing has it

__all__ = ["SequenceGroup", "context_parallel", "sequence_group"]

_HOMES = {
    "SequenceGroup": "anymamba.ops.groups",
    "context_parallel": "anymamba.ops.groups",
    "sequence_group": "anymamba.ops.groups",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)

if TYPE_CHECKING:
    from anymamba.ops.groups import SequenceGroup, context_parallel, sequence_group
