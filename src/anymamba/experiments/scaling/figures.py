"""Charts of the loss against parameters and against operations, log-log, with the fitted laws."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anymamba.experiments.scaling.arms import ARCHITECTURES
from anymamba.experiments.scaling.findings import WORDS, fitted, points
from anymamba.lab.charts import new_figure
from anymamba.lab.experiment import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def against_parameters(results: Results) -> Figure | None:
    """Loss against parameters."""
    return chart(results, "parameters", "parameters")


def against_operations(results: Results) -> Figure | None:
    """Loss against the operations of the whole training."""
    return chart(results, "operations", "operations of the training")


def chart(results: Results, of: str, words: str) -> Figure | None:
    """The points of each architecture and its law; None if nothing is measured."""
    found = {name: points(results, name, of) for name in ARCHITECTURES}
    if not any(found.values()):
        return None
    figure = new_figure()
    axes = figure.subplots()
    for i, (name, own) in enumerate(found.items()):
        xs, law = [x for x, _ in own], fitted(own)
        axes.plot(xs, [y for _, y in own], "o", color=f"C{i}", label=WORDS[name])
        if law is not None:
            axes.plot(xs, [law(x) for x in xs], "-", color=f"C{i}", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel=words, ylabel="held-out nats a byte")
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(fontsize=8)
    return figure
