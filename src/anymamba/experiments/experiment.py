"""What an experiment is: arms that are measured one by one, and a report of what came out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

Scale = Literal["toy", "cpu", "gpu", "paper"]
"""toy: seconds, for tests. cpu: an hour a seed on two cores. gpu: one accelerator. paper: as published."""
SCALES: tuple[Scale, ...] = ("toy", "cpu", "gpu", "paper")


@dataclass(frozen=True)
class Arm:
    """One thing that is measured."""

    name: str
    """Unique in its experiment; letters, digits and hyphens."""
    settings: Any
    """A frozen dataclass that decides, with the seed, what comes out."""
    seeds: int = 1
    """How often it is measured unless the caller says otherwise."""


@dataclass(frozen=True)
class Context:
    """What a measurement may use."""

    device: torch.device
    seed: int
    progress: Callable[[float, float, str], None]
    """Told now and then: how much is done, of how much, and words."""


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
        """Its file's name without suffix."""
        return f"{self.arm}-seed{self.seed}"


@dataclass(frozen=True)
class Results:
    """What an experiment has measured at a scale, complete or not."""

    experiment: str
    scale: Scale
    records: tuple[Record, ...]
    planned: tuple[str, ...] = field(default=())
    """Keys of all arms and seeds of the run, finished or not."""

    def of(self, arm: str) -> list[Record]:
        """The records of an arm, by seed."""
        return sorted((r for r in self.records if r.arm == arm), key=lambda r: r.seed)

    def values(self, arm: str, name: str) -> list[Any]:
        """One value of an arm for each seed."""
        return [record.values[name] for record in self.of(arm)]

    @property
    def arms(self) -> list[str]:
        """Names of the arms that have records, in the order of the plan."""
        return list(dict.fromkeys(record.arm for record in self.records))


class Experiment(ABC):
    """One claim: its arms at each scale, how one is measured, and how the results are shown."""

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def arms(self, scale: Scale) -> Sequence[Arm]:
        """What is measured at a scale, in order.

        Raises ValueError where the experiment has no such scale.
        """

    @abstractmethod
    def measure(self, arm: Arm, context: Context) -> dict[str, Any]:
        """Measure one arm once: a JSON-able dictionary. The same settings and seed give the same numbers."""

    @abstractmethod
    def figures(self, results: Results) -> dict[str, Figure]:
        """Charts by file name without suffix."""

    @abstractmethod
    def report(self, results: Results) -> str:
        """The Markdown between the title and the table of machine and time: our numbers beside the paper's, thresholds
        that were set before, and where we fall short."""
