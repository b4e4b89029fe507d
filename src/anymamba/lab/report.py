"""Writes reports: verdict, protocol, sections of the experiment, thresholds, charts, settings, how it was run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from anymamba.base.files import write_text
from anymamba.lab.charts import save_figure, table
from anymamba.lab.experiment import Experiment, Results, Threshold, Verdict
from anymamba.lab.results import FILE
from anymamba.models.config import ModelConfig

NOTES = "notes.md"
"""An optional file in a results folder that says how the settings were chosen and what was tried."""
UNJUDGED = (
    "**Not judged.** The scale `toy` shows that everything runs; the thresholds are for the larger scales. "
    "`--scale cpu` gives a verdict."
)
"""The verdict at the scale toy."""


def write_report(folder: Path, experiment: Experiment, results: Results) -> None:
    """Write the charts and report.md; before anything is measured there are no charts and no sections."""
    drawn = {name: draw(results) for name, draw in experiment.figures.items() if results.records}
    figures = {name: figure for name, figure in drawn.items() if figure is not None}
    for name, figure in figures.items():
        save_figure(figure, folder, name)
    text = report(experiment, results, list(figures), with_notes=(folder / NOTES).exists())
    write_text(folder / "report.md", text)


def report(experiment: Experiment, results: Results, charts: Sequence[str] = (), with_notes: bool = False) -> str:
    """The report in Markdown, with links to files in the same folder."""
    thresholds, judged = experiment.thresholds(results), results.scale != "toy"
    parts = [f"# {experiment.title}", verdicts(thresholds) if judged else UNJUDGED, experiment.protocol.strip()]
    if with_notes:
        parts.append(f"How the settings were chosen, and what else was tried, is in the [notes]({NOTES}).")
    for heading, text in experiment.sections(results).items() if results.records else ():
        parts += [f"## {heading}", text] if text else []
    rule = "Set before running. Of several numbers each must hold." if judged else "Set for the larger scales."
    parts += ["## Thresholds", rule, thresholds_table(thresholds, judged)]
    parts += [f"![{name}]({name}.svg)" for name in charts]
    parts += ["## Settings", settings_table(experiment, results), "## How it was run", how_it_was_run(results)]
    return "\n\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------------------------- thresholds


def verdicts(thresholds: Sequence[Threshold]) -> str:
    """A paragraph that says how many thresholds hold, and which do not."""
    named: dict[Verdict, list[str]] = {"holds": [], "fails": [], "tie": [], "not judged": []}
    for threshold in thresholds:
        named[threshold.verdict].append(threshold.what)
    words = [f"**{len(named['holds'])} of {len(thresholds)} thresholds hold.**"]
    if named["fails"]:
        words.append(f"These fail: {'; '.join(named['fails'])}.")
    if named["tie"]:
        words.append(f"These are ties: {'; '.join(named['tie'])}.")
    if named["not judged"]:
        words.append(f"{len(named['not judged'])} cannot be judged: what they need is not measured.")
    return " ".join(words)


def thresholds_table(thresholds: Sequence[Threshold], judged: bool = True) -> str:
    """A table of every threshold and its result: of several numbers the smallest and the largest."""
    marks: dict[Verdict, str] = {"fails": "**fails**"}
    rows = []
    for t in thresholds:
        ends = dict.fromkeys(map(t.show, (min(t.measured), max(t.measured)) if t.measured else ()))
        verdict = t.verdict if judged else "not judged"
        rows.append([t.what, t.wanted, " to ".join(ends), marks.get(verdict, verdict)])
    return table(("what", "wanted", "got", ""), rows)


# ----------------------------------------------------------------------------------------------------------- settings


def settings_table(experiment: Experiment, results: Results) -> str:
    """A table of every setting with its value, or its values in the order of the arms.

    Of a model's config it shows only the fields that some arm sets.
    """
    values: dict[str, list[str]] = {}
    hidden: dict[str, bool] = {}
    for arm in experiment.arms(results.scale):
        if arm.name in results.arms:
            for name, (value, is_default) in leaves(arm.settings).items():
                values.setdefault(name, []).append(value)
                hidden[name] = is_default and hidden.get(name, True)
    rows = [[f"`{name}`", "; ".join(dict.fromkeys(v))] for name, v in values.items() if not hidden[name]]
    return f"{table(('setting', 'value'), rows)}\n\nWhich arm has which is in [{FILE}]({FILE})."


def leaves(settings: Any, prefix: str = "", in_model: bool = False) -> dict[str, tuple[str, bool]]:
    """Every setting by its dotted name: its value as text, and whether it is a default of a model's config."""
    in_model = in_model or isinstance(settings, ModelConfig)
    found: dict[str, tuple[str, bool]] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            found |= leaves(value, f"{prefix}{field.name}.", in_model)
        else:
            found[prefix + field.name] = in_words(value), in_model and value == field.default
    return found


def in_words(value: Any) -> str:
    """The value of a setting as text."""
    if is_dataclass(value) and not isinstance(value, type):
        return f"({', '.join(f'{field.name} {in_words(getattr(value, field.name))}' for field in fields(value))})"
    if isinstance(value, tuple):
        return ", ".join(map(in_words, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


# ---------------------------------------------------------------------------------------------------- how it was run


def how_it_was_run(results: Results) -> str:
    """The section that says what was run, where and for how long, and what is missing."""
    rows = []
    for arm in results.arms:
        records = results.of(arm)
        machines, dates = ({getattr(r, name) for r in records} for name in ("machine", "date"))
        span = time_span([seconds_of(record) for record in records])
        rows.append([arm, str(len(records)), span, "; ".join(sorted(machines)), ", ".join(sorted(dates))])
    whole = [sum(end(map(seconds_of, results.of(arm))) for arm in results.arms) for end in (min, max)]
    parts = [
        f"`anymamba experiment {results.experiment} --scale {results.scale}`",
        table(("arm", "seeds", "time a seed", "machine", "date"), rows),
        f"One seed of all these arms, one after another: {time_span(whole)}.",
    ]
    missing = [key for key in results.planned if key not in {record.key for record in results.records}]
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}.")
    return "\n\n".join(parts)


def seconds_of(record: Record) -> float:
    """The time of an arm. Earlier versions counted only the last part of one that was resumed; it is as long as its
    training at least."""
    return max(record.seconds, record.values.get("training_seconds") or 0.0)


def time_span(seconds: Sequence[float]) -> str:
    """The shortest and the longest time, or the only one."""
    return " to ".join(dict.fromkeys(duration(end) for end in (min(seconds), max(seconds))))


def duration(seconds: float) -> str:
    """A time in seconds; from one minute on, in minutes."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
