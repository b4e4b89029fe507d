"""The findings: thresholds, and tables 7 and 10 with our numbers next to the paper's."""

from __future__ import annotations

from math import inf, isfinite, log

from anymamba.experiments.selection_ablation.arms import (
    KINDS,
    PAPER_7,
    PAPER_10,
    SELECTIVE,
    STATES,
    TRANSFORMER,
    paper_gap,
)
from anymamba.lab.charts import percent, spread, table
from anymamba.lab.experiment import Results, Threshold

WORDS = {"none": "none", "B": "B", "C": "C", "delta": "Δ", "all": "Δ, B, C"}
LEAST, MOST = STATES[0], STATES[-1]
TIE = 0.01
"""In nats per byte; a difference of at most this size is a tie."""


def losses(results: Results, arm: str) -> list[float]:
    """The held-out loss of each seed of `lm-ARM` in nats per byte; infinite if training diverged."""
    return [inf if value is None else value for value in results.values(f"lm-{arm}", "validation_loss")]


def loss(results: Results, arm: str) -> float:
    """The mean of an arm's losses; infinite if it diverged or is not measured."""
    values = losses(results, arm)
    return sum(values) / len(values) if values else inf


def gap(results: Results, above: str, below: str) -> float | None:
    """The difference of the mean losses of two language models in nats; None if one diverged or is missing."""
    a, b = loss(results, above), loss(results, below)
    return a - b if isfinite(a) and isfinite(b) else None


def gain(results: Results, kind: str) -> float | None:
    """The gain of N = 16 over N = 1 with constant or selective B and C, in nats."""
    return gap(results, f"{KINDS[kind]}-n{LEAST}", f"{KINDS[kind]}-n{MOST}")


def nats(value: float | None) -> str:
    """A difference with its sign; "" for None."""
    return "" if value is None else f"{value:+.3f}"


# --------------------------------------------------------------------------------------------------------- thresholds


def thresholds(results: Results) -> list[Threshold]:
    """Selection solves copying, each row of table 7 lowers the loss, a larger state helps with selective B and C."""
    whole, without = (results.mean(f"copying-{name}", "accuracy") for name in ("all", "none"))
    lost = whole - without if whole is not None and without is not None else None
    copying = [
        Threshold("copying: accuracy with Δ, B, C selective, %", [whole], at_least=0.95, show=percent),
        Threshold("copying: how far none is below that, points", [lost], at_least=0.25, show=percent),
    ]
    falls = [("none", "B"), ("B", "C"), ("C", "delta"), ("delta", "all")]
    return [*copying, *(order_threshold(results, above, below) for above, below in falls), state_threshold(results)]


def order_threshold(results: Results, above: str, below: str) -> Threshold:
    """The loss falls from one row to the next by more than a tie; only from B to C it may rise by up to a tie."""
    alike, got = (above, below) == ("B", "C"), gap(results, f"{above}-n16", f"{below}-n16")
    paper = nats(paper_gap(PAPER_7[above], PAPER_7[below]))
    return Threshold(
        f"language model: loss of {WORDS[above]} minus that of {WORDS[below]}, nats (paper {paper})",
        [got],
        at_least=-TIE if alike else TIE,
        tie=-1.0 if alike else TIE,
        show=nats,
    )


def state_threshold(results: Results) -> Threshold:
    """With selective B and C a larger state gains more than a tie, and 5 times as much as with constant ones."""
    selective, constant = gain(results, "selective"), gain(results, "constant")
    return Threshold(
        f"language model: gain of N = {MOST} over {LEAST} with selective B and C, nats (wanted is 5 times that "
        "with constant ones)",
        [selective if constant is not None else None],
        at_least=max(TIE, 5 * (constant or 0.0)),
        show=nats,
    )


# ------------------------------------------------------------------------------------------------------------- tables


def sections(results: Results) -> dict[str, str]:
    """The sections of the report: both tables."""
    return {
        "Table 7: what is selective": f"{table_7(results)}\n\n{corpus_words(results)}",
        "Table 10: the size of the state": f"{table_10(results)}\n\n{spread_words(results)}",
    }


def table_7(results: Results) -> str:
    """Table 7: accuracy of copying and loss of the language model by what is selective, then the Transformer++."""
    header = ("selective", "copying, %", "parameters", "nats a byte", "bits a byte", "above all", "paper", "paper, ppl")
    rows = []
    for name in SELECTIVE:
        arm, copied = f"{name}-n16", results.values(f"copying-{name}", "accuracy")
        published = [nats(paper_gap(PAPER_7[name], PAPER_7["all"])), f"{PAPER_7[name]:.2f}"]
        if copied or losses(results, arm):
            above = nats(gap(results, arm, "all-n16"))
            rows.append([WORDS[name], spread(copied, scale=100), *loss_cells(results, arm), above, *published])
    if losses(results, TRANSFORMER):
        above = nats(gap(results, TRANSFORMER, "all-n16"))
        rows.append(["Transformer++", "", *loss_cells(results, TRANSFORMER), above, "", ""])
    return table(header, rows)


def table_10(results: Results) -> str:
    """Table 10: loss by N, with constant and with selective B and C."""
    header = ("B and C", "N", "parameters", "nats a byte", "bits a byte", "below N = 1", "paper", "paper, ppl")
    rows = []
    for kind, name in KINDS.items():
        for n, published in PAPER_10[kind].items():
            arm = f"{name}-n{n}"
            if losses(results, arm):
                ours, theirs = gap(results, f"{name}-n{LEAST}", arm), paper_gap(PAPER_10[kind][LEAST], published)
                rows.append([kind, f"{n}", *loss_cells(results, arm), nats(ours), nats(theirs), f"{published:.2f}"])
    return table(header, rows)


def loss_cells(results: Results, arm: str) -> list[str]:
    """The cells with the parameters, and the loss in nats and bits per byte."""
    own, parameters = losses(results, arm), results.values(f"lm-{arm}", "parameters")
    return [f"{parameters[0]:,}" if parameters else "", spread(own, 3), spread(own, 3, 1 / log(2))]


def corpus_words(results: Results) -> str:
    """Sentences that explain the columns and give the size of the corpus."""
    words = "Parameters are the language model's; gaps are in nats, and positive where the loss is higher."
    record = next((record for record in results.records if record.arm.startswith("lm-")), None)
    if record is None:
        return words
    how, window, rows = (record.settings[name] for name in ("optimization", "window", "validation_rows"))
    return (
        f"{words} The corpus has {record.values['training_bytes']:,} bytes to learn from, of which training sees "
        f"{how['steps'] * how['batch_size'] * window:,}, and {record.values['held_out_bytes']:,} in held-out files, of "
        f"which {rows * window:,} are judged."
    )


def spread_words(results: Results) -> str:
    """A sentence on how much the seeds of one Mamba differ, and what that means for the gaps; "" for one seed."""
    arms = [arm.removeprefix("lm-") for arm in results.arms if arm.startswith("lm-") and arm != f"lm-{TRANSFORMER}"]
    spans = [max(own) - min(own) for arm in arms if len(own := losses(results, arm)) > 1 and isfinite(max(own))]
    if not spans:
        return ""
    return (
        f"Seeds of one Mamba are up to {max(spans):.3f} nats a byte apart: so few seeds do not tell gaps between means "
        "that are not well above that from chance."
    )
