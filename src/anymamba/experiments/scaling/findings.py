"""The findings: thresholds set before running, losses and rates, power laws, long rows, and the speed of every arm."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, isfinite, log, sqrt

from anymamba.experiments.scaling.arms import ARCHITECTURES, BASES, LARGEST, SWEPT, Base, sweep_names
from anymamba.lab.charts import signed, spread, table
from anymamba.lab.experiment import Results, Threshold
from anymamba.lab.language import best_of, gap, loss, losses, speed_table

WORDS = {"mamba": "Mamba", "transformer": "Transformer++", "h3": "H3++", "hyena": "Hyena"}
MOST_BEHIND, LEAST_AHEAD, PREDICTED_WITHIN = 0.01, 0.02, 0.03
"""In nats a byte: Mamba behind Transformer++, Mamba ahead of H3++ and Hyena, and the largest size from the others."""
PAPER = {
    "mamba": (11.60, 8.70, 7.27, 6.50),
    "transformer": (11.64, 8.68, 7.26, 6.45),
    "h3": (None, None, 7.98, 7.08),
    "hyena": (16.91, 11.40, 8.99, 7.85),
}
"""Perplexity of the paper's four sizes at a context of 2,048, read off its figure. Its Hyena has the older recipe."""


@dataclass(frozen=True)
class Law:
    """loss = exp(intercept) x^slope, fitted by least squares to the logarithms."""

    slope: float
    intercept: float
    error: float | None
    """Standard error of the slope; None for two points."""

    def __call__(self, x: float) -> float:
        return exp(self.intercept + self.slope * log(x))


def fitted(points: list[tuple[float, float]]) -> Law | None:
    """The law through points of x and loss; None for fewer than two."""
    if len(points) < 2:
        return None
    xs, ys = ([log(point[i]) for point in points] for i in (0, 1))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    wide = sum((a - x) ** 2 for a in xs)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / wide
    left = sum((b - y - slope * (a - x)) ** 2 for a, b in zip(xs, ys, strict=True))
    error = sqrt(left / (len(xs) - 2) / wide) if len(xs) > 2 else None
    return Law(slope, y - slope * x, error)


def arms_of(results: Results, name: str, index: int, window: int | None = None) -> list[str]:
    """The arms of an architecture at the size with that index and the best rate."""
    base = BASES[results.scale]
    own = f"{name}-{base.sizes[index].name}"
    if window is not None:
        return [f"{own}-rows-of-{window}"]
    if index != SWEPT:
        return [own]
    tried = [arm for arm in sweep_names(base, name) if results.of(arm)]
    best = [best_of(results, tried)] if len(tried) == len(base.rates[name]) else []
    return [*best, own]


def points(
    results: Results, name: str, of: str = "parameters", n_sizes: int | None = None
) -> list[tuple[float, float]]:
    """Parameters or operations, and the mean loss, at each measured size of an architecture."""
    found = []
    for index in range(len(BASES[results.scale].sizes[:n_sizes])):
        arms = arms_of(results, name, index)
        records = [record for arm in arms for record in results.of(arm)]
        if records and isfinite(value := loss(results, arms)):
            values = records[0].values
            x = values["parameters"] if of == "parameters" else values["flops_per_byte"] * values["read_bytes"]
            found.append((x, value))
    return found


# --------------------------------------------------------------------------------------------------------- thresholds


def thresholds(results: Results) -> list[Threshold]:
    """Mamba keeps up with Transformer++ and is ahead of the others; three sizes predict the fourth."""
    base = BASES[results.scale]
    sizes = range(len(base.sizes))

    def gaps(above: str, below: str) -> list[float | None]:
        return [gap(results, arms_of(results, above, i), arms_of(results, below, i)) for i in sizes]

    largest = len(base.sizes) - 1
    law, far = fitted(points(results, "mamba", n_sizes=largest)), points(results, "mamba")
    whole = len(points(results, "mamba", n_sizes=largest)) == largest and len(far) == largest + 1
    missed = abs(law(far[-1][0]) - far[-1][1]) if law and whole else None
    ahead = {name: gaps(name, "mamba") for name in ARCHITECTURES if name not in LARGEST}
    return [
        Threshold(
            "Mamba minus Transformer++ at each size, nats a byte",
            gaps("mamba", "transformer"),
            at_most=MOST_BEHIND,
            show=signed,
        ),
        *(
            Threshold(f"{WORDS[name]} minus Mamba at each size, nats a byte", got, at_least=LEAST_AHEAD, show=signed)
            for name, got in ahead.items()
        ),
        Threshold(
            "Mamba at the largest size: distance from the law of the smaller sizes, nats a byte",
            [missed],
            at_most=PREDICTED_WITHIN,
            show="{:.3f}".format,
        ),
    ]


