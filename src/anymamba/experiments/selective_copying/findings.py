"""The findings: thresholds, table 1 with our numbers, and the differences between its cells."""

from __future__ import annotations

from anymamba.data.synthetic.copying import Copying, guess_accuracy, histogram_accuracy
from anymamba.experiments.selective_copying.arms import (
    CELL,
    CELLS,
    CONTROLS,
    LONG_CELLS,
    Cell,
    cell_of,
    task_words,
)
from anymamba.lab.charts import percent, spread, table
from anymamba.lab.experiment import Results, Threshold
from anymamba.lab.language import task_speeds


def label(arm: str) -> str:
    """The name of an arm in tables and charts."""
    cell, task = cell_of(arm), task_words(arm)
    return f"{cell.block}: {cell.layer}" + (f", {task}" if task else "")


def task_of(results: Results) -> Copying:
    """The task of the first record; all records have the same tokens, whatever their noise."""
    return Copying(**results.records[0].settings["task"])


def thresholds(results: Results) -> list[Threshold]:
    """The thresholds: cells with S6 learn the task, the others stay below them, also with the paper's noise."""
    planned = [threshold(cell, results) for cell in CELLS if cell.mixer in results.planned_arms]
    long = [CELL[mixer] for mixer in LONG_CELLS if f"long-{mixer}" in results.planned_arms]
    return planned + [threshold(cell, results, "long-") for cell in long]


def threshold(cell: Cell, results: Results, prefix: str = "") -> Threshold:
    """The threshold of one cell; a gap is the smallest between any two seeds."""
    arm, selective = prefix + cell.mixer, prefix + cell.selective
    own = results.values(arm, "accuracy")
    if arm == selective:
        return Threshold(f"accuracy of {label(arm)}, %", own, at_least=0.95, show=percent)
    other = results.values(selective, "accuracy")
    gap = [min(other) - max(own)] if own and other else []
    what = f"how far {label(arm)} is below {label(selective)}, points"
    return Threshold(what, gap, at_least=0.25, show=percent)


def sections(results: Results) -> dict[str, str]:
    """The sections of the report: table 1, the differences between its cells, and the speed of training."""
    return {"Table 1": table_1(results), "Differences": differences(results), **task_speeds(results)}


def table_1(results: Results) -> str:
    """Table 1 and the controls; for several seeds the mean and, in brackets, the smallest and the largest value."""
    header = ("block", "layer", "parameters", "answers right, %", "rows all right, %", "paper, %")
    rows = []
    for arm in results.arms:
        cell, task_of_arm = cell_of(arm), task_words(arm)
        accuracies = [spread(results.values(arm, name), scale=100) for name in ("accuracy", "sequence_accuracy")]
        layer = f"{cell.layer} ({task_of_arm})" if task_of_arm else cell.layer
        parameters = f"{results.values(arm, 'parameters')[0]:,}"
        published = "" if arm.startswith("plain-") else percent(cell.paper)
        rows.append([cell.block, layer, parameters, *accuracies, published])
    task, paper = task_of(results), Copying(n_noise=4096, n_tokens=16)
    return (
        f"{table(header, rows)}\n\nGuessing gives {percent(guess_accuracy(task))} %. Knowing which tokens there are, "
        f"but not their order, and always answering the commonest gives {percent(histogram_accuracy(task))} % with "
        f"{task.n_tokens} tokens of {task.n_symbols} symbols ({percent(histogram_accuracy(paper))} % with the paper's "
        f"{paper.n_tokens} of {paper.n_symbols})."
    )


def differences(results: Results) -> str:
    """A table of differences between means over the seeds, next to the paper's, in points."""
    mean = {arm: results.mean(arm, "accuracy") for arm in (*CELL, *(f"plain-{c}" for c in CONTROLS))}
    mean["histogram"] = histogram_accuracy(task_of(results))
    pairs = [(c.mixer, "histogram", f"{label(c.mixer)} above the histogram") for c in CELLS if c.mixer != c.selective]
    pairs += [(f"{b}-s4", "s4", f"{CELL[f'{b}-s4'].block}: what the block adds to S4") for b in ("h3", "mamba")]
    pairs += [(f"plain-{c}", c, f"{label(c)}: what placing the tokens at random costs") for c in CONTROLS]
    rows = []
    for above, below, words in pairs:
        a, b = mean[above], mean[below]
        if a is not None and b is not None:
            both = above in CELL and below in CELL
            paper = f"{100 * (CELL[above].paper - CELL[below].paper):+.1f}" if both else ""
            rows.append([words, f"{100 * (a - b):+.1f}", paper])
    return table(("difference", "points", "paper"), rows) if rows else ""
