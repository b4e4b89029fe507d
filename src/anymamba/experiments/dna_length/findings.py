"""The findings: loss and slope by length, whether context is used at all, and the longest row."""

from __future__ import annotations

from math import inf, isfinite, log, log2

from anymamba.experiments.dna_length.arms import ARCHITECTURES, BASES, Base, sweep, sweep_again
from anymamba.lab.charts import signed, spread, table
from anymamba.lab.experiment import Results, Scale, Threshold
from anymamba.lab.genome_models import WORDS, measured_rates, paired, rate_table, speed_table
from anymamba.lab.language import gap, loss, losses

MOST_ABOVE = 0.002
"""Nats a base by which Mamba's loss at the length JUDGED may be above that at the shortest."""
JUDGED: dict[Scale, int] = {"toy": 32, "cpu": 1 << 12, "gpu": 1 << 16, "paper": 1 << 16}
PAPER = {
    "mamba": {1 << 10: 2.895, 1 << 12: 2.876, 1 << 14: 2.866, 1 << 16: 2.869, 1 << 18: 2.863, 1 << 20: 2.862},
    "hyena": {1 << 10: 2.940, 1 << 12: 2.934, 1 << 14: 2.938, 1 << 16: 2.948, 1 << 18: 2.965, 1 << 20: 3.007},
}
"""Perplexities of the models of 1.4 million parameters, read off the paper's figure."""


def arm_of(results: Results, name: str, length: int) -> str | None:
    """The arm of an architecture at a length, with the best rate; None if the best is not known yet."""
    base = BASES[results.scale]
    if length != base.lengths[0]:
        return f"{name}-{length}"
    tried = sweep(base, name)
    return min(tried, key=lambda arm: loss(results, [arm])) if all(map(results.of, tried)) else None


def points(results: Results, name: str) -> list[tuple[int, float]]:
    """Length and loss of an architecture, the demonstration left out."""
    found = []
    for length in BASES[results.scale].lengths:
        arm = arm_of(results, name, length)
        if arm and isfinite(value := loss(results, [arm])):
            found.append((length, value))
    return found


def slope(results: Results, name: str) -> float | None:
    """The change of the loss with each doubling of the length, by least squares; None until all are measured."""
    own = points(results, name)
    if len(own) < len(BASES[results.scale].lengths):
        return None
    xs, ys = [log2(length) for length, _ in own], [value for _, value in own]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def gain(results: Results, name: str) -> tuple[float, float] | None:
    """How far the loss at the length JUDGED is below that at the shortest, and the standard error over blocks."""
    ends = [arm_of(results, name, length) for length in (BASES[results.scale].lengths[0], JUDGED[results.scale])]
    return paired(results, [ends[0]], [ends[1]]) if ends[0] and ends[1] else None


def thresholds(results: Results) -> list[Threshold]:
    """Mamba's loss does not rise with the length, and its slope is below Hyena's."""
    base, judged = BASES[results.scale], JUDGED[results.scale]
    shortest, far = arm_of(results, "mamba", base.lengths[0]), arm_of(results, "mamba", judged)
    rise = gap(results, [far], [shortest]) if shortest and far else None
    own, theirs = slope(results, "mamba"), slope(results, "hyena")
    return [
        Threshold(
            f"Mamba: loss at {power(judged)} minus that at {power(base.lengths[0])}, nats a base",
            [rise],
            at_most=MOST_ABOVE,
            show=four,
        ),
        Threshold(
            "slope of Mamba, nats a base for each doubling of the length, below that of Hyena",
            [own if theirs is not None else None],
            below=inf if theirs is None else theirs,
            show="{:+.5f}".format,
        ),
    ]


def power(length: int) -> str:
    """A length as a power of two."""
    return f"2^{length.bit_length() - 1}" if length & (length - 1) == 0 else f"{length:,}"


def four(value: float) -> str:
    """A difference with four digits."""
    return signed(value, 4)


