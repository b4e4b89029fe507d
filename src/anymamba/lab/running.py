"""Runs an experiment: measures every arm that is not finished, then writes the charts and the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from anymamba.base.sizes import require_sizes
from anymamba.lab.charts import new_figure
from anymamba.lab.experiment import Arm, Context, Experiment, Record, Results, Scale, record_key
from anymamba.lab.report import write_report
from anymamba.lab.results import as_json, machine, prepare_folder, read_checked, today, write_results

Progress = Callable[[str, float, float, str], None]
"""Called now and then with the arm, the work done, the total work, and a text."""


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

    results.json is written after every arm, and keeps what other processes have added to it. An arm in it is never
    measured again, so after an interruption the same call continues. The report covers all finished arms of the scale
    in the folder, not only those of this call, and lists the missing ones.

    Args:
        seeds: number of seeds for every arm; defaults to the number in the arm.
        only: names of arms; defaults to all.
    Before anything is measured, raises ValueError for an unknown arm or if the folder holds results of other settings,
    ImportError if matplotlib is missing, and OSError if the folder cannot be written.
    """
    arms, device = experiment.arms(scale), torch.device(device)
    if seeds is not None:
        require_sizes(seeds=seeds)
    counts = {arm.name: seeds or arm.seeds for arm in arms}

    def with_file(*records: Record) -> Results:
        return arranged(experiment, scale, counts, [*read_checked(folder, experiment.name, scale, arms), *records])

    results = with_file()
    finished = {record.key for record in results.records}
    wanted = [(arm, seed) for arm in chosen(arms, only) for seed in range(counts[arm.name])]
    missing = [(arm, seed) for arm, seed in wanted if record_key(arm.name, seed) not in finished]
    if missing:
        prepare_folder(folder)
        new_figure()
    for i, (arm, seed) in enumerate(missing):
        label = f"{arm.name}, seed {seed} ({i + 1} of {len(missing)})"
        record = measure(experiment, arm, seed, device, lambda *told, label=label: progress(label, *told))
        results = with_file(*results.records, record)
        write_results(folder, results)
    results = with_file(*results.records)
    write_results(folder, results)
    write_report(folder, experiment, results)
    return results


def arranged(experiment: Experiment, scale: Scale, counts: dict[str, int], records: Sequence[Record]) -> Results:
    """The records in the order of the plan; for each arm it has the requested seeds, or more if more are finished."""
    by_key = {record.key: record for record in records}
    planned = []
    for arm, wanted in counts.items():
        finished = [record.seed + 1 for record in records if record.arm == arm]
        planned += [record_key(arm, seed) for seed in range(max([wanted, *finished]))]
    found = tuple(by_key[key] for key in planned if key in by_key)
    return Results(experiment.name, scale, found, tuple(planned))


def chosen(arms: Sequence[Arm], only: Sequence[str]) -> list[Arm]:
    """The arms with these names, or all."""
    unknown = set(only) - {arm.name for arm in arms}
    if unknown:
        raise ValueError(f"unknown arm {sorted(unknown)[0]!r}; there are {', '.join(arm.name for arm in arms)}")
    return [arm for arm in arms if not only or arm.name in only]


def measure(
    experiment: Experiment, arm: Arm, seed: int, device: torch.device, progress: Callable[[float, float, str], None]
) -> Record:
    """Measure an arm once, from a fresh random state."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    values = experiment.measure(arm.settings, Context(device, seed, progress))
    seconds = time.perf_counter() - start
    return Record(arm.name, seed, as_json(arm.settings), as_json(values), round(seconds, 1), machine(device), today())
