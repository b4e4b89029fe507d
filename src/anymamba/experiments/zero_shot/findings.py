"""The findings: the table, and thresholds that the pipeline must meet."""

from __future__ import annotations

from anymamba.lab.charts import signed
from anymamba.lab.experiment import Results, Threshold
from anymamba.lab.zero_shot import TASKS, table_3

NEAR_CHANCE = 10.0
"""Points by which an accuracy of a small model may be below a guess: more would be a mistake in a task."""


def thresholds(results: Results) -> list[Threshold]:
    """No task is far below a guess, and LAMBADA's last words are more likely than a guess among 50,000 words."""
    records = results.records
    below = [
        r.values["scores"][name] - task.chance
        for r in records
        for name, task in TASKS.items()
        if name in r.values["scores"]
    ]
    perplexities = [r.values["scores"]["perplexity"] for r in records if "perplexity" in r.values["scores"]]
    return [
        Threshold("accuracy minus that of a guess, points", below or [None], at_least=-NEAR_CHANCE, show=points),
        Threshold("perplexity of LAMBADA's last words", perplexities or [None], below=50_000.0, show="{:,.1f}".format),
    ]


def points(value: float) -> str:
    """A difference in percent."""
    return signed(value, 1)


def sections(results: Results) -> dict[str, str]:
    """Table 3 with our models first, and the documents of each task."""
    if not results.records:
        return {"Table 3": ""}
    ours = {record.key: record.values["scores"] for record in results.records}
    counts = results.records[0].values["documents"]
    words = ", ".join(f"{TASKS[name].words} {count:,}" for name, count in counts.items())
    return {"Table 3": f"{table_3(ours)}\n\nDocuments: {words}."}
