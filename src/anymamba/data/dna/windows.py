"""Windows of equal length from intervals of genomes: shuffled, on both strands, with a position to resume from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anymamba.base.sizes import require_at_least

from .bed import Interval
from .genome import Genome, Strand
from .runs import is_unknown, n_before

Source = tuple[Genome, Sequence[Interval]]
_OTHER_STRAND: dict[Strand, Strand] = {"+": "-", "-": "+"}


class Windows(NamedTuple):
    """Some windows."""

    letters: NDArray[np.uint8]
    """(n, length) ASCII codes, in the case that the genome has."""
    source: list[int]
    """The number of the genome of each."""
    places: list[Interval]
    """Where each is, with its strand and the label of its interval."""


class GenomeWindows:
    """An endless stream of windows. In each epoch no two windows of an interval overlap.

    An interval of s bases has floor(s / length) windows; in each epoch they begin at another random offset, so that the
    rest is at another place. A shorter interval has none. All windows of an epoch come in one shuffled order. They
    depend on the sources, the length and the seed only, so a stream made with the `position` of another continues
    exactly after it.

    Args:
        sources: genomes, which stay open, and the intervals of each.
        length: bases of a window.
        seed: of the order, the offsets and the strands; epoch e has the seed (seed, e).
        shuffle: False reads the windows in order from the start of each interval, for evaluation.
        reverse_complement: read each window with probability 1/2 on the other strand than that of its interval.
        max_unknown: windows with a larger share of N and ambiguity codes are dropped, and counted in `dropped`.
        position: that of another stream over the same sources, as JSON values.
    Raises ValueError if no interval has a window, or if the position is of other sources or another length.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        length: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        reverse_complement: bool = True,
        max_unknown: float = 0.1,
        position: dict[str, Any] | None = None,
    ) -> None:
        require_at_least("length", length, 1)
        if not 0 <= max_unknown <= 1:
            raise ValueError(f"max_unknown must be a share from 0 to 1, got {max_unknown}")
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.reverse_complement, self.max_unknown = reverse_complement, max_unknown
        self._genomes = [genome for genome, _ in sources]
        self._intervals = [(i, interval) for i, (_, intervals) in enumerate(sources) for interval in intervals]
        self._sizes = np.array([interval.end - interval.start for _, interval in self._intervals], np.int64)
        counts = self._sizes // length
        self._ends = np.cumsum(counts)
        self.n_windows = int(counts.sum())
        """Windows of an epoch, before any is dropped."""
        if not self.n_windows:
            longest = int(self._sizes.max(initial=0))
            raise ValueError(
                f"none of the {len(self._sizes):,} intervals has {length:,} bases, the longest has {longest:,}; take "
                "shorter windows or longer intervals"
            )
        self._identity = self._digest()
        self._epoch, self._next, self.dropped = self._start(position)
        self._plan_epoch()

    @property
    def position(self) -> dict[str, Any]:
        """The position after the last window, as JSON values."""
        return {"epoch": self._epoch, "next": self._next, "dropped": self.dropped, "windows": self._identity}

    def take(self, n: int) -> Windows:
        """The next n windows. Raises ValueError if all windows of an epoch are dropped."""
        letters = np.empty((n, self.length), np.uint8)
        source: list[int] = []
        places: list[Interval] = []
        dropped_in_a_row = 0
        while len(places) < n:
            i, place = self._next_place()
            window = self._read(i, place)
            if unknown_share(window) > self.max_unknown:
                self.dropped += 1
                dropped_in_a_row += 1
                if dropped_in_a_row > 2 * self.n_windows:
                    raise ValueError(
                        f"each window has more than {self.max_unknown:.0%} of N and ambiguity codes; raise max_unknown "
                        "(--data.genome.max-unknown)"
                    )
                continue
            dropped_in_a_row = 0
            letters[len(places)] = window
            source.append(i)
            places.append(place)
        return Windows(letters, source, places)

    def once(self, n: int) -> Iterator[Windows]:
        """The windows that are left of this epoch, up to n at once; fewer at the end, and where some are dropped."""
        while self._next < self.n_windows:
            places = [self._next_place() for _ in range(min(n, self.n_windows - self._next))]
            read = [(i, place, self._read(i, place)) for i, place in places]
            kept = [window for window in read if unknown_share(window[2]) <= self.max_unknown]
            self.dropped += len(read) - len(kept)
            if kept:
                source, found, letters = zip(*kept, strict=True)
                yield Windows(np.stack(letters), list(source), list(found))

    def count_kept(self) -> int:
        """The windows of this epoch that are not dropped.

        They are counted by the runs of N and ambiguity codes; a genome that is read in place is read once for them.
        """
        kept = 0
        for (i, interval), offset, size in zip(
            self._intervals, self._offsets.tolist(), self._sizes.tolist(), strict=True
        ):
            bounds = interval.start + offset + self.length * np.arange(size // self.length + 1)
            unknown = np.diff(n_before(self._genomes[i].unknown_runs(interval.name), bounds))
            kept += int((unknown / self.length <= self.max_unknown).sum())
        return kept

    def _read(self, source: int, place: Interval) -> NDArray[np.uint8]:
        return self._genomes[source].letters(place.name, place.start, place.end, strand=place.strand)

    def _next_place(self) -> tuple[int, Interval]:
        if self._next == self.n_windows:
            self._epoch, self._next = self._epoch + 1, 0
            self._plan_epoch()
        window = self._next if self._order is None else int(self._order[self._next])
        self._next += 1
        k = int(np.searchsorted(self._ends, window, side="right"))
        i, interval = self._intervals[k]
        in_interval = window - (int(self._ends[k - 1]) if k else 0)
        start = interval.start + int(self._offsets[k]) + in_interval * self.length
        strand = _OTHER_STRAND[interval.strand] if self._flipped[window] else interval.strand
        return i, interval._replace(start=start, end=start + self.length, strand=strand)

    def _plan_epoch(self) -> None:
        """Draw the order, the offset of each interval and the strand of each window."""
        draw = np.random.default_rng([self.seed, self._epoch])
        self._order = draw.permutation(self.n_windows) if self.shuffle else None
        rest = self._sizes - self._sizes // self.length * self.length
        self._offsets = draw.integers(0, rest, endpoint=True) if self.shuffle else np.zeros_like(rest)
        flips = self.reverse_complement
        self._flipped = draw.random(self.n_windows) < 0.5 if flips else np.zeros(self.n_windows, bool)

    def _start(self, position: dict[str, Any] | None) -> tuple[int, int, int]:
        if position is None:
            return 0, 0, 0
        if position.get("windows") != self._identity:
            raise ValueError(
                "the position is of other intervals, another length or another seed; continue with the genomes, the "
                "BED files and the options that the run began with"
            )
        return position["epoch"], position["next"], position["dropped"]

    def _digest(self) -> str:
        """Identifies what the windows depend on; letters are told by the lengths of sequences only."""
        genomes = [list(genome.lengths.items()) for genome in self._genomes]
        options = [self.length, self.seed, self.shuffle, self.reverse_complement, self.max_unknown]
        text = json.dumps([genomes, self._intervals, options])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def unknown_share(letters: NDArray[np.uint8]) -> float:
    """The share of N and ambiguity codes among letters."""
    return float(is_unknown(letters).mean()) if letters.size else 0.0
