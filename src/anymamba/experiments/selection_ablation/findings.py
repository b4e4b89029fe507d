"""The findings: thresholds, and table 7 on selective copying."""

from __future__ import annotations

from anymamba.experiments.selection_ablation.arms import SELECTIVE
from anymamba.lab.charts import percent, spread, table
from anymamba.lab.experiment import Results, Threshold

WORDS = {"none": "none", "B": "B", "C": "C", "delta": "Δ", "all": "Δ, B, C"}


def thresholds(results: Results) -> list[Threshold]:
    """Selection solves copying, and nothing selective does not."""
    whole, without = (results.mean(f"copying-{name}", "accuracy") for name in ("all", "none"))
    lost = whole - without if whole is not None and without is not None else None
    return [
        Threshold("copying: accuracy with Δ, B, C selective, %", [whole], at_least=0.95, show=percent),
        Threshold("copying: how far none is below that, points", [lost], at_least=0.25, show=percent),
    ]


def sections(results: Results) -> dict[str, str]:
    """The section of the report."""
    rows = []
    for name in SELECTIVE:
        accuracies = results.values(f"copying-{name}", "accuracy")
        if accuracies:
            parameters = results.values(f"copying-{name}", "parameters")[0]
            rows.append([WORDS[name], f"{parameters:,}", spread(accuracies, scale=100)])
    return {"What is selective": table(("selective", "parameters", "answers that are right, %"), rows)}
