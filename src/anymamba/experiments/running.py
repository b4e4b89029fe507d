"""Runs an experiment: every arm that is not finished yet, then the charts and the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from anymamba.experiments.charts import new_figure, save_figure
from anymamba.experiments.experiment import Arm, Context, Experiment, Record, Results, Scale
from anymamba.experiments.results import ResultStore, as_json, machine, today, write_text

Progress = Callable[[str, float, float, str], None]
"""Told now and then: the arm, how much of it is done, of how much, and words."""


def run_experiment(
    experiment: Experiment,
    scale: Scale,
    folder: Path,
    *,
    seeds: int | None = None,
    only: Sequence[str] = (),
    device: torch.device | str = "cpu",
    progress: Progress = lambda arm, done, total, text: None,
) -> Results:
    """Measure what is missing in the folder and write results.json, the charts and report.md there.

    An arm that is finished is never measured again; after an interruption the same call goes on. The report is of all
    arms of the scale that the folder holds, also of those that this call does not ask for, and names the others.

    Args:
        seeds: of every arm; absent means as many as the arm says.
        only: names of arms; empty means all.
    Raises ValueError for a name that no arm has, or where the folder holds results of other settings; ImportError where
    matplotlib is missing; OSError where the folder cannot be written: all before anything is measured.
    """
    every = experiment.arms(scale)
    counts = {arm.name: arm.seeds if seeds is None else seeds for arm in every}
    if min(counts.values()) < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    store, device = ResultStore(folder, experiment.name, scale), torch.device(device)
    store.check()
    missing = [(a, s) for a in chosen(every, only) for s in range(counts[a.name]) if store.finished(a, s) is None]
    planned = {arm.name: max(counts[arm.name], store.seeds_of(arm)) for arm in every}
    if missing:
        store.prepare()
        new_figure()
    for i, (arm, seed) in enumerate(missing):
        label = f"{arm.name}, seed {seed} ({i + 1} of {len(missing)})"
        store.add(measure(experiment, arm, seed, device, lambda *told, label=label: progress(label, *told)))
        store.write_summary(store.load(every, planned))
    return write_report(experiment, store, every, planned)


def chosen(arms: Sequence[Arm], only: Sequence[str]) -> list[Arm]:
    """The arms of these names, or all."""
    unknown = set(only) - {arm.name for arm in arms}
    if unknown:
        raise ValueError(f"no arm {sorted(unknown)[0]!r}; there are {', '.join(arm.name for arm in arms)}")
    return [arm for arm in arms if not only or arm.name in only]


def measure(
    experiment: Experiment, arm: Arm, seed: int, device: torch.device, progress: Callable[[float, float, str], None]
) -> Record:
    """Measure an arm once, from a fresh random state."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    values = experiment.measure(arm, Context(device, seed, progress))
    seconds = time.perf_counter() - start
    return Record(arm.name, seed, as_json(arm.settings), as_json(values), round(seconds, 1), machine(device), today())


def write_report(experiment: Experiment, store: ResultStore, arms: Sequence[Arm], seeds: dict[str, int]) -> Results:
    """Write results.json, the charts and report.md from what is finished."""
    results = store.load(arms, seeds)
    store.write_summary(results)
    names = [name for name, figure in experiment.figures(results).items() if save_figure(figure, store.folder, name)]
    charts = "\n\n".join(f"![{name}]({name}.png)" for name in names)
    parts = [f"# {experiment.title}", experiment.report(results).strip(), charts, provenance(experiment, results)]
    write_text(store.folder / "report.md", "\n\n".join(part for part in parts if part) + "\n")
    return results


def provenance(experiment: Experiment, results: Results) -> str:
    """What was run, where, for how long, and what is missing."""
    lines = [
        "## How it was run",
        "",
        f"`anymamba experiment {experiment.name} --scale {results.scale}`. Settings of every arm are in "
        "[results.json](results.json).",
        "",
        "| arm | seeds | time a seed | machine | date |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm in results.arms:
        records = results.of(arm)
        span = time_span([record.seconds for record in records])
        machines, dates = ({getattr(r, name) for r in records} for name in ("machine", "date"))
        lines.append(f"| {arm} | {len(records)} | {span} | {'; '.join(machines)} | {', '.join(sorted(dates))} |")
    whole = [sum(choose(r.seconds for r in results.of(arm)) for arm in results.arms) for choose in (min, max)]
    lines += ["", f"One seed of all these arms, one after another: {time_span(whole)}."]
    if results.scale in ("cpu", "gpu"):
        lines += ["", "The plan: three seeds of an arm that takes less than five minutes, one of the others."]
    missing = [key for key in results.planned if key not in {record.key for record in results.records}]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    return "\n".join(lines)


def time_span(seconds: Sequence[float]) -> str:
    """The least and the greatest time, or the one that there is."""
    return " to ".join(dict.fromkeys(duration(end) for end in (min(seconds), max(seconds))))


def duration(seconds: float) -> str:
    """A time in seconds, or from a minute on in minutes."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
