"""The findings: thresholds, times and ratios next to the paper's, the growth of times, and where curves cross."""

from __future__ import annotations

from collections.abc import Sequence

from anymamba.experiments.speed.arms import (
    MODELS,
    OPERATORS,
    PAPER,
    PASSES,
)
from anymamba.experiments.speed.many_rows import memory_table, row_thresholds, throughput_ratio, throughput_table
from anymamba.experiments.speed.reading import (
    Series,
    above_from,
    crossings,
    from_length,
    medians,
    number,
    ratios,
    records_by_size,
    runs,
    seconds,
    slope,
    timings,
)
from anymamba.lab.charts import table
from anymamba.lab.experiment import Record, Results, Threshold

WORDS = {"attention": "attention", "convolution": "FFT convolution", "unfused": "unfused scan", "scan": "scan"}
MODEL_WORDS = {"mamba": "Mamba", "transformer": "Transformer++"}
PASS_WORDS = {"prefill": "reading a prompt", "training": "a training step", "decoding": "a token after a context"}
SCAN = Series("operators", "scan")
OTHERS = OPERATORS[:-1]
FROM_LENGTH = 2048
"""Shorter lengths are not judged, because their time is mostly the cost of a call."""


def paper_times(name: str) -> dict[int, float]:
    """The paper's times of an operator by length; lengths without a time are left out."""
    return {size: ms for size, row in PAPER.items() if (ms := row[OPERATORS.index(name)]) is not None}


def paper_ratios(name: str) -> dict[int, float]:
    """The paper's time of an operator divided by that of the fused scan, by length."""
    scan = paper_times("scan")
    return {size: ms / scan[size] for size, ms in paper_times(name).items()}


# --------------------------------------------------------------------------------------------------------- thresholds


def thresholds(results: Results) -> list[Threshold]:
    """The thresholds, which every run must meet."""
    far, each = f"from length {FROM_LENGTH:,} on", runs(results)
    slopes = [slope(from_length(seconds(run, SCAN), FROM_LENGTH)) for run in each]
    unfused, convolution = ([least_over_scan(run, name) for run in each] for name in ("unfused", "convolution"))
    faster, from_words = [faster_from(run) for run in each], "length from which on the scan is faster than attention"
    mamba, transformer = ([growth(run, model) for run in each] for model in MODELS)
    grows = "time of a token after the longest context over that after the shortest"
    found = [
        Threshold(f"scan: slope of log time over log length, {far}", slopes, 0.9, 1.1, show=number),
        Threshold(f"unfused scan over scan, {far}, least", unfused, at_least=10.0, show=number),
        Threshold(f"FFT convolution over scan, {far}, least", convolution, at_least=2.0, show=number),
        Threshold(from_words, faster, at_most=8192.0, show=number),
        Threshold(f"Mamba: {grows}", mamba, at_most=1.1, show=number),
        Threshold(f"Transformer++: {grows}", transformer, at_least=2.0, show=number),
    ]
    return found + (row_thresholds(results) if any(arm.startswith("rows-") for arm in results.planned_arms) else [])


def least_over_scan(run: Results, name: str) -> float | None:
    """The smallest ratio of an operator's time to the scan's, at lengths from FROM_LENGTH on."""
    values = from_length(ratios(run, Series("operators", name), SCAN), FROM_LENGTH)
    return min((min(several) for several in values.values()), default=None)


def faster_from(run: Results) -> float | None:
    """The length from which on the scan is faster than attention; None if no measured length is long enough to tell."""
    over = medians(ratios(run, Series("operators", "attention"), SCAN))
    return above_from(over) if over and max(over) >= FROM_LENGTH else None


def growth(run: Results, model: str) -> float | None:
    """The time of a token after the longest context over that after the shortest; None if they are too close."""
    times = seconds(run, Series("models", model, "decoding"))
    far_apart = times and max(times) >= 64 * min(times)
    return times[max(times)] / times[min(times)] if far_apart else None


# ------------------------------------------------------------------------------------------------------------- tables


def sections(results: Results) -> dict[str, str]:
    """The sections of the report: times and ratios of operators and models, as far as they are measured."""
    operators, models = (records_by_size(results, kind) for kind in ("operators", "models"))
    return {
        "Operators": f"{operator_table(results)}\n\n{backend_words(operators)}" if operators else "",
        "Growth": growth_table(results),
        "Models": f"{model_table(results)}\n\n{parameter_words(models)} {backend_words(models)}" if models else "",
        "Larger models": large_words(results),
        "Generating with many rows": throughput_table(results),
        "Memory of a training step": memory_table(results),
        "Where curves cross": crossing_table(results),
    }


def operator_table(results: Results) -> str:
    """A table of the operators' times, their ratios to the scan, and the paper's ratios."""
    papers = {name: paper_ratios(name) for name in OTHERS}
    header = ["length", *(f"{WORDS[n]}, ms" for n in OPERATORS), *(f"{WORDS[n]} / scan" for n in OTHERS)]
    header += [f"paper: {WORDS[n]} / scan" for n in OTHERS]
    rows = []
    for size in records_by_size(results, "operators"):
        times = [cell(results, Series("operators", name), size) for name in OPERATORS]
        factors = [ratio_cell(results, Series("operators", name), SCAN, size) for name in OTHERS]
        published = [number(papers[name][size]) if size in papers[name] else "" for name in OTHERS]
        rows.append([f"{size:,}", *times, *factors, *published])
    return table(header, rows)


