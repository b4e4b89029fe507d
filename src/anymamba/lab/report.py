"""The report of every experiment: verdict, protocol, its own sections, thresholds, charts, settings, how it was run."""

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
"""A file that a folder of results may hold: how the settings were chosen, what was tried."""


def write_report(folder: Path, experiment: Experiment, results: Results) -> None:
    """Write the charts and report.md."""
    figures = {name: figure for name, draw in experiment.figures.items() if (figure := draw(results)) is not None}
    for name, figure in figures.items():
        save_figure(figure, folder, name)
    text = report(experiment, results, list(figures), with_notes=(folder / NOTES).exists())
    write_text(folder / "report.md", text)


def report(experiment: Experiment, results: Results, charts: Sequence[str] = (), with_notes: bool = False) -> str:
    """The report in Markdown, with links to files beside it."""
    thresholds = experiment.thresholds(results)
    parts = [f"# {experiment.title}", verdicts(thresholds), experiment.protocol.strip()]
    if with_notes:
        parts.append(f"How the settings were chosen, and what else was tried, is in the [notes]({NOTES}).")
    for heading, text in experiment.sections(results).items():
        parts += [f"## {heading}", text] if text else []
    parts += ["## Thresholds", "Set before running. Of several seeds each must hold.", thresholds_table(thresholds)]
    parts += [f"![{name}]({name}.svg)" for name in charts]
    parts += ["## Settings", settings_table(experiment, results), "## How it was run", how_it_was_run(results)]
    return "\n\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------------------------- thresholds


def verdicts(thresholds: Sequence[Threshold]) -> str:
    """How many thresholds hold, and which do not."""
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


def thresholds_table(thresholds: Sequence[Threshold]) -> str:
    """Every threshold with what came out: of several numbers the least and the greatest."""
    rows = []
    for t in thresholds:
        ends = dict.fromkeys(map(t.show, (min(t.measured), max(t.measured)) if t.measured else ()))
        rows.append([t.what, t.wanted, " to ".join(ends), "**fails**" if t.verdict == "fails" else t.verdict])
    return table(("what", "wanted", "got", ""), rows)


# ----------------------------------------------------------------------------------------------------------- settings


def settings_table(experiment: Experiment, results: Results) -> str:
    """Every setting with its value, or its values in the order of the arms.

    Of a model's configuration only what some arm sets is shown.
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
    """Every setting by its dotted name: its value in words, and whether it is a default of a model's configuration."""
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
    """A setting's value: a number, words, or several of them."""
    if is_dataclass(value) and not isinstance(value, type):
        return f"({', '.join(f'{field.name} {in_words(getattr(value, field.name))}' for field in fields(value))})"
    if isinstance(value, tuple):
        return ", ".join(map(in_words, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


# ---------------------------------------------------------------------------------------------------- how it was run


def how_it_was_run(results: Results) -> str:
    """What was run, where, for how long, and what is missing."""
    rows = []
    for arm in results.arms:
        records = results.of(arm)
        machines, dates = ({getattr(r, name) for r in records} for name in ("machine", "date"))
        span = time_span([record.seconds for record in records])
        rows.append([arm, str(len(records)), span, "; ".join(sorted(machines)), ", ".join(sorted(dates))])
    whole = [sum(end(r.seconds for r in results.of(arm)) for arm in results.arms) for end in (min, max)]
    parts = [
        f"`anymamba experiment {results.experiment} --scale {results.scale}`",
        table(("arm", "seeds", "time a seed", "machine", "date"), rows),
        f"One seed of all these arms, one after another: {time_span(whole)}.",
    ]
    if results.scale in ("cpu", "gpu"):
        parts.append("The plan: three seeds of an arm that takes less than five minutes, one of the others.")
    missing = [key for key in results.planned if key not in {record.key for record in results.records}]
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}.")
    return "\n\n".join(parts)


def time_span(seconds: Sequence[float]) -> str:
    """The least and the greatest time, or the one that there is."""
    return " to ".join(dict.fromkeys(duration(end) for end in (min(seconds), max(seconds))))


def duration(seconds: float) -> str:
    """A time in seconds, or from a minute on in minutes."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
