"""The findings: thresholds, and recall against the number of pairs and the bytes of state."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from anymamba.experiments.associative_recall.arms import (
    MAMBA_BY_STATE,
    SYSTEMS,
    TIME_INVARIANT,
    WITHOUT_ATTENTION,
    Settings,
    arms_at,
)
from anymamba.lab.charts import percent, spread, table
from anymamba.lab.experiment import Record, Results, Threshold
from anymamba.lab.language import task_speeds


@dataclass(frozen=True)
class Point:
    """The results of a system at a width for a number of pairs."""

    system: str
    width: int
    n_pairs: int
    recall: list[float]
    """The recall of each seed."""
    records: list[Record]

    @property
    def mean(self) -> float:
        """The mean recall over the seeds."""
        return sum(self.recall) / len(self.recall)

    @property
    def state_bytes(self) -> int:
        """The bytes of state that the model carries for a sequence."""
        return int(self.records[0].values["state_bytes"])


def points(results: Results) -> list[Point]:
    """The points of every system, width and number of pairs that was tested, in the order of the arms."""
    found = []
    for records in map(results.of, results.arms):
        settings = records[0].settings
        for i, test in enumerate(records[0].values["tests"]):
            recall = [record.values["tests"][i]["tokens"] for record in records]
            found.append(Point(settings["system"], settings["model"]["d_model"], test["n_pairs"], recall, records))
    return found


def widths(results: Results) -> list[int]:
    """The measured widths, in order."""
    return sorted({point.width for point in points(results)})


def pairs(results: Results) -> list[int]:
    """The tested numbers of pairs, in order."""
    return sorted({point.n_pairs for point in points(results)})


def planned(results: Results) -> list[Settings]:
    """The settings of all arms of the scale, measured or not."""
    return [arm.settings for arm in arms_at(results.scale)]


def by_system(results: Results, width: int) -> dict[str, dict[int, Point]]:
    """The points of a width by system and number of pairs; every system has an entry."""
    found: dict[str, dict[int, Point]] = {system: {} for system in SYSTEMS}
    for point in points(results):
        if point.width == width:
            found[point.system][point.n_pairs] = point
    return found


def label(system: str) -> str:
    """The name of a system in tables and charts."""
    return SYSTEMS[system].label


# --------------------------------------------------------------------------------------------------------- thresholds


def thresholds(results: Results) -> list[Threshold]:
    """The thresholds of every planned width, for the worst seeds; the most pairs are those of the plan."""
    settings, found = planned(results), []
    all_widths = sorted({own.model.d_model for own in settings})
    most = max(task.n_pairs for own in settings for task in own.tasks)
    for width in all_widths:
        prefix = f"width {width}: " if len(all_widths) > 1 else ""
        found += [replace(t, what=prefix + t.what) for t in thresholds_at(by_system(results, width), most)]
    return found


def thresholds_at(of: dict[str, dict[int, Point]], most: int) -> list[Threshold]:
    """Attention recalls all, hybrids nearly all, small states and time-invariant layers less; a larger state helps."""
    top = of["attention"]
    worst = min((min(point.recall) for point in top.values()), default=None)
    found = [Threshold("attention: recall at its worst, %", [worst], at_least=0.99, show=percent)]
    found.append(below_attention(of, MAMBA_BY_STATE[0], 0.10, most))
    for hybrid in WITHOUT_ATTENTION:
        gaps = [max(top[n].recall) - min(of[hybrid][n].recall) for n in top if n in of[hybrid]]
        what = f"{label(hybrid)}: recall below attention at its worst, points"
        found.append(Threshold(what, [max(gaps, default=None)], at_most=0.02, show=percent))
    found += [below_attention(of, system, 0.25, most) for system in TIME_INVARIANT]
    return found + state_thresholds(of, most)


def below_attention(of: dict[str, dict[int, Point]], system: str, gap: float, most: int) -> Threshold:
    """How far a system is below attention at the largest number of pairs."""
    both = most in of["attention"] and most in of[system]
    got = [min(of["attention"][most].recall) - max(of[system][most].recall)] if both else []
    what = f"{label(system)}: recall below attention at the most pairs, points"
    return Threshold(what, got, at_least=gap, show=percent)


def state_thresholds(of: dict[str, dict[int, Point]], most: int) -> list[Threshold]:
    """Mamba's recall grows with its state: means over the seeds, at the largest number of pairs."""
    means = [of[system][most].mean for system in MAMBA_BY_STATE if most in of[system]]
    whole = len(means) == len(MAMBA_BY_STATE)
    step = min(b - a for a, b in itertools.pairwise(means)) if whole else None
    gain = means[-1] - means[0] if whole else None
    start = "Mamba, means of the seeds at the most pairs"
    words = "least change from one state to the next larger", "gain of the largest state over the smallest"
    return [
        Threshold(f"{start}: {words[0]}, points", [step], at_least=-0.01, show=percent),
        Threshold(f"{start}: {words[1]}, points", [gain], at_least=0.05, show=percent),
    ]


# ------------------------------------------------------------------------------------------------------------- tables


def sections(results: Results) -> dict[str, str]:
    """The sections of the report: recall at each width, the effect of a larger state and of attention, and speed."""
    tables = {f"Recall, %, width {width}": recall_table(results, width) for width in widths(results)}
    return {**tables, "Differences at the most pairs": differences(results), **task_speeds(results)}


def recall_table(results: Results, width: int) -> str:
    """A table of recall by system and number of pairs, with parameters and bytes of state after a row."""
    asked, n_values = pairs(results), results.records[0].values["tests"][0]["vocab_size"] // 2
    header = ("system", "parameters", "state, bytes", "best rate", "steps", *(f"{n} pairs" for n in asked))
    rows = []
    for system, found in by_system(results, width).items():
        if found:
            values = [record.values for point in found.values() for record in point.records]
            parameters, state, steps = (span(v[key] for v in values) for key in ("parameters", "state_bytes", "steps"))
            rates = ", ".join(f"{rate:g}" for rate in sorted({v["learning_rate"] for v in values}))
            recall = [spread(found[n].recall, scale=100) if n in found else "" for n in asked]
            rows.append([label(system), parameters, state, rates, steps, *recall])
    rows.append(["guesses among the row's values", *[""] * 4, *(percent(1 / n) for n in asked)])
    rows.append(["guesses among all values", *[""] * 4, *(f"{100 / n_values:.2f}" for _ in asked)])
    return table(header, rows)


def span(sizes: Iterable[int]) -> str:
    """The number if all sizes are equal, otherwise the smallest and the largest."""
    least, *more = sorted(set(sizes))
    return f"{least:,} to {more[-1]:,}" if more else f"{least:,}"


def differences(results: Results) -> str:
    """A table of what a larger state, or attention instead of Mamba, changes in the means over the seeds."""
    rows = []
    for width in widths(results):
        of = by_system(results, width)
        for more, less in {MAMBA_BY_STATE[-1]: MAMBA_BY_STATE[0], **WITHOUT_ATTENTION}.items():
            for n in sorted(set(of[more]) & set(of[less]))[-1:]:
                a, b = of[more][n], of[less][n]
                gain = f"{100 * (a.mean - b.mean):+.1f}"
                state = f"{a.state_bytes:,} for {b.state_bytes:,} ({a.state_bytes / b.state_bytes:.1f} times)"
                rows.append([f"{label(more)}, against {label(less)}", f"{width}", f"{n}", gain, state])
    return table(("systems", "width", "pairs", "recall, points", "state, bytes"), rows) if rows else ""
