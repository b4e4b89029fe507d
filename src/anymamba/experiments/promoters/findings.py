"""The findings: accuracy, Matthews' correlation and AUROC of each model, over seeds."""

from __future__ import annotations

from anymamba.evaluation.dna.metrics import METRICS, interval
from anymamba.experiments.promoters.arms import ARCHITECTURES, BASES, arms_of
from anymamba.lab.charts import signed, table
from anymamba.lab.experiment import Results, Threshold
from anymamba.lab.genome_models import speed_table
from anymamba.lab.language import loss

WORDS = {"cnn": "CNN", "hyena": "Hyena", "mamba": "Mamba"}
METRIC_WORDS = {"accuracy": "accuracy", "mcc": "MCC", "auroc": "AUROC"}
LEAST_AUROC = 0.85
"""AUROC that every model must have with every seed."""
MOST_BEHIND = 0.02
"""By which the mean accuracy of Mamba may be below that of the CNN."""


def best_arm(results: Results, name: str) -> str | None:
    """The arm with the lowest mean loss on the valid sequences; None until every rate is measured."""
    tried = tuple(arms_of(BASES[results.scale], name))
    return min(tried, key=lambda arm: loss(results, [arm])) if all(map(results.of, tried)) else None


def scores(results: Results, name: str, metric: str, part: str = "test") -> list[float]:
    """A metric of the best arm of an architecture for each seed."""
    arm = best_arm(results, name)
    found = [own[metric] for own in results.values(arm, part)] if arm else []
    return [value for value in found if value is not None]


def thresholds(results: Results) -> list[Threshold]:
    """Every model learns the task, and Mamba is about as good as the CNN."""
    accuracy = {name: scores(results, name, "accuracy") for name in ("mamba", "cnn")}
    both = all(accuracy.values())
    ahead = (
        sum(accuracy["mamba"]) / len(accuracy["mamba"]) - sum(accuracy["cnn"]) / len(accuracy["cnn"]) if both else None
    )
    return [
        *(
            Threshold(
                f"AUROC of {WORDS[name]}",
                scores(results, name, "auroc") or [None],
                at_least=LEAST_AUROC,
                show="{:.3f}".format,
            )
            for name in ARCHITECTURES
        ),
        Threshold("accuracy of Mamba minus that of the CNN", [ahead], at_least=-MOST_BEHIND, show=signed),
    ]


def sections(results: Results) -> dict[str, str]:
    """The sections of the report."""
    return {
        "Test sequences": score_table(results),
        "Held-out files": held_out_table(results),
        "Rates": rate_table(results),
        "Speed": speed_table(results),
    }


def score_table(results: Results) -> str:
    """Each metric at the best rate, with its interval over seeds, and the split."""
    rows = []
    for name in ARCHITECTURES:
        arm = best_arm(results, name)
        if arm:
            parameters = f"{results.of(arm)[0].values['parameters']:,}"
            rows.append([WORDS[name], parameters, *(with_interval(scores(results, name, m)) for m in METRICS)])
    if not rows:
        return ""
    values = results.records[0].values
    counts = ", ".join(f"{n:,} {part}" for part, n in values["sequences"].items())
    header = ("", "parameters", *(METRIC_WORDS[m] for m in METRICS))
    words = f"In brackets the 95 % interval over seeds. Sequences: {counts}; digest of the split {values['split']}."
    return f"{table(header, rows)}\n\n{words}"


def held_out_table(results: Results) -> str:
    """Each metric of the arms with the best rate on the held-out files; "" if there was none."""
    rows = []
    for name in ARCHITECTURES:
        arm = best_arm(results, name)
        own = [r.values["held_out"] for r in results.of(arm) if "held_out" in r.values] if arm else []
        for file in sorted({file for found in own for file in found}):
            scores = [found[file] for found in own if file in found]
            known = f"{scores[0]['sequences']:,} ({scores[0]['left_out']:,})"
            cells = (with_interval([one[m] for one in scores if one[m] is not None]) for m in METRICS)
            rows.append([f"`{file}`", known, WORDS[name], *cells])
    header = ("file", "sequences (left out)", "", *(METRIC_WORDS[m] for m in METRICS))
    words = "Left out are sequences that the file of the experiment has, too, on either strand."
    return f"{table(header, sorted(rows, key=lambda row: row[0]))}\n\n{words}" if rows else ""


def with_interval(values: list[float]) -> str:
    """The mean of values and its interval."""
    if not values:
        return ""
    found = interval(values)
    return f"{found.mean:.3f}" + ("" if found.low is None else f" ({found.low:.3f} to {found.high:.3f})")


def rate_table(results: Results) -> str:
    """The loss and the accuracy on the valid sequences at each rate."""
    rows = []
    for name in ARCHITECTURES:
        for arm, rate in arms_of(BASES[results.scale], name).items():
            own = [one["accuracy"] for one in results.values(arm, "valid")]
            if own:
                rows.append([WORDS[name], f"{rate:g}", f"{loss(results, [arm]):.4f}", with_interval(own)])
    header = ("", "peak rate", "nats a sequence, valid", "accuracy, valid")
    return f"{table(header, rows)}\n\nThe rate with the lowest loss is used." if rows else ""
