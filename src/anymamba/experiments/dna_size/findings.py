"""The findings: how far Mamba is ahead at each size, the rates, and the speed of every arm."""

from __future__ import annotations

from math import isfinite, log

from anymamba.experiments.dna_size.arms import ARCHITECTURES, BASES, sweep, sweep_again
from anymamba.lab.charts import signed, spread, table
from anymamba.lab.experiment import Results, Threshold
from anymamba.lab.genome_models import WORDS, measured_rates, paired, rate_table, speed_table
from anymamba.lab.language import gap, loss, losses

LEAST_AHEAD = 0.005
"""Nats a base by which Mamba must be ahead of each other architecture at every size."""
PAPER = {
    "250k": {"hyena": 3.112, "transformer": 3.157, "mamba": 3.075},
    "700k": {"hyena": 3.017, "transformer": 3.054, "mamba": 2.991},
    "1400k": {"hyena": 2.959, "transformer": 2.980, "mamba": 2.925},
    "3500k": {"hyena": 2.900, "transformer": 2.900, "mamba": 2.853},
    "7000k": {"hyena": 2.851, "transformer": 2.846, "mamba": 2.803},
    "19300k": {"hyena": 2.798, "transformer": 2.789, "mamba": 2.742},
    "40700k": {"hyena": 2.782, "transformer": 2.760, "mamba": 2.706},
}
"""Perplexities on the human genome after 10 billion bases, read off the paper's figure."""


def best_arm(results: Results, name: str) -> str | None:
    """The arm of the best rate of an architecture at the smallest size; None until all rates are measured."""
    base = BASES[results.scale]
    tried = sweep(base, name)
    return min(tried, key=lambda arm: loss(results, [arm])) if all(map(results.of, tried)) else None


def arms_of(results: Results, name: str, index: int) -> list[str]:
    """The arms of an architecture at the size with that index and the best rate."""
    own = f"{name}-{BASES[results.scale].sizes[index].name}"
    best = best_arm(results, name) if index == 0 else None
    return [own] if index else ([best, own] if best else [])


def gaps(results: Results, name: str) -> list[float | None]:
    """How far an architecture is above Mamba at each size, in nats a base."""
    sizes = range(len(BASES[results.scale].sizes))
    return [gap(results, arms_of(results, name, i), arms_of(results, "mamba", i)) for i in sizes]


def thresholds(results: Results) -> list[Threshold]:
    """Mamba has the lowest loss at every size."""
    return [
        Threshold(
            f"{WORDS[name]} minus Mamba at each size, nats a base",
            gaps(results, name),
            at_least=LEAST_AHEAD,
            show=lambda value: signed(value, 4),
        )
        for name in ARCHITECTURES[1:]
    ]


def sections(results: Results) -> dict[str, str]:
    """The sections of the report."""
    base = BASES[results.scale]
    sweeps = {name: sweep(base, name) for name in ARCHITECTURES}
    return {
        "Loss by size": loss_table(results),
        "Rates": rate_table(results, sweeps, f"At the size {base.sizes[0].name}; all sizes have the best one."),
        "Rates at the largest size": again_table(results),
        "With more bases": longer_table(results),
        "Speed": speed_table(results),
    }


def loss_table(results: Results) -> str:
    """Nats a base of each architecture at each size, the gaps to Mamba, and the paper's."""
    header = ["size", *(WORDS[name] for name in ARCHITECTURES)]
    header += [f"{WORDS[name]} minus Mamba" for name in ARCHITECTURES[1:]]
    header += [f"{WORDS[name]} minus Mamba, paper" for name in ARCHITECTURES[1:]]
    rows = []
    for i, size in enumerate(BASES[results.scale].sizes):
        own = [spread(losses(results, arms_of(results, name, i)), 4) for name in ARCHITECTURES]
        differences = [with_error(results, name, i) for name in ARCHITECTURES[1:]]
        theirs = PAPER.get(size.name)
        paper = [signed(log(theirs[name] / theirs["mamba"])) if theirs else "" for name in ARCHITECTURES[1:]]
        if any(own):
            rows.append([size.name, *own, *differences, *paper])
    words = (
        "In nats a base; in brackets the seeds. ±: the standard error of the difference over the held-out blocks, "
        "which says nothing of other seeds. The paper's models read another genome, and 150 times as many bases."
    )
    return f"{table(header, rows)}\n\n{words}" if rows else ""


def again_table(results: Results) -> str:
    """The loss of the largest size at other rates than the best one of the smallest."""
    base = BASES[results.scale]
    size, sweeps = base.sizes[-1].name, {}
    for name in base.again:
        if any(map(results.of, sweep_again(base, name))):
            sweeps[name] = measured_rates(results, [f"{name}-{size}"]) | sweep_again(base, name)
    return rate_table(results, sweeps, f"At the size {size}, the first one as in the tables above.")


def longer_table(results: Results) -> str:
    """How far the others are above Mamba at the largest size, with the usual bases and with more."""
    base = BASES[results.scale]
    size, rows = base.sizes[-1].name, []
    for words, end in (("as above", ""), (f"{base.longer} times as many", "-longer")):
        arms = {name: f"{name}-{size}{end}" for name in base.again}
        own = [spread(losses(results, [arm]), 4) for arm in arms.values()]
        found = [paired(results, [arms[name]], [arms["mamba"]]) for name in arms if name != "mamba"]
        rows.append([words, *own, *(f"{signed(f[0], 4)} ± {f[1]:.4f}" if f else "" for f in found)])
    others = [f"{WORDS[name]} minus Mamba" for name in base.again if name != "mamba"]
    header = ["bases", *(WORDS[name] for name in base.again), *others]
    return f"{table(header, rows)}\n\nAt the size {size}, in nats a base." if rows and all(rows[-1][1:]) else ""


def with_error(results: Results, name: str, index: int) -> str:
    """The gap to Mamba at a size, with its error over the held-out blocks."""
    found = paired(results, arms_of(results, name, index), arms_of(results, "mamba", index))
    return f"{signed(found[0], 4)} ± {found[1]:.4f}" if found else ""


def points(results: Results, name: str) -> list[tuple[int, float]]:
    """Parameters and mean loss of an architecture at each size that is measured."""
    found = []
    for index in range(len(BASES[results.scale].sizes)):
        arms = arms_of(results, name, index)
        records = [record for arm in arms for record in results.of(arm)]
        if records and isfinite(value := loss(results, arms)):
            found.append((records[0].values["parameters"], value))
    return found
