"""The report: times and ratios beside the paper's, thresholds, and where curves cross, also those that Mamba loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from anymamba.experiments.charts import table
from anymamba.experiments.checks import FAILS, Check, checks_table, verdict
from anymamba.experiments.experiment import Results
from anymamba.experiments.speed.arms import (
    DECODE_FLAT,
    DECODE_GROWS,
    DECODE_SPAN,
    FASTER_THAN_ATTENTION_FROM,
    FROM_LENGTH,
    MODELS,
    OPERATORS,
    OVER_CONVOLUTION,
    OVER_UNFUSED,
    PAPER,
    PASSES,
    SLOPE,
)
from anymamba.experiments.speed.reading import (
    Series,
    crossings,
    faster_from,
    from_length,
    medians,
    missing,
    ratios,
    records_by_size,
    seconds,
    slope,
)

WORDS = {"attention": "attention", "convolution": "FFT convolution", "unfused": "unfused scan", "scan": "scan"}
MODEL_WORDS = {"mamba": "Mamba", "transformer": "Transformer++"}
PASS_WORDS = {"prefill": "reading a prompt", "training": "a training step", "decoding": "a token after a context"}
FUSED = ("cpu", "triton")
"""Backends of the scan that are compiled; the others are plain torch in chunks."""
SCAN = Series("operators", "scan")


def report(results: Results) -> str:
    """The Markdown between title and provenance."""
    if not results.records:
        return "Nothing has been measured yet."
    parts = [verdict(checks(results)), how_measured(results), backend_words(results)]
    if records_by_size(results, "operators"):
        parts += ["## Operators", operator_words(results), operator_table(results)]
    if records_by_size(results, "models"):
        parts += ["## Models", model_words(results), model_table(results)]
    parts += [
        "## Thresholds",
        "Set before running; every run must hold them.",
        checks_table(checks(results)),
        "## Where curves cross",
        remarks(results),
    ]
    return "\n\n".join(part for part in parts if part)


# ------------------------------------------------------------------------------------------------- thresholds


def checks(results: Results) -> list[Check]:
    """Every threshold, which each run must hold."""
    far = f"from length {FROM_LENGTH:,} on"
    bounds: dict[str, tuple[float | None, float | None, Callable[[Results], float | None]]] = {
        f"scan: slope of log time over log length, {far}": (*SLOPE, scan_slope),
        f"unfused scan over scan, {far}, least": (OVER_UNFUSED, None, partial(least_ratio, name="unfused")),
        f"FFT convolution over scan, {far}, least": (OVER_CONVOLUTION, None, partial(least_ratio, name="convolution")),
        "length from which on the scan is faster than attention": (
            None,
            FASTER_THAN_ATTENTION_FROM,
            faster_than_attention_from,
        ),
        growth_words("mamba"): (None, DECODE_FLAT, partial(judged_growth, model="mamba")),
        growth_words("transformer"): (DECODE_GROWS, None, partial(judged_growth, model="transformer")),
    }
    every = runs(results)
    return [within(words, least, most, [of(run) for run in every]) for words, (least, most, of) in bounds.items()]


def runs(results: Results) -> list[Results]:
    """The results of each run alone."""
    seeds = sorted({record.seed for record in results.records})
    return [replace(results, records=tuple(r for r in results.records if r.seed == seed)) for seed in seeds]


def within(words: str, least: float | None, most: float | None, several: Sequence[float | None]) -> Check:
    """The check of a number of each run that must not leave its bounds; it must be finite, too."""
    if least is not None and most is not None:
        wanted = f"{least:g} to {most:g}"
    else:
        wanted = f"at least {least:g}" if most is None else f"at most {most:,g}"
    got = sorted(value for value in several if value is not None)
    if not got:
        return Check(words, wanted)
    low, high = (-math.inf if least is None else least, math.inf if most is None else most)
    holds = all(low <= value <= high and math.isfinite(value) for value in got)
    return Check(words, wanted).judged(" to ".join(dict.fromkeys(number(v) for v in (got[0], got[-1]))), holds)


def scan_slope(results: Results) -> float | None:
    """Of log time over log length, at the lengths that count."""
    return slope(from_length(seconds(results, SCAN), FROM_LENGTH))


def least_ratio(results: Results, name: str) -> float | None:
    """The least time of an operator over the scan's at the lengths that count."""
    values = from_length(ratios(results, Series("operators", name), SCAN), FROM_LENGTH)
    return min((min(several) for several in values.values()), default=None)


def faster_than_attention_from(results: Results) -> float | None:
    """The length from which on the scan is faster; None where no length is long enough to tell."""
    over = medians(ratios(results, Series("operators", "attention"), SCAN))
    return faster_from(over) if over and max(over) >= FROM_LENGTH else None


def growth_words(model: str) -> str:
    """What `growth` is."""
    return f"{MODEL_WORDS[model]}: time of a token after the longest context over that after the shortest"


