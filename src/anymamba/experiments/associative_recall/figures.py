"""Charts: recall against the bytes of state, and against the number of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anymamba.experiments.associative_recall.arms import SYSTEMS
from anymamba.experiments.associative_recall.findings import by_system, label, pairs, points, widths
from anymamba.lab.charts import new_figure
from anymamba.lab.experiment import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = "osD^vP*X<"
COLORS = {system: f"C{i}" for i, system in enumerate(SYSTEMS)}


def against_state(results: Results) -> Figure:
    """Recall against the bytes of state: a panel for each number of pairs, a mark for each system and width."""
    asked = pairs(results)
    figure = new_figure(width=3.2 * len(asked) + 1, height=4.8)
    row = figure.subplots(1, len(asked), sharey=True, squeeze=False)[0]
    for axes, n in zip(row, asked, strict=True):
        for point in (p for p in points(results) if p.n_pairs == n):
            mark = MARKS[list(SYSTEMS).index(point.system) % len(MARKS)]
            axes.plot(
                [point.state_bytes] * len(point.recall),
                [100 * r for r in point.recall],
                mark,
                color=COLORS[point.system],
                linestyle="none",
                alpha=0.8,
                label=label(point.system) if point.width == widths(results)[0] else None,
            )
        axes.axhline(100 / n, color="gray", linestyle="--", linewidth=1, label="guesses among the row's values")
        axes.set(xscale="log", xlabel="bytes of state", title=f"{n} pairs", ylim=(-3, 103))
        axes.tick_params(axis="x", which="minor", labelbottom=False)
    row[0].set_ylabel("answers that are right, %")
    figure.legend(*row[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure


def against_pairs(results: Results) -> Figure:
    """Recall against the number of pairs: a panel for each width, a line for each system."""
    found, asked = widths(results), pairs(results)
    figure = new_figure(width=4.2 * len(found) + 2.5, height=4.8)
    row = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, width in zip(row, found, strict=True):
        for i, (system, own) in enumerate(by_system(results, width).items()):
            if own:
                values = [100 * own[n].mean for n in sorted(own)]
                style = {"marker": MARKS[i % len(MARKS)], "color": COLORS[system], "label": label(system)}
                axes.plot(sorted(own), values, alpha=0.8, **style)
        axes.plot(asked, [100 / n for n in asked], "--", color="gray", label="guesses among the row's values")
        axes.set_xscale("log", base=2)
        axes.set_xticks(asked, [str(n) for n in asked])
        axes.set(xlabel="pairs to remember", title=f"width {width}", ylim=(-3, 103))
    row[0].set_ylabel("answers that are right, %")
    row[-1].legend(fontsize=7)
    return figure
