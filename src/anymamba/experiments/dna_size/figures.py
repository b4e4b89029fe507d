"""The chart of the loss against parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anymamba.experiments.dna_size.arms import ARCHITECTURES
from anymamba.experiments.dna_size.findings import points
from anymamba.lab.charts import new_figure
from anymamba.lab.experiment import Results
from anymamba.lab.genome_models import WORDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def size(results: Results) -> Figure | None:
    """Loss against parameters for each architecture; None if nothing is measured."""
    found = {name: points(results, name) for name in ARCHITECTURES}
    if not any(found.values()):
        return None
    figure = new_figure()
    axes = figure.subplots()
    for name, own in found.items():
        axes.plot([x for x, _ in own], [y for _, y in own], "o-", label=WORDS[name])
    axes.set(xscale="log", xlabel="parameters", ylabel="held-out nats a base")
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(fontsize=8)
    return figure
