"""The findings: accuracy by length with intervals over loci, the baseline, and what is taken for what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import nextafter

import numpy as np

from anymamba.experiments.great_apes.arms import BASES, PRETRAINED, Base, sweep
from anymamba.experiments.great_apes.genomes import SPECIES
from anymamba.lab.charts import percent, signed, table
from anymamba.lab.experiment import Results, Scale, Threshold
from anymamba.lab.genome_models import speed_table
from anymamba.lab.language import loss

CHANCE = 1 / len(SPECIES)
JUDGED_FROM: dict[Scale, int] = {"toy": 64, "cpu": 1 << 12, "gpu": 1 << 14, "paper": 1 << 14}
"""From this length on the lower bound must be above chance."""
LEAST_GAIN = 0.10
"""By which the accuracy at the longest length must be above that at the shortest."""
RESAMPLES = 10_000
PAPER = {1 << 10: 31.47, 1 << 12: 27.50, 1 << 14: 27.66, 1 << 16: 40.72, 1 << 18: 42.41, 1 << 20: 71.67}
"""Accuracy of the paper's Mamba of 1.4 million parameters in percent: five species, a guess is right in 20 %."""
WORDS = {"mamba": "Mamba", "sixmers": "6-mers"}


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers, and a 95 % interval over loci."""

    mean: float
    low: float
    high: float


def arm_of(results: Results, name: str, length: int) -> str | None:
    """The arm of a model at a length; None if the best rate is not known yet."""
    base = BASES[results.scale]
    if name != "mamba" or length != base.swept:
        return f"{name}-{length}"
    tried = tuple(sweep(base))
    return min(tried, key=lambda arm: loss(results, [arm])) if all(map(results.of, tried)) else None


def per_locus(results: Results, name: str, length: int) -> tuple[tuple[float, float], ...] | None:
    """Right answers and answers of each locus, sums over seeds; None if the arm is not measured."""
    arm = arm_of(results, name, length)
    seeds = results.values(arm, "loci") if arm else []
    if not seeds:
        return None
    return tuple((float(right), float(n)) for right, n in np.sum(np.array(seeds), 0))


def accuracy(results: Results, name: str, length: int) -> Accuracy | None:
    """The accuracy of a model at a length; None if it is not measured."""
    found = per_locus(results, name, length)
    return None if found is None else bootstrapped(found)


def gained(results: Results, name: str) -> Accuracy | None:
    """How far the accuracy at the longest length is above that at the shortest, over the same loci."""
    lengths = BASES[results.scale].lengths
    ends = [per_locus(results, name, length) for length in (lengths[0], lengths[-1])]
    return None if ends[0] is None or ends[1] is None else bootstrapped(ends[1], ends[0])


@cache
def bootstrapped(loci: tuple[tuple[float, float], ...], minus: tuple[tuple[float, float], ...] = ()) -> Accuracy:
    """The accuracy over loci, or its difference from that of others over the same loci, with a percentile interval."""
    drawn = np.random.default_rng(0).integers(0, len(loci), (RESAMPLES, len(loci)))

    def shares(some: tuple[tuple[float, float], ...]) -> tuple[float, np.ndarray]:
        counts = np.array(some)
        total, resampled = counts.sum(0), counts[drawn].sum(1)
        return total[0] / total[1], resampled[:, 0] / resampled[:, 1]

    mean, resampled = shares(loci)
    if minus:
        other, others = shares(minus)
        mean, resampled = mean - other, resampled - others
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Accuracy(float(mean), float(low), float(high))


def thresholds(results: Results) -> list[Threshold]:
    """Long windows tell the species, and better than short ones."""
    base = BASES[results.scale]
    judged = [length for length in base.lengths if length >= JUDGED_FROM[results.scale]]
    found = [accuracy(results, "mamba", length) for length in judged]
    gain = gained(results, "mamba")
    return [
        Threshold(
            f"lower end of the interval from {judged[0]:,} bases on, % (wanted: above a guess)",
            [one.low if one else None for one in found],
            at_least=nextafter(CHANCE, 1),
            show=percent,
        ),
        Threshold(
            f"accuracy at {base.lengths[-1]:,} bases minus that at {base.lengths[0]:,}, points",
            [gain.mean if gain else None],
            at_least=LEAST_GAIN,
            show=points,
        ),
    ]


def points(value: float) -> str:
    """A difference of shares in percent."""
    return signed(100 * value, 1)


def sections(results: Results) -> dict[str, str]:
    """The sections of the report."""
    base = BASES[results.scale]
    trained = [PRETRAINED, *(arm for arm in results.arms if arm.startswith("mamba"))]
    return {
        "Accuracy by length": accuracy_table(results, base),
        "What is taken for what": confusion_table(results, base),
        "Rates": rate_table(results, base),
        "Speed": speed_table(results, trained),
    }


def accuracy_table(results: Results, base: Base) -> str:
    """Accuracy with its interval for Mamba and the baseline, and the paper's."""
    rows = []
    for length in base.lengths:
        found = [accuracy(results, name, length) for name in WORDS]
        paper = f"{PAPER[length]:.1f}" if length in PAPER else ""
        if any(found):
            rows.append([f"{length:,}", *(in_percent(one) for one in found), n_words(results, length), paper])
    if not rows:
        return ""
    header = ("bases", *(f"{words}, %" for words in WORDS.values()), "test windows", "paper's Mamba, %")
    told = [
        f"{WORDS[name]} gains {points(gain.mean)} points ({points(gain.low)} to {points(gain.high)}) from the shortest "
        "to the longest."
        for name in WORDS
        if (gain := gained(results, name))
    ]
    words = (
        f"In brackets the 95 % interval over loci; a guess is right in {percent(CHANCE)} %. In the paper there are "
        "five species, and a guess is right in 20 %."
    )
    return f"{table(header, rows)}\n\n{' '.join([words, *told])}"


def in_percent(found: Accuracy | None) -> str:
    """An accuracy and its interval in percent."""
    return f"{percent(found.mean)} ({percent(found.low)} to {percent(found.high)})" if found else ""


def n_words(results: Results, length: int) -> str:
    """The number of test windows and loci of one seed."""
    arms = [arm for name in WORDS if (arm := arm_of(results, name, length)) and results.of(arm)]
    found = results.of(arms[0])[0].values["loci"]
    return f"{sum(n for _, n in found):,} of {len(found)} loci"


def confusion_table(results: Results, base: Base) -> str:
    """The share of answers of Mamba by the true species at the longest length."""
    arm = arm_of(results, "mamba", base.lengths[-1])
    seeds = results.values(arm, "confusion") if arm else []
    if not seeds:
        return ""
    counts = np.sum(np.array(seeds), 0)
    rows = [[s, *(percent(n / own.sum()) for n in own)] for s, own in zip(SPECIES, counts, strict=True)]
    return f"{table(('is', *(f'said {s}, %' for s in SPECIES)), rows)}\n\nMamba at {base.lengths[-1]:,} bases."


def rate_table(results: Results, base: Base) -> str:
    """The loss on the valid loci at each rate that was tried."""
    rows = [
        [f"{rate:g}", f"{value:.4f}" if (value := loss(results, [arm])) < 1e9 else "diverged"]
        for arm, rate in sweep(base).items()
        if results.of(arm)
    ]
    words = f"Nats an answer on the valid loci at {base.swept:,} bases; log 4 is 1.386. All lengths have the best rate."
    return f"{table(('peak rate', 'valid loss'), rows)}\n\n{words}" if rows else ""
