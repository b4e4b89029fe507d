"""Runs an experiment: every arm that is not finished yet, then the charts and the report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from anymamba.experiments.charts import save_figure
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
    that the folder holds, also of arms and seeds that this call does not ask for.

    Args:
        seeds: of every arm; absent means as many as the arm says.
        only: names of arms; empty means all.
    Raises ValueError for a name that no arm has, or where the folder holds results of other settings.
    """
    arms = chosen(experiment.arms(scale), only)
    counts = {arm.name: arm.seeds if seeds is None else seeds for arm in arms}
    if min(counts.values()) < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    store, device = ResultStore(folder, experiment.name, scale), torch.device(device)
    every = experiment.arms(scale)
    shown = {arm.name: max(counts.get(arm.name, 0), store.seeds_of(arm)) for arm in every}
    missing = [(a, s) for a in arms for s in range(counts[a.name]) if store.finished(a, s) is None]
    for i, (arm, seed) in enumerate(missing):
        label = f"{arm.name}, seed {seed} ({i + 1} of {len(missing)})"
        store.add(measure(experiment, arm, seed, device, lambda *told, label=label: progress(label, *told)))
    return write_report(experiment, store, [arm for arm in every if shown[arm.name]], shown)


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
        "| arm | seeds | minutes a seed | machine | date |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm in results.arms:
        records = results.of(arm)
        minutes = sorted(record.seconds / 60 for record in records)
        span = (
            f"{minutes[0]:.1f}" if math.isclose(minutes[0], minutes[-1]) else f"{minutes[0]:.1f} to {minutes[-1]:.1f}"
        )
        machines, dates = ({getattr(r, name) for r in records} for name in ("machine", "date"))
        lines.append(f"| {arm} | {len(records)} | {span} | {'; '.join(machines)} | {', '.join(sorted(dates))} |")
    missing = [key for key in results.planned if key not in {record.key for record in results.records}]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    return "\n".join(lines)
