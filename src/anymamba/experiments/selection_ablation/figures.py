"""The chart of table 7 on selective copying."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anymamba.experiments.selection_ablation.arms import SELECTIVE
from anymamba.experiments.selection_ablation.findings import WORDS
from anymamba.lab.charts import new_figure
from anymamba.lab.experiment import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def selection(results: Results) -> Figure:
    """The accuracy by what is selective: a bar of the mean and a dot for each seed."""
    figure = new_figure()
    axes = figure.subplots()
    for i, name in enumerate(SELECTIVE):
        values = [100 * accuracy for accuracy in results.values(f"copying-{name}", "accuracy")]
        if values:
            axes.bar(i, sum(values) / len(values), width=0.5, color="C0", alpha=0.6)
            axes.plot([i] * len(values), values, "k.")
    axes.set(ylabel="answers that are right, %", ylim=(0, 103), xlabel="selective")
    axes.set_xticks(range(len(SELECTIVE)), [WORDS[name] for name in SELECTIVE])
    return figure