# ------------------------------------------------------------------------------------------------------------- tables


def sections(results: Results) -> dict[str, str]:
    """The sections of the report."""
    base = BASES[results.scale]
    return {
        "Loss by size": f"{loss_table(results, base)}\n\nIn brackets: the seeds. {paper_words()}",
        "Power laws": law_table(results),
        "Rates": rate_table(results, base),
        f"Rows of {base.long_window:,}": long_table(results, base),
        "Speed": speed_table(results) if results.records else "",
    }


def loss_table(results: Results, base: Base) -> str:
    """Nats a byte of each architecture at each size, and how far the others are from Mamba."""
    header = ["size", *(f"{WORDS[name]}" for name in ARCHITECTURES)]
    header += [f"{WORDS[name]} minus Mamba" for name in ARCHITECTURES[1:]]
    rows = []
    for i, size in enumerate(base.sizes):
        own = [spread(losses(results, arms_of(results, name, i)), 4) for name in ARCHITECTURES]
        mamba = arms_of(results, "mamba", i)
        gaps = [signed(gap(results, arms_of(results, name, i), mamba), 4) for name in ARCHITECTURES[1:]]
        rows.append([size.name, *own, *gaps])
    return table(header, rows)


def paper_words() -> str:
    """The paper's gaps to Mamba at its four sizes."""
    parts = []
    for name in ARCHITECTURES[1:]:
        gaps = [log(a / b) for a, b in zip(PAPER[name], PAPER["mamba"], strict=True) if a is not None and b is not None]
        parts.append(f"{WORDS[name]} {', '.join(map(signed, gaps))}")
    return f"The paper's gaps to Mamba from its smaller to its larger sizes, in nats a token: {'; '.join(parts)}."


def law_table(results: Results) -> str:
    """Fitted exponents with their standard errors, against parameters and operations."""
    rows = []
    for name in ARCHITECTURES:
        laws = [fitted(points(results, name, of)) for of in ("parameters", "operations")]
        if all(laws):
            cells = [exponent(law) for law in laws if law]
            rows.append([WORDS[name], str(len(points(results, name))), *cells])
    header = ("", "sizes", "exponent of parameters", "exponent of operations")
    words = "loss = a x^exponent, fitted to logarithms by least squares, with the standard error of the exponent."
    return f"{table(header, rows)}\n\n{words}" if rows else ""


def exponent(law: Law) -> str:
    """The slope with its standard error."""
    return f"{law.slope:.4f}" + ("" if law.error is None else f" ± {law.error:.4f}")


def rate_table(results: Results, base: Base) -> str:
    """The loss at each rate that was tried."""
    rows = []
    for name in ARCHITECTURES:
        for arm, rate in zip(sweep_names(base, name), base.rates[name], strict=True):
            if results.of(arm):
                rows.append([WORDS[name], f"{rate:g}", spread(losses(results, [arm]), 4)])
    words = f"At the size {base.sizes[SWEPT].name}; all sizes have the best one."
    return f"{table(('', 'peak rate', 'nats a byte'), rows)}\n\n{words}" if rows else ""


def long_table(results: Results, base: Base) -> str:
    """Losses with long rows, which read the same number of bytes a step."""
    rows = []
    for i, size in enumerate(base.sizes[1:-1], start=1):
        arms = [arms_of(results, name, i, base.long_window) for name in LARGEST]
        if any(results.of(arm) for names in arms for arm in names):
            own = [spread(losses(results, names), 4) for names in arms]
            rows.append([size.name, *own, signed(gap(results, arms[0], arms[1]), 4)])
    header = ("size", *(WORDS[name] for name in LARGEST), "Mamba minus Transformer++")
    return table(header, rows) if rows else ""