def model_table(results: Results, kind: str = "models") -> str:
    """A table of the models' times in each pass, and the ratio of Transformer++ to Mamba."""
    header = ["context"]
    for name in PASSES:
        header += [f"{PASS_WORDS[name]}: {MODEL_WORDS[m]}, ms" for m in MODELS] + ["Transformer++ / Mamba"]
    rows = []
    for size in records_by_size(results, kind):
        row = [f"{size:,}"]
        for name in PASSES:
            mamba, transformer = (Series(kind, model, name) for model in MODELS)
            row += [cell(results, mamba, size), cell(results, transformer, size)]
            row.append(ratio_cell(results, transformer, mamba, size))
        rows.append(row)
    return table(header, rows)


def large_words(results: Results) -> str:
    """The table of the larger models, and their parameters."""
    records = records_by_size(results, "large")
    return f"{model_table(results, 'large')}\n\n{parameter_words(records)} {backend_words(records)}" if records else ""


def cell(results: Results, series: Series, size: int) -> str:
    """The time in milliseconds, or the reason why there is none."""
    times = seconds(results, series)
    return number(1e3 * times[size]) if size in times else why(series, records_by_size(results, series.kind)[size][0])


def why(series: Series, record: Record) -> str:
    """Why a candidate did not run, with the estimate that exceeds the limit."""
    timing = series.timing(record)
    if timing["missing"] == "over the time cap":
        return f"over the cap: about {timing['estimated_seconds']:,.0f} s"
    if timing["missing"] == "over the memory cap":
        return f"over the cap: about {timing['estimated_bytes'] / 2**30:,.1f} GiB"
    return str(timing["missing"])


def ratio_cell(results: Results, other: Series, ours: Series, size: int) -> str:
    """The median of the runs' ratios and, if there are several, the smallest and the largest."""
    found = ratios(results, other, ours)
    if size not in found:
        return ""
    middle = number(medians(found)[size])
    return middle if len(found[size]) == 1 else f"{middle} ({number(min(found[size]))} to {number(max(found[size]))})"


def growth_table(results: Results) -> str:
    """A table of the power of the length with which each operator's time grows, next to the paper's."""
    rows = []
    for name in OPERATORS:
        ours = slope(from_length(seconds(results, Series("operators", name)), FROM_LENGTH))
        theirs = slope(from_length(paper_times(name), FROM_LENGTH))
        if ours is not None and theirs is not None:
            rows.append([WORDS[name], f"{ours:.2f}", f"{theirs:.2f}"])
    header = ("operator", f"power of the length that its time grows with, from {FROM_LENGTH:,} on", "paper")
    return table(header, rows) if rows else ""


def crossing_table(results: Results) -> str:
    """A table of ratios at the shortest and longest length, and where they pass 1; above 1 scan or Mamba is faster."""
    rows = []
    for name in OTHERS:
        found = medians(ratios(results, Series("operators", name), SCAN))
        rows.append(crossing_row(f"{WORDS[name]} / scan", found, passes_1(paper_ratios(name))))
    for kind, larger in (("models", ""), ("large", ", larger models")):
        for name in PASSES:
            mamba, transformer = (Series(kind, model, name) for model in MODELS)
            found = medians(ratios(results, transformer, mamba))
            rows.append(crossing_row(f"{PASS_WORDS[name]}{larger}: Transformer++ / Mamba", found, ""))
    rows.append(crossing_row("tokens a second by rows: Mamba / Transformer++", throughput_ratio(results), ""))
    header = ("time over time", "at the shortest", "passes 1 at", "at the longest", "paper: passes 1 at")
    return table(header, [row for row in rows if row])


def crossing_row(words: str, ratio: dict[int, float], paper: str) -> Sequence[str]:
    """A row of `crossing_table`; empty if nothing is measured."""
    if not ratio:
        return ()
    first, last = (f"{number(ratio[size])} at {size:,}" for size in (min(ratio), max(ratio)))
    return words, first, passes_1(ratio), last, paper


def passes_1(ratio: dict[int, float]) -> str:
    """The lengths at which a ratio passes 1, as text."""
    return ", ".join(map(number, crossings(ratio))) or "none"


def backend_words(records: dict[int, list[Record]]) -> str:
    """Which backend ran the scan, and of a GPU, whether Python's time is in the times."""
    backends = sorted({record.values["backend"] for several in records.values() for record in several})
    found = f"The scan ran in the backend {' and '.join(map(repr, backends))}."
    return f"{found} {calls_words(records)}" if backends == ["cuda"] else found


def calls_words(records: dict[int, list[Record]]) -> str:
    """How the calls came to a GPU."""
    from_python = [WORDS.get(name) or MODEL_WORDS[name] for name in sorted(names_from_python(records))]
    if not from_python:
        return "Calls were replays of CUDA graphs, so the time of Python is not in them."
    return f"Called from Python, whose time is most of that of short rows: {', '.join(from_python)}."


def names_from_python(records: dict[int, list[Record]]) -> set[str]:
    """The candidates of which some calls were not replays of CUDA graphs."""
    each = [timing for several in records.values() for record in several for timing in timings(record)]
    return {name for name, timing in each if timing["seconds"] is not None and not timing.get("recorded")}


def parameter_words(records: dict[int, list[Record]]) -> str:
    """A sentence with the parameters of both models."""
    n = next(iter(records.values()))[0].values["parameters"]
    difference = 100 * (n["mamba"] / n["transformer"] - 1)
    return f"Mamba has {n['mamba']:,} parameters, Transformer++ {n['transformer']:,} ({difference:+.1f} %)."
