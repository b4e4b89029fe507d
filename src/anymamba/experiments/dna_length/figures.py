"""The chart of the loss against the length."""

from __future__ import annotations

from math import log2
from typing import TYPE_CHECKING

from anymamba.experiments.dna_length.arms import ARCHITECTURES, BASES
from anymamba.experiments.dna_length.findings import arm_of, paired, points, power
from anymamba.lab.charts import new_figure
from anymamba.lab.experiment import Results
from anymamba.lab.genome_models import WORDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def length(results: Results) -> Figure | None:
    """The change of the loss from the shortest length, with twice its standard error; None if nothing is measured."""
    first = BASES[results.scale].lengths[0]
    found = {name: own for name in ARCHITECTURES if (own := points(results, name)) and own[0][0] == first}
    if not found:
        return None
    figure = new_figure()
    axes = figure.subplots()
    for name, own in found.items():
        shortest = arm_of(results, name, first) or ""
        pairs = [paired(results, [arm_of(results, name, n) or ""], [shortest]) for n, _ in own]
        errors = [2 * pair[1] if pair else 0.0 for pair in pairs]
        axes.errorbar([log2(n) for n, _ in own], [y - own[0][1] for _, y in own], errors, fmt="o-", label=WORDS[name])
    lengths = BASES[results.scale].lengths
    axes.set_xticks([log2(n) for n in lengths], [power(n) for n in lengths])
    axes.set(xlabel="bases of a row", ylabel="nats a base above the shortest row")
    axes.grid(True, linewidth=0.3)
    axes.legend(fontsize=8)
    return figure
