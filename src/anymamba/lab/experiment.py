"""The parts of an experiment: arms that are measured one by one, thresholds set in advance, charts, report sections."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from anymamba.lab.saving import Saving

Scale = Literal["toy", "cpu", "gpu", "paper"]
"""toy: seconds, for tests. cpu: an hour or two a seed on two cores. gpu: one accelerator. paper: as published."""
SCALES: tuple[Scale, ...] = ("toy", "cpu", "gpu", "paper")


@dataclass(frozen=True)
class Arm:
    """One thing that is measured."""

    name: str
    """Unique in its experiment; letters, digits and hyphens."""
    settings: Any
    """A frozen dataclass; with the seed, it determines the result. It may name arms that are measured before this one:
    in `rate_of` those of which it takes the best one's rate, in `start` the one whose model it begins from."""
    seeds: int = 1
    """The number of seeds that are measured by default."""

    def needs(self, seed: int) -> list[str]:
        """The keys of the records that must be there before this one is measured."""
        rates, start = getattr(self.settings, "rate_of", ()), getattr(self.settings, "start", None)
        return [*(record_key(name, 0) for name in rates), *([record_key(start, seed)] if start else [])]


@dataclass(frozen=True)
class Context:
    """What a measurement gets besides its settings."""

    device: torch.device
    seed: int
    progress: Callable[[float, float, str], None]
    """Called now and then with the work done, the total work, and a text."""
    saving: Saving | None = None
    """Where the state of an arm that takes long is saved; None: it is not."""
    data: Path | None = None
    """A folder with data that do not belong to the package."""
    finished: Callable[[], Results] | None = None
    """The results so far, for an arm whose settings depend on those of others."""


@dataclass(frozen=True)
class Record:
    """One arm measured with one seed."""

    arm: str
    seed: int
    settings: dict[str, Any]
    values: dict[str, Any]
    seconds: float
    machine: str
    date: str

    @property
    def key(self) -> str:
        """The arm and the seed as one string."""
        return record_key(self.arm, self.seed)


def record_key(arm: str, seed: int) -> str:
    """The key of a record, measured or not."""
    return f"{arm}-seed{seed}"


@dataclass(frozen=True)
class Results:
    """The results of an experiment at a scale, complete or not."""

    experiment: str
    scale: Scale
    records: tuple[Record, ...]
    planned: tuple[str, ...] = ()
    """Keys of all arms and seeds of the run, finished or not."""

    def of(self, arm: str) -> list[Record]:
        """The records of an arm, by seed."""
        return sorted((r for r in self.records if r.arm == arm), key=lambda r: r.seed)

    def values(self, arm: str, name: str) -> list[Any]:
        """One value of an arm for each seed."""
        return [record.values[name] for record in self.of(arm)]

    def mean(self, arm: str, name: str) -> float | None:
        """The mean of a value over the seeds of an arm; None if none is measured."""
        values = self.values(arm, name)
        return sum(values) / len(values) if values else None

    @property
    def arms(self) -> list[str]:
        """Names of the arms that have records, in the order of the plan."""
        return list(dict.fromkeys(record.arm for record in self.records))

    @property
    def planned_arms(self) -> list[str]:
        """Names of all arms of the run."""
        return list(dict.fromkeys(key.rpartition("-seed")[0] for key in self.planned))


Verdict = Literal["holds", "fails", "tie", "not judged"]


@dataclass(frozen=True)
class Threshold:
    """The bounds of a number, set before it was measured, and the measured values."""

    what: str
    got: Sequence[float | None] = ()
    """One number, or one for each seed: all must lie within the bounds. None means not measured."""
    at_least: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    tie: float = -1.0
    """If all numbers are at most this far from 0, the verdict is a tie, and the threshold does not hold."""
    show: Callable[[float], str] = "{:g}".format
    """Formats the numbers for the report."""

    @property
    def measured(self) -> list[float]:
        """The numbers that were measured."""
        return [value for value in self.got if value is not None]

    @property
    def verdict(self) -> Verdict:
        """Whether the numbers lie within the bounds."""
        if not self.measured:
            return "not judged"
        if max(map(abs, self.measured)) <= self.tie:
            return "tie"
        within = (math.isfinite(v) and self.at_least <= v <= self.at_most and v < self.below for v in self.measured)
        return "holds" if all(within) else "fails"

    @property
    def wanted(self) -> str:
        """The bounds in words."""
        bounds = {"at least": self.at_least, "at most": self.at_most, "below": self.below}
        return ", ".join(f"{words} {self.show(bound)}" for words, bound in bounds.items() if math.isfinite(bound))


@dataclass(frozen=True)
class Experiment:
    """One claim: what is measured at each scale and how, the thresholds, and how the results are shown."""

    name: str
    title: str
    protocol: str
    """What is measured and how, in Markdown; it must be true at every scale."""
    arms: Callable[[Scale], Sequence[Arm]]
    """The arms at a scale, in order. Raises ValueError if the experiment does not have that scale."""
    measure: Callable[[Any, Context], dict[str, Any]]
    """Measures an arm once, given its settings. Returns a dictionary that JSON can hold. The same settings and seed
    give the same numbers."""
    thresholds: Callable[[Results], Sequence[Threshold]]
    """The thresholds of the planned arms, with the measured values."""
    sections: Callable[[Results], Mapping[str, str]]
    """The sections of the report that are specific to the experiment, by heading: tables and sentences."""
    figures: Mapping[str, Callable[[Results], Figure | None]]
    """Charts by file name without suffix; a chart is None if nothing that it shows is measured."""
    has_seeds: bool = True
    """Whether another seed gives other numbers. False where arms evaluate models that exist."""
