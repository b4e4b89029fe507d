"""The selective scan in plain PyTorch, chunked: the fallback on every device.

Notation. Time is split into spans. A span has k blocks, a block has s segments, and a segment has t steps. Inside a
block every expanded tensor is (t, s, b, g, n, p): t steps, s segments, b rows, g groups, n state, p channels of a
group. Channels are last, so that every operation runs along contiguous memory, and a step of the recurrence is one
fused multiply-add over all segments, rows, states and channels. A block has more than one segment only if a single row
is too narrow to keep a step busy. The segments are scanned side by side, each from zero, and joined by their running
products of decays. Tensors without a state dimension are computed for a whole span at once, as (k, t, s, b, g, 1, p).

Only one block's expanded tensors exist at a time. Forward saves the state at the start of each block, and backward
recomputes the states inside it. The split depends only on shapes.
"""

from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.kernels.selective_scan.portable.backward import backward
from anymamba.kernels.selective_scan.portable.forward import forward
from anymamba.kernels.selective_scan.portable.splitting import saved_shape, split
from anymamba.kernels.selective_scan.portable.step import step
from anymamba.kernels.selective_scan.portable.summary import reverse_summary, summary

NAME = "portable"
TRANSPARENT = frozenset({"step"})

__all__ = [
    "NAME",
    "TRANSPARENT",
    "backward",
    "description",
    "forward",
    "refuses",
    "reverse_summary",
    "saved_shape",
    "split",
    "step",
    "summary",
    "unavailable",
]


def unavailable(device_type: str) -> str | None:
    return None


def refuses(arguments: ScanArguments) -> str | None:
    return None


def description() -> str:
    return "plain PyTorch, chunked"
