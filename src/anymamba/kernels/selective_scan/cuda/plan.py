"""How a call is split over a GPU, and which kernels it takes: by shapes, dtypes and the device, nothing else."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from anymamba.runtimes import nvrtc

if TYPE_CHECKING:
    from anymamba.kernels.selective_scan.arguments import ScanArguments

HERE = Path(__file__).parent

FORWARD, SUMMARY, REVERSE = 0, 1, 2
"""Passages over time, as in parameters.cuh."""

SAVED_EVERY = 64
"""Tokens between saved states: with d_state 16 in float32 they take a byte a token and channel."""

GROUP = 16
"""States that the fast kernels work on at a time; others are padded."""

FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of the tokens that the fast kernels read and write."""

LARGEST_STATE = 64
"""States of a channel that the fast kernels hold in shared memory; more go to the general ones."""

LONGEST_CHUNK = 1 << 30

LONG = 16 * SAVED_EVERY
"""Of backward.cu: sums over time of a chunk of more tokens need `dA_of_warps`."""

SHARED_OF_SYSTEM = 1 << 10
"""Bytes of shared memory that a block takes beside what it asks for."""

GENERAL_KERNELS = (
    ("general_forward", "scan"),
    ("general_backward", "scan_backward"),
    ("between", "carry"),
)
"""Files, and one of the kernels in each."""


class Layout(NamedTuple):
    """How a fast kernel's blocks are laid out: see pieces.cuh."""

    share: int
    channels: int
    tokens: int
    warps: int
    blocks: int
    """Of a multiprocessor: registers are limited to what so many blocks leave each other."""

    @property
    def block_channels(self) -> int:
        return 32 // self.share * self.channels

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def options(self) -> tuple[tuple[str, int], ...]:
        return tuple((name.upper(), getattr(self, name)) for name in ("share", "channels", "tokens", "warps", "blocks"))


class Layouts(NamedTuple):
    """Those of a call's fast kernels."""

    warps: int
    """Of a forward block, at most."""
    backward: Layout
    ahead: bool
    """Of backward.cu: whether the forward run of the next tile goes along with the backward run of this one."""


# Those that were fastest on an H100 at the shapes of benchmarks/gpu.py, and others for less shared memory.
WIDE = Layout(2, 2, tokens=8, warps=16, blocks=1)
"""Of the forward scan."""
NARROW = Layout(4, 2, tokens=8, warps=16, blocks=1)
"""Of the forward scan of few channels: half as many in a block."""
WARPS = (16, 8, 4, 2)
"""Of a forward block: the same compilation serves with fewer than the layout's."""
BACKWARD_LAYOUTS = (
    (Layout(4, 4, tokens=4, warps=8, blocks=1), True),
    (Layout(4, 4, tokens=4, warps=4, blocks=2), False),
)
"""With `ahead`."""


