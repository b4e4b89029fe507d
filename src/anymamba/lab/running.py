"""Runs an experiment: every arm that is not finished yet, then the charts and the report."""

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

    results.json is written after every arm, with what other processes have added to it since. An arm that it holds is
    never measured again: after an interruption the same call goes on. The report is of all arms of the scale that the
    folder holds, also of those that this call does not ask for, and names the others.

    Args:
        seeds: of every arm; defaults to as many as the arm says.
        only: names of arms; defaults to all.
    Raises ValueError for a name that no arm has, or where the folder holds results of other settings; ImportError where
    matplotlib is missing; OSError where the folder cannot be written: all before anything is measured.
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
    """The records in the order of the plan, which has as many seeds of an arm as are wanted or finished."""
    by_key = {record.key: record for record in records}
    planned = []
    for arm, wanted in counts.items():
        finished = [record.seed + 1 for record in records if record.arm == arm]
        planned += [record_key(arm, seed) for seed in range(max([wanted, *finished]))]
    found = tuple(by_key[key] for key in planned if key in by_key)
    return Results(experiment.name, scale, found, tuple(planned))


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
    values = experiment.measure(arm.settings, Context(device, seed, progress))
    seconds = time.perf_counter() - start
    return Record(arm.name, seed, as_json(arm.settings), as_json(values), round(seconds, 1), machine(device), today())
