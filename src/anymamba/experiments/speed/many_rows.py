"""The findings on many rows: throughput of generating, memory of a training step (figure 8, right, and table 15)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from anymamba.experiments.speed.arms import MODELS, PAPER_MEMORY, PAPER_THROUGHPUT
from anymamba.experiments.speed.reading import number, records_by_size
from anymamba.experiments.speed.timing import FULL
from anymamba.lab.charts import table
from anymamba.lab.experiment import Results, Threshold

BEST_RATIO, MEMORY_WITHIN = 2.0, 0.25
"""Mamba's best throughput over Transformer++'s, and how far its memory may be from that of Transformer++."""


def row_thresholds(results: Results) -> list[Threshold]:
    """Mamba generates more with the rows that fit, and trains in about the memory."""
    best = [max(own.values(), default=None) for own in (throughputs(results, model) for model in MODELS)]
    mamba, transformer = (memories(results, model) for model in MODELS)
    ratio = best[0] / best[1] if best[0] and best[1] else None
    off: list[float | None] = [abs(mamba[n] / transformer[n] - 1) for n in mamba if n in transformer]
    return [
        Threshold(
            "most tokens a second of Mamba over most of Transformer++", [ratio], at_least=BEST_RATIO, show=number
        ),
        Threshold(
            "memory of a training step: distance of Mamba from Transformer++, share",
            off or [None],
            at_most=MEMORY_WITHIN,
            show="{:.2f}".format,
        ),
    ]


def throughputs(results: Results, model: str) -> dict[int, float]:
    """Tokens a second by number of rows, without those that did not fit; the median over the runs."""
    found = {}
    for n, records in records_by_size(results, "rows").items():
        values = [v for r in records if (v := r.values["throughput"][model]["tokens_per_second"]) is not None]
        if values:
            found[n] = median(values)
    return found


def throughput_ratio(results: Results) -> dict[int, float]:
    """Mamba's tokens a second over Transformer++'s, by number of rows."""
    mamba, transformer = (throughputs(results, model) for model in MODELS)
    return {n: mamba[n] / transformer[n] for n in mamba if n in transformer}


def memories(results: Results, model: str) -> dict[int, float]:
    """GiB of a training step by number of rows, where it was measured."""
    records = records_by_size(results, "rows")
    return {n: value for n, own in records.items() if (value := own[0].values["memory"][model]) is not None}


def throughput_table(results: Results) -> str:
    """Tokens a second by number of rows, and the paper's."""
    own, ratios = {model: throughputs(results, model) for model in MODELS}, throughput_ratio(results)
    rows = []
    for n in records_by_size(results, "rows"):
        cells = [number(own[m][n]) if n in own[m] else FULL for m in MODELS]
        ratio = number(ratios[n]) if n in ratios else ""
        rows.append([f"{n:,}", *cells, ratio, *(paper_cell(PAPER_THROUGHPUT[m], n) for m in MODELS)])
    found = [
        own
        for several in records_by_size(results, "rows").values()
        for r in several
        for own in r.values["throughput"].values()
    ]
    is_recorded = all(own.get("recorded") for own in found if own["tokens_per_second"] is not None)
    how = "all of it is a replay of a CUDA graph" if is_recorded else "each token is a call of `step` from Python"
    words = (
        f"Tokens a second of all rows; the time includes reading the prompts, and {how}, with keys and values appended "
        "in place. The paper's: Mamba-1.4B, and a Transformer of 1.3B."
    )
    header = ("rows", "Mamba", "Transformer++", "Mamba / Transformer++", "paper: Mamba", "paper: Transformer")
    return f"{table(header, rows)}\n\n{words}" if rows else ""


def memory_table(results: Results) -> str:
    """GiB of a training step by number of rows, and the paper's."""
    own = {model: memories(results, model) for model in MODELS}
    rows = []
    for n in sorted({*own["mamba"], *own["transformer"]}):
        cells = [f"{own[m][n]:.1f}" if n in own[m] else FULL for m in MODELS]
        rows.append([f"{n:,}", *cells, *(paper_cell(PAPER_MEMORY[m], n) for m in MODELS)])
    header = ("rows", "Mamba, GiB", "Transformer++, GiB", "paper: Mamba, GB", "paper: Transformer, GB")
    return table(header, rows) if rows else ""


def paper_cell(values: Sequence[float | None], n: int) -> str:
    """The paper's value for n rows, which double from one value to the next; "" if it has none."""
    index = n.bit_length() - 1
    value = values[index] if index < len(values) else None
    return "" if value is None else f"{value:g}"
