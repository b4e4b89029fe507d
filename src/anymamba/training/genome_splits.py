"""Which stretches of genomes are held out."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

from anymamba.data.dna import Genome, Interval, Source
from anymamba.data.dna.labelled import SPLIT_NAMES
from anymamba.training.tables import is_held_out

_WINDOWS_TO_CUT = 10  # an interval is cut if it has this many windows; a shorter one is held out as a whole or not


def by_labels(
    sources: Sequence[Source], *, others_held_out: bool = False
) -> tuple[list[Source], list[Source], str] | None:
    """The intervals to train on, those that are held out, and a line about them; None if no label is a split's name.

    Genomes without such labels are trained on as a whole.

    Args:
        others_held_out: whether other files are held out (eval_paths), so that the valid intervals are not read.
    Raises ValueError for a genome with such labels and others, and if there is nothing to train on.
    """
    splits = [(genome, _splits(genome, intervals)) for genome, intervals in sources]
    counts = Counter(split for _, found in splits for split, _ in found)
    if set(counts) <= {""}:
        return None

    def chosen(*wanted: str) -> list[Source]:
        return [(genome, [interval for split, interval in found if split in wanted]) for genome, found in splits]

    told = ", ".join(f"{counts[split]:,} {split}" for split in ("train", "valid", "test"))
    if not counts["train"] + counts[""]:
        raise ValueError(
            f"there is no interval to train on: the labels of the BED files are {told}; give intervals with the label "
            "train, or read the valid ones with --data.eval-paths"
        )
    said = f"splits by the labels of the BED files: {told}; test is not read"
    if others_held_out:
        return chosen("train", ""), [], f"{said}, nor is valid: what eval_paths names (--data.eval-paths) is held out"
    return chosen("train", ""), chosen("valid"), said


def _splits(genome: Genome, intervals: Sequence[Interval]) -> list[tuple[str, Interval]]:
    """Each interval with the name of its split, which is empty for a genome without splits."""
    found = [(SPLIT_NAMES.get(interval.label.lower(), ""), interval) for interval in intervals]
    named = next((interval.label for split, interval in found if split), None)
    other = next((interval.label for split, interval in found if not split), None)
    if named is not None and other is not None:
        raise ValueError(
            f"the labels of the intervals of {genome.source} are names of splits, such as {named!r}, and others, such "
            f"as {other!r}; give all intervals one of train, valid and test, or none of them"
        )
    return found


def held_out_ends(sources: Sequence[Source], fraction: float, context: int) -> tuple[list[Source], list[Source]]:
    """The intervals to train on, and what is held out: about `fraction` of all bases, in contiguous stretches.

    The end of each interval of at least ten windows is held out, and one window at least. Of shorter intervals a hash
    of their place decides. Whatever overlaps a stretch that is held out is cut from the others, on both strands.
    """
    if not fraction:
        return list(sources), [(genome, []) for genome, _ in sources]
    training: list[Source] = []
    held_out: list[Source] = []
    for genome, intervals in sources:
        ends = [end for interval in intervals if (end := _end(interval, fraction, context)) is not None]
        training.append((genome, without(intervals, ends)))
        held_out.append((genome, ends))
    return training, held_out


def _end(interval: Interval, fraction: float, context: int) -> Interval | None:
    """What is held out of an interval."""
    size = interval.end - interval.start
    if size >= _WINDOWS_TO_CUT * context:
        return interval._replace(start=interval.end - max(context, int(fraction * size)))
    return interval if is_held_out(f"{interval.name}:{interval.start}-{interval.end}", fraction) else None


def without(intervals: Sequence[Interval], removed: Sequence[Interval]) -> list[Interval]:
    """The parts of intervals that are in none of the removed ones, whatever the strands."""
    merged = _merged(removed)
    left = []
    for interval in intervals:
        starts, ends = merged.get(interval.name, ([], []))
        start = interval.start
        for i in range(bisect_right(ends, start), len(starts)):
            if starts[i] >= interval.end:
                break
            if starts[i] > start:
                left.append(interval._replace(start=start, end=starts[i]))
            start = ends[i]
        if start < interval.end:
            left.append(interval._replace(start=start))
    return left


def _merged(intervals: Sequence[Interval]) -> dict[str, tuple[list[int], list[int]]]:
    """For each sequence the sorted starts and ends of what the intervals cover."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    for interval in sorted(intervals, key=lambda i: i.start):
        starts, ends = found.setdefault(interval.name, ([], []))
        if ends and interval.start <= ends[-1]:
            ends[-1] = max(ends[-1], interval.end)
        else:
            starts.append(interval.start)
            ends.append(interval.end)
    return found


def n_shared(training: Sequence[Source], held_out: Sequence[Source]) -> int:
    """Bases of the intervals to train on that are held out, too."""
    shared = 0
    for genome, intervals in training:
        others = [i for other, held in held_out if other is genome for i in held]
        shared += _n_bases(intervals) - _n_bases(without(intervals, others))
    return shared


def _n_bases(intervals: Sequence[Interval]) -> int:
    return sum(interval.end - interval.start for interval in intervals)
