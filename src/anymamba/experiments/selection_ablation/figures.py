"""Charts of tables 7 and 10, with the paper's numbers."""

from __future__ import annotations

from math import isfinite, log
from typing import TYPE_CHECKING

from anymamba.experiments.selection_ablation.arms import (
    KINDS,
    PAPER_7,
    PAPER_10,
    SELECTIVE,
    STATES,
    TRANSFORMER,
    paper_gap,
)
from anymamba.experiments.selection_ablation.findings import WORDS, loss, losses
from anymamba.lab.charts import new_figure
from anymamba.lab.experiment import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def selection(results: Results) -> Figure:
    """Table 7: accuracy of copying, and how many nats the loss is above that with everything selective."""
    figure = new_figure(width=10.0)
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(SELECTIVE):
        ours = [100 * a for a in results.values(f"copying-{name}", "accuracy")]
        bars(left, i, ours, "C0")
    left.set(ylabel="selective copying, answers that are right, %", ylim=(0, 103), xlabel="selective")
    base = loss(results, "all-n16")
    for i, name in enumerate(SELECTIVE):
        bars(right, i - 0.2, [value - base for value in losses(results, f"{name}-n16")] if isfinite(base) else [], "C0")
    papers = [paper_gap(PAPER_7[name], PAPER_7["all"]) for name in SELECTIVE]
    right.bar([i + 0.2 for i in range(len(papers))], papers, width=0.35, color="C3", alpha=0.6, label="paper, a token")
    right.set(ylabel="nats above Δ, B and C selective", xlabel="selective")
    right.axhline(0, color="gray", linewidth=1)
    for axes in (left, right):
        axes.set_xticks(range(len(SELECTIVE)), [WORDS[name] for name in SELECTIVE])
        if axes.containers:
            axes.legend(fontsize=8)
    return figure


def bars(axes: Axes, x: float, values: list[float], color: str) -> None:
    """A bar of the mean and a dot per seed, without seeds that diverged; only the first bar gets a legend entry."""
    values = [value for value in values if isfinite(value)]
    if values:
        new = not axes.containers
        axes.bar(x, sum(values) / len(values), width=0.35, color=color, alpha=0.6, label="ours" if new else None)
        axes.plot([x] * len(values), values, "k.", label="one seed" if new else None)


def state(results: Results) -> Figure:
    """Table 10: nats against N with constant and selective B and C, ours on the left and the paper's on the right."""
    figure = new_figure(width=10.0)
    left, right = figure.subplots(1, 2)
    for i, (kind, name) in enumerate(KINDS.items()):
        found = {n: value for n in STATES if isfinite(value := loss(results, f"{name}-n{n}"))}
        left.plot(list(found), list(found.values()), "o-", color=f"C{i}", label=f"{kind} B and C")
        for n in found:
            own = losses(results, f"{name}-n{n}")
            left.plot([n] * len(own), own, ".", color=f"C{i}", alpha=0.6)
        theirs = [log(PAPER_10[kind][n]) for n in STATES]
        right.plot(STATES, theirs, "D--", color=f"C{i}", label=f"{kind} B and C")
    transformer = loss(results, TRANSFORMER)
    if isfinite(transformer):
        left.axhline(transformer, color="gray", linestyle="--", label="Transformer++")
    left.set(title="here", ylabel="held-out nats a byte")
    right.set(title="paper (350M, the Pile)", ylabel="nats a token")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlim(STATES[0] / 1.3, STATES[-1] * 1.3)  # the same limits if nothing is measured
        axes.set_xticks(STATES, [str(n) for n in STATES])
        axes.set_xlabel("N, states per channel")
        axes.legend(fontsize=8)
    return figure
