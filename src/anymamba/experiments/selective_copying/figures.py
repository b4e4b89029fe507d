"""Charts: the cells beside the paper's, and how they learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anymamba.experiments.charts import new_figure
from anymamba.experiments.experiment import Results
from anymamba.experiments.selective_copying.arms import CELL
from anymamba.experiments.selective_copying.report import baselines, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figures(results: Results) -> dict[str, Figure]:
    """`accuracy` and `learning`; nothing where nothing is measured."""
    return {"accuracy": accuracy(results), "learning": learning(results)} if results.records else {}


def accuracy(results: Results) -> Figure:
    """A bar for each arm, a dot for each seed, a diamond for the paper's number."""
    figure = new_figure(width=8.0)
    axes = figure.subplots()
    for i, arm in enumerate(results.arms):
        ours = [100 * a for a in results.values(arm, "accuracy")]
        axes.bar(i, sum(ours) / len(ours), color=f"C{0 if 's6' in arm or arm == 'mamba' else 1}", alpha=0.6)
        axes.plot([i] * len(ours), ours, "k.", label="one seed" if i == 0 else None)
    papers = {i: 100 * CELL[arm].paper for i, arm in enumerate(results.arms) if arm in CELL}
    if papers:
        axes.plot(list(papers), list(papers.values()), "D", color="C3", label="paper (noise 4096, 400,000 steps)")
    axes.set_xticks(range(len(results.arms)), [label(arm).replace(": ", ":\n") for arm in results.arms], fontsize=8)
    finish(axes, results)
    axes.set_ylim(0, 103)
    return figure


def learning(results: Results) -> Figure:
    """Accuracy on the validation set against the step: a line for each seed, a colour for each arm."""
    figure = new_figure(width=8.0)
    axes = figure.subplots()
    for i, arm in enumerate(results.arms):
        for j, curve in enumerate(results.values(arm, "curve")):
            steps, values = [point[0] for point in curve], [100 * point[2] for point in curve]
            style = "--" if arm.startswith("plain-") else "-"
            axes.plot(steps, values, style, color=f"C{i}", linewidth=1.2, label=label(arm) if j == 0 else None)
    axes.set_xlabel("step")
    finish(axes, results)
    return figure


def finish(axes: Axes, results: Results) -> None:
    """Baselines, label and legend."""
    guess, histogram = baselines(results)
    axes.axhline(100 * histogram, color="gray", linestyle="--", linewidth=1, label="knows the histogram, not the order")
    axes.axhline(100 * guess, color="gray", linestyle=":", linewidth=1, label="guesses")
    axes.set_ylabel("answers that are right, %")
    axes.legend(fontsize=7)
