"""A chart of our accuracies beside a guess and the paper's smallest models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anymamba.lab.charts import new_figure
from anymamba.lab.experiment import Results
from anymamba.lab.zero_shot import PAPER, TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("Pythia-160M", "Mamba-130M")


def accuracy(results: Results) -> Figure | None:
    """Accuracy by task; None if nothing is measured."""
    if not results.records:
        return None
    figure = new_figure(width=9.0)
    axes = figure.subplots()
    places = range(len(TASKS))
    for i, record in enumerate(results.records):
        heights = [record.values["scores"].get(name, 0.0) for name in TASKS]
        axes.bar([x + 0.15 * i for x in places], heights, width=0.14, label=record.arm)
    for i, name in enumerate(SHOWN):
        axes.plot(list(places), PAPER[name][1:], "D", color=f"C{8 + i}", label=f"{name}, paper")
    axes.plot(list(places), [task.chance for task in TASKS.values()], "k_", markersize=20, label="a guess")
    axes.set_xticks(list(places), [task.words for task in TASKS.values()])
    axes.set_ylabel("accuracy, %")
    axes.legend(fontsize=8)
    return figure
