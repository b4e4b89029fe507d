"""Charts: how far every arm is above Mamba, and the loss against the states a channel."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

from anymamba.experiments.language_ablations.arms import MAMBA, STATE, STATES, arm_of_state, is_in_tables
from anymamba.experiments.language_ablations.findings import between
from anymamba.lab.charts import new_figure
from anymamba.lab.experiment import Results
from anymamba.lab.language import loss, losses

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def gaps(results: Results) -> Figure | None:
    """Nats above Mamba of the arms of the tables, largest at the bottom; None if there is nothing to compare."""
    arms = [arm for arm in results.arms if arm != MAMBA and is_in_tables(arm)]
    found = {arm: value for arm in arms if (value := between(results, arm, MAMBA)) is not None}
    if not found:
        return None
    ordered = sorted(found, key=lambda arm: found[arm])
    figure = new_figure(height=1.2 + 0.22 * len(ordered))
    axes = figure.subplots()
    axes.barh(ordered, [found[arm] for arm in ordered], color="C0", alpha=0.7)
    axes.invert_yaxis()
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_xlabel("held-out nats a byte above Mamba")
    axes.tick_params(labelsize=8)
    return figure


def state(results: Results) -> Figure | None:
    """Loss against N with constant and selective B and C; None if none is measured."""
    found = {
        kind: {n: value for n in STATES if isfinite(value := loss(results, [arm_of_state(kind, n)]))} for kind in STATE
    }
    if not any(found.values()):
        return None
    figure = new_figure()
    axes = figure.subplots()
    for i, (kind, own) in enumerate(found.items()):
        axes.plot(list(own), list(own.values()), "o-", color=f"C{i}", label=f"{kind} B and C")
        for n in own:
            seeds = losses(results, [arm_of_state(kind, n)])
            axes.plot([n] * len(seeds), seeds, ".", color=f"C{i}", alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_xticks(STATES, [str(n) for n in STATES])
    axes.set(xlabel="N, states a channel", ylabel="held-out nats a byte")
    axes.grid(True, linewidth=0.3)
    axes.legend(fontsize=8)
    return figure
