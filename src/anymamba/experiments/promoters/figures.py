"""The chart of the scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anymamba.evaluation.dna.metrics import METRICS
from anymamba.experiments.promoters.arms import ARCHITECTURES
from anymamba.experiments.promoters.findings import METRIC_WORDS, WORDS, scores
from anymamba.lab.charts import new_figure
from anymamba.lab.experiment import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def quality(results: Results) -> Figure | None:
    """Each metric of each model, a point for each seed; None if nothing is measured."""
    if not any(scores(results, name, "accuracy") for name in ARCHITECTURES):
        return None
    figure = new_figure()
    for i, (axes, metric) in enumerate(zip(figure.subplots(1, len(METRICS)), METRICS, strict=True)):
        for k, name in enumerate(ARCHITECTURES):
            own = scores(results, name, metric)
            axes.plot([k] * len(own), own, "o", color=f"C{k}", alpha=0.7)
        axes.set_xticks(range(len(ARCHITECTURES)), [WORDS[name] for name in ARCHITECTURES])
        axes.set(
            title=METRIC_WORDS[metric], ylabel="" if i else "test sequences", xlim=(-0.5, len(ARCHITECTURES) - 0.5)
        )
        axes.grid(True, linewidth=0.3)
    return figure
