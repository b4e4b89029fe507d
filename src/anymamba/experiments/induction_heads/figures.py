"""Charts: accuracy against the length, with the paper's, and the learning curves of the arms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anymamba.experiments.induction_heads.arms import PAPER, PAPER_FIRST
from anymamba.experiments.induction_heads.findings import accuracies, label, system_of
from anymamba.lab.charts import new_figure, plot_learning
from anymamba.lab.experiment import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def lengths(results: Results) -> Figure:
    """Accuracy at each length: a line per seed, a colour per arm, and the paper's numbers dotted in the same colour."""
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
    plot_learning(axes, results, label)
    axes.set_xscale("log")
    finish(axes, results)
    return figure


def finish(axes: Axes, results: Results) -> None:
    """Add the line of guesses, the axis label and the legend."""
    chance = 100 / results.records[0].settings["n_tokens"]
    axes.axhline(chance, color="gray", linestyle=":", linewidth=1, label="guesses")
    axes.set_ylabel("sequences that are right, %")
    axes.set_ylim(0, 103)
    axes.legend(fontsize=7)
