"""How the work of a call is split: by shapes only."""

from __future__ import annotations

from typing import NamedTuple

from anymamba.kernels.selective_scan.arguments import ScanArguments

N_STEPS = 32  # of a segment: saved states cost d_state / 32 of u, and a block's calls are paid once in 32 tokens
STEP = 49152  # elements of a step up to which segments are set side by side: a call then costs its work
NARROW = 12288  # elements of a step of one row below which that pays for scanning twice
BLOCK = 1 << 20  # elements of an expanded tensor: a few of them fit the caches
SPAN = 1 << 18  # elements of a tensor that is not expanded


def split(batch: int, d_inner: int, d_state: int) -> tuple[int, int]:
    """(n_segments, n_steps) of a block; segments are for single rows, where several rows fill a step together."""
    n_segments, slab = 1, d_inner * d_state
    while batch == 1 and slab <= NARROW and n_segments < 32 and 2 * n_segments * slab <= STEP:
        n_segments *= 2
    return n_segments, N_STEPS


def rows_at_once(batch: int, d_inner: int, d_state: int) -> int:
    """How many rows of the batch are worked on together: as many as keep a block small."""
    n_segments, n_steps = split(batch, d_inner, d_state)
    return max(1, min(batch, BLOCK // max(1, n_segments * n_steps * d_inner * d_state)))


def saved_shape(a: ScanArguments) -> tuple[int, ...]:
    """Of the states that forward saves for backward, before each block (the last two may stay unused)."""
    n_segments, n_steps = split(a.batch, a.d_inner, a.d_state)
    return (a.length // (n_segments * n_steps) + 2, a.batch, a.n_groups, a.d_state, a.d_inner // a.n_groups)


class Span(NamedTuple):
    start: int
    n_blocks: int
    n_segments: int
    n_steps: int
    first_block: int  # its number among the blocks of all spans

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.n_blocks * self.n_segments * self.n_steps)

    @property
    def sizes(self) -> dict[str, int]:
        """For einops: the span's time axis is (k s t)."""
        return {"k": self.n_blocks, "s": self.n_segments, "t": self.n_steps}

    def block_starts(self) -> range:
        return range(self.start, self.tokens.stop, self.n_segments * self.n_steps)


def spans(length: int, n_segments: int, n_steps: int, elements_per_token: int) -> list[Span]:
    """Spans of whole blocks, then one of the whole segments that are left, then one of the steps that are left."""
    tokens = n_segments * n_steps
    whole, rest = divmod(length, tokens)
    per_span = max(1, SPAN // max(1, tokens * elements_per_token))
    spans = [Span(i * tokens, min(per_span, whole - i), n_segments, n_steps, i) for i in range(0, whole, per_span)]
    number = whole
    if rest >= n_steps:
        spans.append(Span(length - rest, 1, rest // n_steps, n_steps, number))
        number += 1
    if rest % n_steps:
        spans.append(Span(length - rest % n_steps, 1, 1, rest % n_steps, number))
    return spans
