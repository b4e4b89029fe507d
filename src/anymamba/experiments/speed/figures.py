"""Charts, all log-log: times of the operators, ratios to the scan with the paper's, times of the models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anymamba.experiments.speed.arms import MODELS, OPERATORS, PASSES
from anymamba.experiments.speed.findings import (
    MODEL_WORDS,
    OTHERS,
    PASS_WORDS,
    SCAN,
    WORDS,
    paper_ratios,
    paper_times,
)
from anymamba.experiments.speed.reading import Series, medians, ratios, records_by_size, seconds
from anymamba.lab.charts import new_figure
from anymamba.lab.experiment import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def operator_times(results: Results) -> Figure | None:
    """Milliseconds against the length; the paper's times are dashed."""
    if not records_by_size(results, "operators"):
        return None
    figure = new_figure()
    axes = figure.subplots()
    for i, name in enumerate(OPERATORS):
        times, paper = seconds(results, Series("operators", name)), paper_times(name)
        axes.plot(list(times), [1e3 * t for t in times.values()], "o-", color=f"C{i}", label=WORDS[name])
        label = "paper (A100, 1,024 channels)" if name == "scan" else None
        axes.plot(list(paper), list(paper.values()), "--", color=f"C{i}", linewidth=0.8, label=label)
    finish(axes, "length", "ms, forward")
    return figure


def operator_ratios(results: Results) -> Figure | None:
    """The time of each other operator divided by that of the scan; above 1 the scan is faster."""
    if not records_by_size(results, "operators"):
        return None
    figure = new_figure()
    axes = figure.subplots()
    for i, name in enumerate(OTHERS):
        ours, paper = medians(ratios(results, Series("operators", name), SCAN)), paper_ratios(name)
        axes.plot(list(ours), list(ours.values()), "o-", color=f"C{i}", label=WORDS[name])
        axes.plot(list(paper), list(paper.values()), "--", color=f"C{i}", linewidth=0.8, label=f"{WORDS[name]}, paper")
    axes.axhline(1, color="gray", linewidth=1)
    finish(axes, "length", "time over that of the scan")
    return figure


def model_times(results: Results) -> Figure | None:
    """Milliseconds of each pass against the context."""
    if not records_by_size(results, "models"):
        return None
    figure = new_figure(width=11.0, height=3.8)
    for axes, name in zip(figure.subplots(1, len(PASSES)), PASSES, strict=True):
        for i, model in enumerate(MODELS):
            times = seconds(results, Series("models", model, name))
            axes.plot(list(times), [1e3 * t for t in times.values()], "o-", color=f"C{i}", label=MODEL_WORDS[model])
        axes.set_title(PASS_WORDS[name], fontsize=10)
        finish(axes, "context", "ms")
    return figure


def finish(axes: Axes, x: str, y: str) -> None:
    """Set logarithmic axes, and add labels, grid and legend."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, linewidth=0.3)
    axes.legend(fontsize=8)