def judged_growth(results: Results, model: str) -> float | None:
    """The growth where the contexts are far enough apart."""
    times = seconds(results, Series("models", model, "decoding"))
    return growth(results, model) if times and max(times) >= DECODE_SPAN * min(times) else None


def growth(results: Results, model: str) -> float | None:
    """Time a token after the longest context over that after the shortest; None where there is one context at most."""
    times = seconds(results, Series("models", model, "decoding"))
    return times[max(times)] / times[min(times)] if len(times) > 1 else None


# ------------------------------------------------------------------------------------------------- settings


def how_measured(results: Results) -> str:
    """How times and ratios come about."""
    runs = max(len(results.of(arm)) for arm in results.arms)
    limits = results.records[0].settings["limits"]
    several = f"Of {runs} runs the median, in brackets the least and the most of the ratios. " if runs > 1 else ""
    return (
        "The candidates at one length take turns in one run, and each has the time of its fastest turn; every ratio is "
        f"of one run. {several}What is estimated to take more than {limits['call_seconds']:g} s for one call or to "
        f"hold more than {limits['memory_bytes'] / 2**30:g} GiB is over the cap and is not run."
    )


def backend_words(results: Results) -> str:
    """Which backend served the scan, and a warning where it is not a fused one."""
    backends = sorted({record.values["backend"] for record in results.records})
    words = f"The scan, alone and in Mamba, ran in the backend {' and '.join(map(repr, backends))}."
    plain = [name for name in backends if name not in FUSED]
    if plain:
        words += (
            f" {', '.join(map(repr, plain))} is plain torch in chunks, not a fused kernel: these numbers do not stand "
            "beside the paper's fused scan."
        )
    return words


def operator_words(results: Results) -> str:
    """The settings of the operators in words."""
    s = next(iter(records_by_size(results, "operators").values()))[0].settings
    return (
        f"One row, {s['width']} channels, {s['d_state']} states each, {s['dtype']}, forward only; attention of torch "
        f"(`scaled_dot_product_attention`, causal) with heads of {s['d_head']}; the kernel of the convolution is "
        "given and its generation not counted, as in the paper. The unfused scan holds the state of every step and is "
        "a work-efficient associative scan in torch operations, not a loop over time. The paper: A100-80GB, 1,024 "
        "channels, 16 states, bfloat16. Equal widths are its comparison; in a Mamba block the scan has twice the "
        "channels that attention has in a Transformer of the same width."
    )


def model_words(results: Results) -> str:
    """The settings of the models in words."""
    record = next(iter(records_by_size(results, "models").values()))[0]
    s, n = record.settings, record.values["parameters"]
    difference = 100 * (n["mamba"] / n["transformer"] - 1)
    return (
        f"Width {s['mamba']['d_model']} both, {s['dtype']}, one row: Mamba of {s['mamba']['n_layers']} blocks with "
        f"{n['mamba']:,} parameters, Transformer++ of {s['transformer']['n_layers']} (attention and MLP in turn) with "
        f"{n['transformer']:,}; Mamba has {abs(difference):.1f} % {'more' if difference >= 0 else 'fewer'}. Reading "
        "gives the logits of the last position; a training step is forward and backward, without an optimiser; a token "
        f"is the mean of {s['tokens']} that follow the context, each a call of the model's step from Python, with keys "
        "and values in a cache that is appended to in place."
    )


# ------------------------------------------------------------------------------------------------- tables


def operator_table(results: Results) -> str:
    """Times of the operators, ratios to the scan, and the paper's."""
    others = [name for name in OPERATORS if name != "scan"]
    header = ["length", *(f"{WORDS[n]}, ms" for n in OPERATORS), *(f"{WORDS[n]} / scan" for n in others)]
    header += [f"paper: {WORDS[n]} / scan" for n in others]
    rows = []
    for size in records_by_size(results, "operators"):
        times = [cell(results, Series("operators", name), size) for name in OPERATORS]
        factors = [ratio_cell(results, Series("operators", name), SCAN, size) for name in others]
        rows.append([f"{size:,}", *times, *factors, *(number(paper_ratio(name, size)) for name in others)])
    return table(header, rows)


def model_table(results: Results) -> str:
    """Times of the models in each pass, and Transformer++ over Mamba."""
    header = ["context"]
    for name in PASSES:
        header += [f"{PASS_WORDS[name]}: {MODEL_WORDS[m]}, ms" for m in MODELS] + ["Transformer++ / Mamba"]
    rows = []
    for size in records_by_size(results, "models"):
        row = [f"{size:,}"]
        for name in PASSES:
            both = [Series("models", model, name) for model in MODELS]
            row += [cell(results, series, size) for series in both]
            row.append(ratio_cell(results, both[1], both[0], size))
        rows.append(row)
    return table(header, rows)


def cell(results: Results, series: Series, size: int) -> str:
    """Milliseconds, or why there are none."""
    times = seconds(results, series)
    return number(1e3 * times[size]) if size in times else missing(results, series)[size]


