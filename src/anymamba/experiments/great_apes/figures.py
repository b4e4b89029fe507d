"""The chart of the accuracy against the length of the window."""

from __future__ import annotations

from math import log2
from typing import TYPE_CHECKING

from anymamba.experiments.great_apes.arms import BASES
from anymamba.experiments.great_apes.findings import CHANCE, WORDS, accuracy, arm_of
from anymamba.lab.charts import new_figure
from anymamba.lab.experiment import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def lengths(results: Results) -> Figure | None:
    """Accuracy with intervals, and that of the longest windows after part of them; None if nothing is measured."""
    base = BASES[results.scale]
    found = {
        name: {length: one for length in base.lengths if (one := accuracy(results, name, length))} for name in WORDS
    }
    if not any(found.values()):
        return None
    figure = new_figure()
    axes = figure.subplots()
    for name, own in found.items():
        ys = [100 * one.mean for one in own.values()]
        errors = [[100 * (a.mean - a.low) for a in own.values()], [100 * (a.high - a.mean) for a in own.values()]]
        if own:
            axes.errorbar([log2(length) for length in own], ys, errors, fmt="o-", capsize=3, label=WORDS[name])
    longest = arm_of(results, "mamba", base.lengths[-1])
    for record in results.of(longest)[:1] if longest else []:
        after = record.values["by_context"]
        xs = [log2(base.asked * (i + 1)) for i in range(len(after))]
        axes.plot(xs, [100 * share for share in after], ".", color="gray", label="Mamba, part of the longest windows")
    axes.axhline(100 * CHANCE, color="gray", linewidth=1, linestyle="--")
    axes.set_xticks([log2(length) for length in base.lengths], [f"{length:,}" for length in base.lengths])
    axes.set(xlabel="bases", ylabel="right answers, %")
    axes.grid(True, linewidth=0.3)
    axes.legend(fontsize=8)
    return figure
