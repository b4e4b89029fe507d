"""The report: table 1 with our numbers, the thresholds, and what the results say of them."""

from __future__ import annotations

from anymamba.data.synthetic.copying import Copying, guess_accuracy, histogram_accuracy
from anymamba.experiments.charts import spread, table
from anymamba.experiments.checks import WORST_SEED, Check, checks_table, verdict
from anymamba.experiments.experiment import Results
from anymamba.experiments.selective_copying.arms import (
    CELL,
    CELLS,
    CONTROLS,
    GAP_AT_LEAST,
    SELECTIVE_AT_LEAST,
    SWEEPS,
    Cell,
)


def report(results: Results) -> str:
    """The Markdown between title and provenance."""
    if not results.records:
        return "Nothing has been measured yet."
    words = [verdict(checks(results)), protocol(results), SWEEPS.get(results.scale, "")]
    parts = [part for part in words if part] + [cells_table(results), baseline_words(results)]
    parts += ["## Thresholds", WORST_SEED, checks_table(checks(results), "%"), "## What came out", remarks(results)]
    return "\n\n".join(parts)


def label(arm: str) -> str:
    """An arm in words."""
    cell = CELL[arm.removeprefix("plain-")]
    return f"{cell.block}: {cell.layer}" + (", plain copying" if arm.startswith("plain-") else "")


def task_of(results: Results) -> Copying:
    """The task of the first record; all share its sizes."""
    return Copying(**results.records[0].settings["task"])


def baselines(results: Results) -> tuple[float, float]:
    """Accuracy of a guess, and of one that knows the histogram."""
    task = task_of(results)
    return guess_accuracy(task), histogram_accuracy(task)


def checks(results: Results) -> list[Check]:
    """Every threshold of the cells that the run plans, the worst seed counting."""
    planned = {key.rpartition("-seed")[0] for key in results.planned}
    return [check(cell, results) for cell in CELLS if cell.mixer in planned]


def check(cell: Cell, results: Results) -> Check:
    """The threshold of a cell."""
    own = results.values(cell.mixer, "accuracy")
    if cell.mixer == cell.selective:
        return at_least(f"{label(cell.mixer)}: accuracy", SELECTIVE_AT_LEAST, min(own, default=None))
    other = results.values(cell.selective, "accuracy")
    gap = min(other) - max(own) if own and other else None
    return at_least(f"{label(cell.mixer)}: points below {label(cell.selective)}", GAP_AT_LEAST, gap)


def at_least(words: str, least: float, got: float | None) -> Check:
    """The check of a share, shown in percent."""
    check = Check(words, f"at least {100 * least:.0f}")
    return check if got is None else check.judged(f"{100 * got:.1f}", got >= least)


def protocol(results: Results) -> str:
    """The settings in words."""
    settings, task = results.records[0].settings, task_of(results)
    how = settings["optimization"]
    warmup = f" after {how['warmup_steps']} steps of warm-up" if how["warmup_steps"] else ""
    course = "down to none in half a cosine" if how["cosine"] else "constant"
    clip = f"clipped at norm {how['clip_norm']:g}" if how["clip_norm"] is not None else "not clipped"
    return (
        f"Rows of {task.length} tokens: {task.n_tokens} to remember, of {task.n_symbols} symbols, at random places "
        f"among {task.n_noise} of noise, then {task.n_tokens} markers where they are asked for in order. Models of "
        f"{settings['n_layers']} blocks, d_model {settings['d_model']}, S6 with 16 states a channel, S4 with 64. Every "
        f"arm: AdamW without decay, {how['steps']:,} steps of {how['batch_size']} fresh rows, learning rate "
        f"{how['learning_rate']:g}{warmup}, {course} (at most {how['kernel_learning_rate']:g} for kernels), "
        f"gradients {clip}. {settings['validation_rows']} validation rows, the same for all. The paper's numbers are "
        "for 16 tokens in noise of 4096 and 400,000 steps at 1e-4."
    )


def cells_table(results: Results) -> str:
    """Table 1 and the controls; several seeds are a mean and, in brackets, the least and the most."""
    header = ("block", "layer", "parameters", "answers right, %", "rows all right, %", "paper, %")
    rows = []
    for arm in results.arms:
        cell, plain = CELL[arm.removeprefix("plain-")], arm.startswith("plain-")
        accuracies = [spread(results.values(arm, n), scale=100) for n in ("accuracy", "sequence_accuracy")]
        name = f"{cell.layer} (plain copying)" if plain else cell.layer
        parameters = f"{results.values(arm, 'parameters')[0]:,}"
        rows.append([cell.block, name, parameters, *accuracies, "" if plain else f"{100 * cell.paper:.1f}"])
    return table(header, rows)


def baseline_words(results: Results) -> str:
    """The two baselines in words."""
    (guess, histogram), task = baselines(results), task_of(results)
    published = histogram_accuracy(Copying(n_noise=4096, n_tokens=16))
    return (
        f"Guessing gives {100 * guess:.1f} %. Knowing which tokens there are, but not their order, and always "
        f"answering the commonest gives {100 * histogram:.1f} % with {task.n_tokens} tokens of {task.n_symbols} "
        f"symbols ({100 * published:.1f} % with the paper's 16 of 14)."
    )


def remarks(results: Results) -> str:
    """What the numbers say, each sentence computed from them."""
    lines = [*baseline_remarks(results), *gate_remarks(results), *control_remarks(results)]
    return "\n".join(f"- {line}" for line in lines) or "Too few arms are measured to compare any."


def mean(results: Results, arm: str) -> float | None:
    """Mean accuracy of an arm, None where it is not measured."""
    values = results.values(arm, "accuracy")
    return sum(values) / len(values) if values else None


def baseline_remarks(results: Results) -> list[str]:
    """Time-invariant cells that do no better than the histogram, and those that do."""
    histogram = baselines(results)[1]
    found = {c.mixer: m for c in CELLS if c.mixer != c.selective and (m := mean(results, c.mixer)) is not None}
    words = {
        "No better than the histogram baseline": [label(c) for c, m in found.items() if m <= histogram],
        "Better than the histogram baseline without selection, so they learned some of the order": [
            f"{label(c)} (by {100 * (m - histogram):.1f} points)" for c, m in found.items() if m > histogram
        ],
    }
    return [f"{start}: {', '.join(names)}." for start, names in words.items() if names]


def gate_remarks(results: Results) -> list[str]:
    """What a gated block does for S4, beside the paper."""
    plain, lines = mean(results, "s4"), []
    for gated in ("h3-s4", "mamba-s4"):
        value = mean(results, gated)
        if value is None or plain is None:
            continue
        ours, published = 100 * (value - plain), 100 * (CELL[gated].paper - CELL["s4"].paper)
        lines.append(f"The block of {CELL[gated].block} changes S4 by {ours:+.1f} points (paper: {published:+.1f}).")
    return lines


def control_remarks(results: Results) -> list[str]:
    """Plain copying beside selective copying."""
    lines = []
    for mixer in CONTROLS:
        selective, plain = mean(results, mixer), mean(results, f"plain-{mixer}")
        if selective is not None and plain is not None:
            lines.append(
                f"{label(mixer)}: {100 * plain:.1f} % of plain copying, {100 * selective:.1f} % of selective copying: "
                f"placing the tokens at random costs {100 * (plain - selective):.1f} points."
            )
    return lines