def ratio_cell(results: Results, other: Series, ours: Series, size: int) -> str:
    """The median of the runs' ratios and, of several, the least and the most."""
    found = ratios(results, other, ours)
    if size not in found:
        return ""
    middle = number(medians(found)[size])
    return middle if len(found[size]) == 1 else f"{middle} ({number(min(found[size]))} to {number(max(found[size]))})"


def paper_ratio(name: str, size: int) -> float | None:
    """An operator over the fused scan in the paper; None where it has no such number."""
    times = dict(zip(OPERATORS, PAPER.get(size, (None,) * len(OPERATORS)), strict=True))
    other, ours = times[name], times["scan"]
    return None if other is None or ours is None else other / ours


def number(value: float | None) -> str:
    """Three digits; nothing for None."""
    if value is None:
        return ""
    if math.isinf(value):
        return "never"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.{2 - math.floor(math.log10(max(value, 1e-3)))}f}"


# ------------------------------------------------------------------------------------------------- sentences


def remarks(results: Results) -> str:
    """What the numbers say, each sentence computed from them."""
    lines = [*failures(results), *slope_remarks(results)]
    for name in ("attention", "convolution", "unfused"):
        found = medians(ratios(results, Series("operators", name), SCAN))
        lines += duel("The scan", f"the {WORDS[name]}" if name != "attention" else "attention", found)
    lines += paper_crossing(results)
    for name in PASSES:
        both = [Series("models", model, name) for model in MODELS]
        found = medians(ratios(results, both[1], both[0]))
        lines += duel(f"{PASS_WORDS[name].capitalize()}: Mamba", "Transformer++", found)
    lines += decoding_remarks(results)
    return "\n".join(f"- {line}" for line in lines) or "Too little is measured to compare anything."


def failures(results: Results) -> list[str]:
    """A sentence for each threshold that does not hold."""
    return [f"Not as wanted: {c.words}: {c.got}, wanted {c.wanted}." for c in checks(results) if c.verdict == FAILS]


def duel(ours: str, other: str, ratio: dict[int, float]) -> list[str]:
    """Who is faster, and where that changes. `ratio` is the other's time over ours by length."""
    if not ratio:
        return []
    found, first, last = crossings(ratio), min(ratio), max(ratio)
    span = f"at every length measured, {first:,} to {last:,}" if first < last else f"at {first:,}"
    if not found:
        won = ratio[first] >= 1
        factors = [value if won else 1 / value for value in ratio.values()]
        factor = f"{number(min(factors))} to {number(max(factors))}" if len(factors) > 1 else number(factors[0])
        if won:
            return [f"{ours} is faster than {other} {span}: {factor} times."]
        return [f"{ours} **loses** to {other} {span}: it takes {factor} times as long. No crossover was found."]
    turns = [f"at about {number(c.length)} it becomes the {'faster' if c.faster else '**slower**'} one" for c in found]
    start = f"takes {number(1 / ratio[first])} times as long as" if ratio[first] < 1 else "is faster than"
    end = (
        f"at {last:,} it is {number(ratio[last])} times as fast"
        if ratio[last] >= 1
        else f"at {last:,} it takes {number(1 / ratio[last])} times as long"
    )
    return [f"{ours} {start} {other} at {first:,}; {', '.join(turns)}; {end}."]


def slope_remarks(results: Results) -> list[str]:
    """The growth of each operator's time beside the paper's."""
    lines = []
    for name in OPERATORS:
        ours = slope(from_length(seconds(results, Series("operators", name)), FROM_LENGTH))
        published = {size: times[OPERATORS.index(name)] for size, times in PAPER.items() if size >= FROM_LENGTH}
        theirs = slope({size: value for size, value in published.items() if value is not None})
        if ours is not None and theirs is not None:
            lines.append(f"{WORDS[name]}: length to the power {ours:.2f} (paper: {theirs:.2f})")
    return [f"Times grow, from {FROM_LENGTH:,} on, as: " + "; ".join(lines) + "."] if lines else []


def paper_crossing(results: Results) -> list[str]:
    """The crossover of scan and attention in the paper's numbers, beside ours."""
    ours = medians(ratios(results, Series("operators", "attention"), SCAN))
    if not ours or max(ours) < FROM_LENGTH:
        return []
    theirs = faster_from({size: value for size in PAPER if (value := paper_ratio("attention", size)) is not None})
    here = faster_from(ours)
    own = f"never up to {max(ours):,}" if math.isinf(here) else number(here)
    if here == min(ours):
        own += " (the shortest measured)"
    return [f"Length from which on the scan is faster than attention: {own} here, about {number(theirs)} in the paper."]


def decoding_remarks(results: Results) -> list[str]:
    """How a token's time depends on the context."""
    lines = []
    for model in MODELS:
        times, ratio = seconds(results, Series("models", model, "decoding")), growth(results, model)
        if ratio is not None:
            lines.append(
                f"A token of {MODEL_WORDS[model]} after {max(times):,} takes {number(ratio)} times as long as after "
                f"{min(times):,}."
            )
    return lines
