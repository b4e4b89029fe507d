"""The selective scan in plain PyTorch, chunked: the fallback on every device.

Notation. Time is cut into spans of k blocks of t steps in s segments. Inside a block every expanded tensor is
(t, s, b, g, n, p): t steps, s segments, b rows, g groups, n state, p channels of a group. Channels are last, so that
every operation runs along contiguous memory, and the recurrence is one fused multiply-add a step over all segments,
rows, states and channels. The segments of a block (more than one only where a row alone is too narrow to keep a step
busy) are scanned side by side from zero and joined by their running products of decays. What is not expanded by the
state is computed for a span at once, as (k, t, s, b, g, 1, p).

Only one block's expanded tensors exist at a time. Forward saves the state at the start of each block, backward
recomputes the states inside it. The split depends on shapes only.
"""

from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.kernels.selective_scan.portable.backward import backward
from anymamba.kernels.selective_scan.portable.forward import forward
from anymamba.kernels.selective_scan.portable.splitting import saved_shape, split
from anymamba.kernels.selective_scan.portable.step import step

NAME = "portable"
TRANSPARENT = frozenset({"step"})

__all__ = [
    "NAME",
    "TRANSPARENT",
    "backward",
    "description",
    "forward",
    "refuses",
    "saved_shape",
    "split",
    "step",
    "unavailable",
]


def unavailable(device_type: str) -> str | None:
    return None


def refuses(arguments: ScanArguments) -> str | None:
    return None


def description() -> str:
    return "plain PyTorch, chunked"
