"""Reads the results: times by length, ratios within one run, where two curves cross."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from anymamba.lab.experiment import Record, Results


@dataclass(frozen=True)
class Series:
    """The numbers of one candidate in one kind of arm."""

    kind: str
    """operators or models: the prefix of the arms' names."""
    candidate: str
    within: str | None = None
    """The pass, for models."""

    def timing(self, record: Record) -> dict[str, Any]:
        """The timing of the candidate in a record."""
        times = record.values["times"]
        return (times if self.within is None else times[self.within])[self.candidate]


def timings(record: Record) -> list[tuple[str, dict[str, Any]]]:
    """All timings of a record, with the name of the candidate; those of models are in several passes."""
    times = record.values["times"]
    return [pair for own in ([times] if "scan" in times else times.values()) for pair in own.items()]


def runs(results: Results) -> list[Results]:
    """The results of each run separately."""
    seeds = sorted({record.seed for record in results.records})
    return [replace(results, records=tuple(r for r in results.records if r.seed == seed)) for seed in seeds]


def records_by_size(results: Results, kind: str) -> dict[int, list[Record]]:
    """The records of a kind of arm by length or context, from the shortest."""
    arms = [arm for arm in results.arms if arm.startswith(f"{kind}-")]
    return dict(sorted((int(arm.rpartition("-")[2]), results.of(arm)) for arm in arms))


def seconds(results: Results, series: Series) -> dict[int, float]:
    """The median over the runs at each length at which the candidate ran."""
    found = {}
    for size, records in records_by_size(results, series.kind).items():
        values = [t for record in records if (t := series.timing(record)["seconds"]) is not None]
        if values:
            found[size] = median(values)
    return found


def ratios(results: Results, other: Series, ours: Series) -> dict[int, list[float]]:
    """The time of the other over ours in each run, at every length at which both ran."""
    found = {}
    for size, records in records_by_size(results, ours.kind).items():
        pairs = [(other.timing(record)["seconds"], ours.timing(record)["seconds"]) for record in records]
        values = [a / b for a, b in pairs if a is not None and b is not None]
        if values:
            found[size] = values
    return found


def medians(values: dict[int, list[float]]) -> dict[int, float]:
    """The median at each length."""
    return {size: median(several) for size, several in values.items()}


def crossings(ratio: dict[int, float]) -> list[float]:
    """Lengths at which the ratio passes 1, interpolated linearly in log-log; a ratio of 1 counts as above."""
    points = sorted((math.log(size), math.log(value)) for size, value in ratio.items())
    return [
        math.exp(x + (next_x - x) * y / (y - next_y))
        for (x, y), (next_x, next_y) in itertools.pairwise(points)
        if (y >= 0) != (next_y >= 0)
    ]


def above_from(ratio: dict[int, float]) -> float:
    """The length from which on the ratio is above 1 up to the longest: the shortest if always, infinity if never."""
    if ratio[max(ratio)] < 1:
        return math.inf
    found = crossings(ratio)
    return found[-1] if found else float(min(ratio))


def slope(times: dict[int, float]) -> float | None:
    """The slope of log time over log length, by least squares; None for fewer than two lengths."""
    if len(times) < 2:
        return None
    xs, ys = [math.log(size) for size in times], [math.log(value) for value in times.values()]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def from_length(values: dict[int, Any], least: int) -> dict[int, Any]:
    """The values at lengths of at least `least`."""
    return {size: value for size, value in values.items() if size >= least}


def number(value: float) -> str:
    """A number with three significant digits."""
    if math.isinf(value):
        return "never"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.{2 - math.floor(math.log10(max(value, 1e-3)))}f}"
