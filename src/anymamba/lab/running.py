"""Runs an experiment: measures every arm that is not finished, then writes the charts and the report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

import torch

from anymamba.base.errors import InUseError
from anymamba.base.files import own_file, own_folder
from anymamba.base.sizes import require_sizes
from anymamba.lab.charts import new_figure
from anymamba.lab.experiment import Arm, Context, Experiment, Record, Results, Scale, record_key
from anymamba.lab.report import write_report
from anymamba.lab.results import as_json, machine, read_checked, today, write_results
from anymamba.lab.saving import SUFFIX, OutOfTime, Saving

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
    data: Path | None = None,
    max_seconds: float = math.inf,
) -> Results:
    """Measure what is missing in the folder and write results.json, the charts and report.md there.

    results.json is written after every arm, and keeps what other processes have added to it. An arm in it is never
    measured again, so after an interruption the same call continues. Several processes may share a folder: an arm that
    another one is measuring is left to it, and waited for at the end. The report covers all finished arms of the scale
    in the folder, not only those of this call, and lists the missing ones.

    Args:
        seeds: number of seeds for every arm; defaults to the number in the arm.
        only: names of arms; defaults to all.
        data: a folder with data that an experiment needs and that do not belong to the package.
        max_seconds: stop after this time. An arm that saves its state goes on from there with the next call; of others
            what is not finished is lost.
    Before anything is measured, raises ValueError for an unknown arm or if the folder holds results of other settings,
    ImportError if matplotlib is missing, and OSError if the folder cannot be written.
    """
    arms, device = experiment.arms(scale), torch.device(device)
    if seeds is not None:
        require_sizes(seeds=seeds)
    counts = {arm.name: seeds or arm.seeds for arm in arms}

    def with_file(*records: Record) -> Results:
        return arranged(experiment, scale, counts, [*read_checked(folder, experiment.name, scale, arms), *records])

    def finished() -> set[str]:
        return {record.key for record in with_file().records}

    def missing(pairs: Iterable[tuple[Arm, int]]) -> list[tuple[Arm, int]]:
        known = finished()
        return [(arm, seed) for arm, seed in pairs if record_key(arm.name, seed) not in known]

    todo = missing((arm, seed) for arm in chosen(arms, only) for seed in range(counts[arm.name]))
    if todo:
        new_figure()
    deadline = time.monotonic() + max_seconds
    with closing(one_by_one(folder, todo, finished)) as turns, suppress(OutOfTime):
        for i, (arm, seed) in turns:
            if missing([(arm, seed)]):  # else another process has measured it meanwhile
                if time.monotonic() >= deadline:
                    break
                label = f"{arm.name}, seed {seed} ({i + 1} of {len(todo)})"
                saving = Saving(folder / f"{record_key(arm.name, seed)}{SUFFIX}", as_json(arm.settings))
                saving.deadline = deadline
                told = partial(progress, label)
                context = Context(device, seed, told, saving, data, with_file)
                record = measure(experiment, arm, context)
                with own_folder(folder, wait=None):
                    write_results(folder, with_file(record))
                saving.delete()
    with own_folder(folder, wait=None):
        results = with_file()
        write_results(folder, results)
        write_report(folder, experiment, results)
    return results


def one_by_one(
    folder: Path, todo: Sequence[tuple[Arm, int]], finished: Callable[[], set[str]]
) -> Generator[tuple[int, tuple[Arm, int]], None, None]:
    """Number, arm and seed of what is to be measured, each while no other process measures it in this folder.

    What another process is measuring comes last, when that is finished, and so does what needs it. An arm that needs
    what nobody measures comes all the same.

    Args:
        finished: returns the keys of the records that the folder has by now.
    """
    left = list(enumerate(todo))
    while left:
        known = finished()
        ready = [(i, (arm, seed)) for i, (arm, seed) in left if known.issuperset(arm.needs(seed))]
        for i, (arm, seed) in ready:
            with ExitStack() as turn:
                try:
                    turn.enter_context(own_file(folder / record_key(arm.name, seed), wait=0.0))
                except InUseError:
                    continue
                left.remove((i, (arm, seed)))
                yield i, (arm, seed)
        if left:
            arm, seed = left[0][1]
            awaited = [record_key(arm.name, seed)] if left[0] in ready else arm.needs(seed)
            for key in awaited:
                wait_for(folder, key)
            if left[0] not in ready and not finished().issuperset(awaited):
                yield left.pop(0)


def wait_for(folder: Path, key: str) -> None:
    """Wait until no other process measures an arm."""
    with own_file(folder / key, wait=None):
        pass


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
        raise ValueError(f"unknown arm {sorted(unknown)[0]!r}; the arms are {', '.join(arm.name for arm in arms)}")
    return [arm for arm in arms if not only or arm.name in only]


def measure(experiment: Experiment, arm: Arm, context: Context) -> Record:
    """Measure an arm once, from a fresh random state."""
    torch.manual_seed(context.seed)
    start = time.perf_counter()
    values = experiment.measure(arm.settings, context)
    seconds = time.perf_counter() - start
    settings, where = as_json(arm.settings), machine(context.device)
    return Record(arm.name, context.seed, settings, as_json(values), round(seconds, 1), where, today())