def layouts(a: ScanArguments) -> Layouts | None:
    """The fast kernels' layouts; None where the general kernels serve.

    The fast ones are for real A, selective B and C, Euler's rule and a float32 state that shared memory holds.
    """
    selective = a.B.ndim == 4 and a.C.ndim == 4
    short = a.dtype == torch.float32 and element(a) in FAST_DTYPES
    d_state = int(a.d_state)  # a symbol while torch.compile traces
    if not selective or not short or a.zoh or d_state > LARGEST_STATE:
        return None
    return _fitting(element(a), -(-d_state // GROUP) * GROUP, nvrtc.device(a.u.device.index or 0))


@cache
def _fitting(dtype: torch.dtype, states: int, device: nvrtc.Device) -> Layouts | None:
    most = device.shared_of_block
    warps = [w for w in WARPS if shared_of_forward(WIDE, w, dtype, states, FORWARD) <= most]
    backward = [(b, ahead) for b, ahead in BACKWARD_LAYOUTS if shared_of_backward(b, dtype, states, ahead) <= most]
    return Layouts(warps[0], *backward[0]) if warps and backward else None


def element(a: ScanArguments) -> torch.dtype:
    """The dtype in which the fast kernels read and write tokens: the widest of them."""
    tensors = (a.u, a.delta, a.B, a.C, *(() if a.z is None else (a.z,)))
    widest = tensors[0].dtype
    for tensor in tensors[1:]:
        widest = torch.promote_types(widest, tensor.dtype)
    return widest


def padded_states(a: ScanArguments, of_call: Layouts | None) -> int:
    """States in scratch tensors."""
    return -(-a.d_state // GROUP) * GROUP if of_call else a.d_state


# ------------------------------------------------------------------------------------------------ chunks of time


class Split(NamedTuple):
    """Of time."""

    chunk: int
    """Tokens, a multiple of SAVED_EVERY."""
    n_chunks: int
    cost: float
    """Of the call, in tokens of a block that has a multiprocessor to itself."""


class Machine(NamedTuple):
    """What the time of a call's blocks depends on, fitted to measurements."""

    n_multiprocessors: int
    held: int
    """Blocks that a multiprocessor works on at a time."""
    start: float = SAVED_EVERY
    """What it takes to start a wave of blocks, in tokens of a block."""
    summary: float = 0.5
    """What the first phase of chunks takes, in parts of the second."""
    warps: int | None = None
    """Of a forward block; None where a multiprocessor works on blocks one after the other in the same time."""


START_FORWARD, SUMMARY_FORWARD, SUMMARY_BACKWARD = 250, 0.8, 0.25
RATES = ((0, 0.0), (2, 0.24), (4, 0.45), (8, 0.91), (16, 1.0))
"""How much of its forward blocks a multiprocessor gets done, by the number of warps that are at work."""
GAIN = 0.995
"""Smaller blocks are taken where they are expected to take less than this of the time of the largest ones."""
NARROW_TIME = 0.75
"""The time of a narrow block, in that of a wide one."""


def rate(warps: int) -> float:
    """RATES for any number of warps."""
    for (w0, r0), (w1, r1) in itertools.pairwise(RATES):
        if warps <= w1:
            return r0 + (r1 - r0) * (warps - w0) / (w1 - w0)
    return 1.0


def time_of_blocks(n_blocks: int, tokens: float, machine: Machine) -> float:
    """How long blocks of so many tokens take, in tokens of a block that has a multiprocessor to itself."""
    waves = -(-n_blocks // (machine.n_multiprocessors * machine.held))
    if machine.warps is None:
        return waves * (tokens + machine.start)
    full, rest = divmod(-(-n_blocks // machine.n_multiprocessors), machine.held)
    time = full * machine.held / rate(machine.held * machine.warps)
    time += rest / rate(rest * machine.warps) if rest else 0
    return time * tokens + waves * machine.start


@cache
def split(length: int, n_blocks: int, machine: Machine) -> Split:
    """The chunks that take the least time. All chunks but one have a first phase, of another kernel."""

    def cost(n: int) -> float:
        tokens = -(-length // (n * SAVED_EVERY)) * SAVED_EVERY
        second = time_of_blocks(n * n_blocks, tokens, machine)
        return second + (time_of_blocks((n - 1) * n_blocks, machine.summary * tokens, machine) if n > 1 else 0)

    places = machine.n_multiprocessors * machine.held
    most = max(1, min(length // (2 * SAVED_EVERY), 8 * places // n_blocks))
    wanted = max(min(range(1, most + 1), key=cost), -(-length // LONGEST_CHUNK))
    chunk = -(-length // (wanted * SAVED_EVERY)) * SAVED_EVERY
    return Split(chunk, -(-length // chunk), cost(wanted))


class ForwardPlan(NamedTuple):
    """Of a call's fast forward scan."""

    layout: Layout
    warps: int
    split: Split


@cache
def forward_plan(
    length: int, channels: int, most_warps: int, dtype: torch.dtype, states: int, device: nvrtc.Device
) -> ForwardPlan:
    """Wide blocks, or narrow ones where all of these have a place; `channels` are those of all rows, padded."""
    warps = next((w for w in reversed(WARPS) if w * WIDE.tokens >= length), most_warps)
    best = _wide_plan(length, channels, min(warps, most_warps), dtype, states, device)
    if best.warps == WIDE.warps:
        smaller = _wide_plan(length, channels, WIDE.warps // 2, dtype, states, device)
        best = smaller if smaller.split.cost < GAIN * best.split.cost else best
        waves = -(-channels // NARROW.block_channels // device.n_multiprocessors)
        cost = NARROW_TIME * waves * (length + START_FORWARD)
        if states == GROUP and cost < best.split.cost and length <= LONGEST_CHUNK:
            chunk = -(-length // SAVED_EVERY) * SAVED_EVERY
            return ForwardPlan(NARROW, NARROW.warps, Split(chunk, 1, cost))
    return best


def _wide_plan(
    length: int, channels: int, warps: int, dtype: torch.dtype, states: int, device: nvrtc.Device
) -> ForwardPlan:
    shared = shared_of_forward(WIDE, warps, dtype, states, FORWARD) + SHARED_OF_SYSTEM
    held = max(1, min(device.shared_of_multiprocessor // shared, WIDE.warps // warps))
    machine = Machine(device.n_multiprocessors, held, START_FORWARD, SUMMARY_FORWARD, warps)
    return ForwardPlan(WIDE, warps, split(length, channels // WIDE.block_channels, machine))


# ------------------------------------------------------------------------------------------------ variants


@cache
def fast_forward(layout: Layout, dtype: torch.dtype, states: int, passage: int) -> nvrtc.Variant:
    """A variant of forward.cu, for padded states."""
    return _fast("forward", "scan", layout, dtype, states, PASS=passage)


@cache
def fast_backward(layout: Layout, dtype: torch.dtype, states: int, ahead: bool) -> nvrtc.Variant:
    """A variant of backward.cu, for padded states."""
    return _fast("backward", "scan_backward", layout, dtype, states, AHEAD=int(ahead))


def _fast(name: str, kernel: str, layout: Layout, dtype: torch.dtype, states: int, **more: int) -> nvrtc.Variant:
    one = ("ONE_GROUP", int(states == GROUP))
    options = (("DTYPE", nvrtc.DTYPES[dtype]), one, *layout.options(), *more.items())
    return nvrtc.Variant(nvrtc.source(HERE / f"{name}.cu"), kernel, options)


def fast_step(a: ScanArguments) -> nvrtc.Variant | None:
    """The fast step's variant; None where the general one serves."""
    tensors = (a.u, a.delta, a.B, a.C, *(() if a.z is None else (a.z,)))
    one_dtype = a.u.dtype in FAST_DTYPES and all(t.dtype == a.u.dtype for t in tensors)
    selective = a.B.ndim == 4 and a.C.ndim == 4
    fits = a.dtype == torch.float32 and not a.zoh and a.d_state % 4 == 0 and a.d_state <= MOST_OF_FAST_STEP
    if not (one_dtype and selective and fits):
        return None
    return _fast_step(a.u.dtype)


@cache
def _fast_step(dtype: torch.dtype) -> nvrtc.Variant:
    return nvrtc.Variant(nvrtc.source(HERE / "fast_step.cu"), "step", (("DTYPE", nvrtc.DTYPES[dtype]),))


@cache
def general(name: str, kernel: str, dtype: torch.dtype) -> nvrtc.Variant:
    """A general kernel's variant, by the dtype of the state."""
    wide = dtype in (torch.float64, torch.complex128)
    options = (("DOUBLE", int(wide)), ("COMPLEX", int(dtype.is_complex)))
    return nvrtc.Variant(nvrtc.source(HERE / f"{name}.cu"), kernel, options)


@cache
def variants_of_training(
    forward: Layout, of_call: Layouts, dtype: torch.dtype, states: int, has_chunks: bool
) -> tuple[nvrtc.Variant, ...]:
    """What a forward and backward pass run, by the fast kernels."""
    chunks = [fast_forward(WIDE, dtype, states, passage) for passage in (SUMMARY, REVERSE) if has_chunks]
    backward = fast_backward(of_call.backward, dtype, states, of_call.ahead)
    passes = (fast_forward(forward, dtype, states, FORWARD), backward, backward._replace(kernel="sum_pieces"))
    return (*passes, *chunks)


def variants() -> list[nvrtc.Variant]:
    """Every compilation that some call on some GPU needs."""
    found: list[nvrtc.Variant] = []
    for dtype in FAST_DTYPES:
        found += [_fast_step(dtype), fast_forward(NARROW, dtype, GROUP, FORWARD)]
        for states in (GROUP, 2 * GROUP):  # one group, or several
            found += [fast_forward(WIDE, dtype, states, passage) for passage in (FORWARD, SUMMARY, REVERSE)]
            found += [fast_backward(layout, dtype, states, ahead) for layout, ahead in BACKWARD_LAYOUTS]
    for dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        found += [general(name, kernel, dtype) for name, kernel in GENERAL_KERNELS]
    return found


# ------------------------------------------------------------------------------------------------ shared memory


def shared_of_forward(layout: Layout, warps: int, dtype: torch.dtype, states: int, passage: int) -> int:
    """Bytes of shared memory of forward.cu: places, rates, OfWarp and OfGroup."""
    inputs, matrices = 2 if passage == SUMMARY else 3, 2 if passage == FORWARD else 1
    width, channels = dtype.itemsize, layout.block_channels
    steps = GROUP // layout.share
    of_warp = layout.tokens * channels * (2 * inputs * width + 8)
    of_group = matrices * (GROUP * layout.tokens * (4 + 2 * width) + 64) + GROUP * channels * 4 + steps * 8
    return 5 * 32 * 8 + states * channels * 4 + warps * (of_warp + states // GROUP * of_group)


def shared_of_backward(layout: Layout, dtype: torch.dtype, states: int, ahead: bool) -> int:
    """Bytes of shared memory of backward.cu: OfBlock, OfGroup and sums."""
    width, channels, steps, groups = dtype.itemsize, layout.block_channels, GROUP // layout.share, states // GROUP
    pieces, row, plane, sides = SAVED_EVERY // layout.tokens, layout.tokens * channels, GROUP * channels, 1 + ahead
    floats = (sides * pieces + 4) * plane + sides * pieces * 2 * (row + GROUP * layout.tokens) + 2 * channels
    floats += layout.warps * (row + 512 + plane)
    copies = -(-3 * row * width // 16 // 32)
    of_block = (
        4 * floats + 2 * copies * 32 * 16 + 2 * 32 * 8 + 8 * layout.threads * 4 + layout.warps * 2 * 3 * row * width
    )
    of_block += sides * pieces * (steps // 2 + steps + 2) * 8 + 80  # barriers, and the struct Place
    of_group = 4 * 2 * plane + steps * 8
    return of_block + groups * of_group + (4 * 3 * SAVED_EVERY * channels if groups > 1 else 0)


def general_tile(dtype: torch.dtype) -> int:
    """Tokens that the general kernels have in shared memory."""
    return 8 if dtype in (torch.float64, torch.complex128) else 16


def shared_of_general(dtype: torch.dtype, backward: bool) -> int:
    """Bytes of shared memory of general_forward.cu and general_backward.cu: OfBlock."""
    warps, tile, slab = 4, general_tile(dtype), 2 if dtype == torch.complex128 else 4
    width = 8 if dtype in (torch.float64, torch.complex128) else 4
    of_slabs = warps * 2 * tile * slab * dtype.itemsize
    if not backward:
        return tile * 32 * width * (2 + warps) + of_slabs
    return tile * 32 * (width * (3 + 3 * warps) + dtype.itemsize * slab * warps) + of_slabs


GENERAL_THREADS = 128
"""Of the general kernels and both steps."""

MOST_OF_FAST_STEP, STATES_OF_LANE, ROWS_OF_BLOCK = 128, 4, 4
"""Of fast_step.cu: states of a channel and of a lane; rows of a block, which are the fewest lanes of a channel, too."""

SMALL_THREADS = 256
"""Of the kernels in between.cu."""
