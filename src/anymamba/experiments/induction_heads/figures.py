"""Charts: accuracy against the length, beside the paper's, and how the arms learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anymamba.experiments.charts import new_figure
from anymamba.experiments.induction_heads.arms import PAPER, PAPER_FIRST
from anymamba.experiments.induction_heads.report import accuracies, chance, label, system_of
from anymamba.experiments.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figures(results: Results) -> dict[str, Figure]:
    """`lengths` and `learning`; nothing where nothing is measured."""
    return {"lengths": lengths(results), "learning": learning(results)} if results.records else {}


def lengths(results: Results) -> Figure:
    """Accuracy at each length: a line for each seed, a colour for each arm; the paper's dotted in the same colour."""
    figure = new_figure(width=8.0)
    axes = figure.subplots()
    published = set()
    for i, arm in enumerate(results.arms):
        for j, record in enumerate(results.of(arm)):
            found = accuracies(record)
            values = [100 * a for a in found.values()]
            axes.plot(list(found), values, "o-", color=f"C{i}", markersize=3, label=label(arm) if j == 0 else None)
        system = system_of(results, arm)
        if system not in published:
            paper = PAPER[system].accuracy
            places = [1 << (PAPER_FIRST + n) for n in range(len(paper))]
            axes.plot(places, paper, "x:", color=f"C{i}", alpha=0.6, label=f"paper: {PAPER[system].label}")
            published.add(system)
    trained = results.records[0].settings["train_length"]
    axes.axvline(trained, color="gray", linewidth=1, label=f"training length {trained}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("length of the test sequences")
    finish(axes, results)
    return figure


def learning(results: Results) -> Figure:
    """Accuracy on the validation set against the step."""
    figure = new_figure(width=8.0)
    axes = figure.subplots()
    for i, arm in enumerate(results.arms):
        for j, curve in enumerate(results.values(arm, "curve")):
            steps, values = [point[0] for point in curve], [100 * point[2] for point in curve]
            axes.plot(steps, values, color=f"C{i}", linewidth=1.2, label=label(arm) if j == 0 else None)
    axes.set_xscale("log")
    axes.set_xlabel("step")
    finish(axes, results)
    return figure


def finish(axes: Axes, results: Results) -> None:
    """Chance, label and legend."""
    axes.axhline(100 * chance(results), color="gray", linestyle=":", linewidth=1, label="guesses")
    axes.set_ylabel("sequences that are right, %")
    axes.set_ylim(0, 103)
    axes.legend(fontsize=7)
