"""Charts: the accuracy of the cells with the paper's, and their learning curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anymamba.data.synthetic.copying import guess_accuracy, histogram_accuracy
from anymamba.experiments.selective_copying.arms import CELL
from anymamba.experiments.selective_copying.findings import label, task_of
from anymamba.lab.charts import new_figure, plot_learning
from anymamba.lab.experiment import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    """Accuracy on the validation set against the step; plain copying is dashed."""
    figure = new_figure(width=8.0)
    axes = figure.subplots()
    plot_learning(axes, results, label, dashed=[arm for arm in results.arms if arm.startswith("plain-")])
    finish(axes, results)
    return figure


def finish(axes: Axes, results: Results) -> None:
    """Add the baselines, the axis label and the legend."""
    task = task_of(results)
    guess, histogram = guess_accuracy(task), histogram_accuracy(task)
    axes.axhline(100 * histogram, color="gray", linestyle="--", linewidth=1, label="knows the histogram, not the order")
    axes.axhline(100 * guess, color="gray", linestyle=":", linewidth=1, label="guesses")
    axes.set_ylabel("answers that are right, %")
    axes.legend(fontsize=7)