def sections(results: Results) -> dict[str, str]:
    """The sections of the report."""
    base = BASES[results.scale]
    sweeps = {name: sweep(base, name) for name in ARCHITECTURES}
    return {
        "Loss by length": loss_table(results, base),
        "Is context used?": context_words(results),
        "The longest row": longest_words(results, base),
        "Rates": rate_table(results, sweeps, f"At {power(base.lengths[0])}; all lengths have the best one."),
        "Rates of longer rows": again_table(results, base),
        "Speed": speed_table(results),
    }


def again_table(results: Results, base: Base) -> str:
    """The loss of long rows at other rates than the best one of the shortest."""
    sweeps = {}
    for name in base.again:
        if any(map(results.of, sweep_again(base, name))):
            sweeps[name] = measured_rates(results, [f"{name}-{base.again_at}"]) | sweep_again(base, name)
    return rate_table(results, sweeps, f"At {power(base.again_at)}, the first one as in the tables above.")


def loss_table(results: Results, base: Base) -> str:
    """Nats a base of each architecture at each length, how far it is from the shortest, and the paper's."""
    header = ["length", "rows a step"]
    header += [f"{WORDS[name]}{words}" for name in ARCHITECTURES for words in ("", ", change", ", change in the paper")]
    rows = []
    for length in base.lengths:
        cells = [power(length), f"{max(1, base.bases_a_step // length):,}"]
        for name in ARCHITECTURES:
            own, first = arm_of(results, name, length), arm_of(results, name, base.lengths[0])
            found = paired(results, [own], [first]) if own and first and own != first else None
            theirs = PAPER[name].get(length)
            cells += [
                spread(losses(results, [own] if own else []), 4),
                f"{four(found[0])} ± {found[1]:.4f}" if found else "",
                four(log(theirs / PAPER[name][1 << 10])) if theirs else "",
            ]
        if cells[2] or cells[5]:
            rows.append(cells)
    words = (
        "In nats a base; the change is from the shortest length. ±: the standard error over the held-out blocks, which "
        "says nothing of other seeds."
    )
    slopes = [f"{WORDS[n]} {value:+.5f}" for n in ARCHITECTURES if (value := slope(results, n)) is not None]
    told = f" Nats a base for each doubling of the length: {', '.join(slopes)}." if slopes else ""
    return f"{table(header, rows)}\n\n{words}{told}" if rows else ""


def context_words(results: Results) -> str:
    """Whether each architecture gains from context, or the result is a null result."""
    base, parts = BASES[results.scale], []
    for name in ARCHITECTURES:
        found = gain(results, name)
        if found is None:
            continue
        value, error = found
        span = f"from {power(base.lengths[0])} to {power(JUDGED[results.scale])}"
        if value > 2 * error:
            verdict = "larger than twice its error: longer rows help"
        elif value < -2 * error:
            verdict = "longer rows make it worse"
        else:
            verdict = "a null result: within twice its error, so no use of context is shown"
        parts.append(f"{WORDS[name]} gains {four(value)} ± {error:.4f} nats a base {span}; {verdict}.")
    if not parts:
        return ""
    return (
        " ".join(parts)
        + " The paper's Mamba gains 0.011 nats from 2^10 to 2^20, after thousands of times more bases. One "
        "seed each: how far chance moves a loss is not known."
    )


def longest_words(results: Results, base: Base) -> str:
    """Memory and time of the demonstration."""
    records = results.of(f"mamba-{base.longest}") if base.longest else []
    if not records or base.longest is None:
        return ""
    values = records[0].values
    memory = "" if values["peak_gib"] is None else f", {values['peak_gib']:.1f} GiB of GPU memory"
    speed = values["tokens_per_second"]
    words = "" if speed is None else f", {base.longest / speed:.2f} seconds a step ({speed:,.0f} bases a second)"
    return (
        f"Rows of {power(base.longest)} = {base.longest:,} bases, one a step, with activation checkpointing, on one "
        f"device: {values['steps']:,} steps in {values['training_seconds']:.0f} seconds with "
        f"evaluations{words}{memory}. The loss after these steps is "
        f"{spread([values['validation_loss'] or inf], 4)} nats a base."
    )
