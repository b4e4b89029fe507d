"""How the work of a call is split. It depends only on shapes."""

from __future__ import annotations

from typing import NamedTuple

from anymamba.kernels.selective_scan.arguments import ScanArguments

N_STEPS = 32  # per segment: saved states take d_state / 32 of the memory of u, and 32 tokens share a block's overhead
STEP = 49152  # segments are added up to this many elements per step, so that work outweighs the overhead of a call
NARROW = 12288  # a row with more elements per step gets no segments, because scanning twice would cost more
BLOCK = 1 << 20  # elements of an expanded tensor: a few of them fit the caches
SPAN = 1 << 18  # elements of a tensor that is not expanded


def split(batch: int, d_inner: int, d_state: int) -> tuple[int, int]:
    """(n_segments, n_steps) of a block. Only a single row is split into segments; several rows fill a step together."""
    n_segments, slab = 1, d_inner * d_state
    while batch == 1 and slab <= NARROW and n_segments < 32 and 2 * n_segments * slab <= STEP:
        n_segments *= 2
    return n_segments, N_STEPS


def rows_at_once(batch: int, d_inner: int, d_state: int) -> int:
    """How many rows of the batch are processed together: as many as fit in BLOCK elements."""
    n_segments, n_steps = split(batch, d_inner, d_state)
    return max(1, min(batch, BLOCK // max(1, n_segments * n_steps * d_inner * d_state)))


def saved_shape(a: ScanArguments) -> tuple[int, ...]:
    """Shape of the states before each block, which forward saves for backward (the last two may be unused)."""
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
    """Spans of whole blocks, then a span of the remaining whole segments, then a span of the remaining steps."""
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
