"""Runs an experiment: measures every arm that is not finished, then writes the charts and the report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

import torch

from anymamba.base.errors import InUseError, one_line
from anymamba.base.files import own_file, own_folder
from anymamba.base.sizes import require_sizes
from anymamba.lab.charts import new_figure
from anymamba.lab.experiment import Arm, Context, Experiment, Record, Results, Scale, record_key
from anymamba.lab.report import write_report
from anymamba.lab.results import as_json, machine, read_checked, today, write_results
from anymamba.lab.saving import SUFFIX, OutOfTime, Saving

FAILED = ".failed"
"""Ends the name of a file that says why an arm has failed."""
LOOK = 0.5
"""Seconds between two looks at what other processes are measuring."""

Progress = Callable[[str, float, float, str], None]
"""Called now and then with the arm, the work done, the total work, and a text."""


class Failures:
    """Arms that have failed, in files beside the results, so that all processes of a run leave them alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, key: str, error: Exception) -> None:
        """Note why an arm has failed."""
        (self.folder / f"{key}{FAILED}").write_text(f"{type(error).__name__}: {one_line(error)}", encoding="utf-8")

    def found(self) -> dict[str, str]:
        """Why each arm has failed, by its key."""
        files = sorted(self.folder.glob(f"*{FAILED}"))
        return {file.name.removesuffix(FAILED): file.read_text("utf-8") for file in files}

    def forget(self) -> None:
        """Delete the files."""
        for file in self.folder.glob(f"*{FAILED}"):
            file.unlink(missing_ok=True)


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
    failures: Failures | None = None,
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
        failures: where an arm that fails is noted; the others are measured all the same. None: its error is raised.
    Before anything is measured, raises ValueError for an unknown arm, for seeds where they change nothing, or if the
    folder holds results of other settings, ImportError if matplotlib is missing, and OSError if the folder cannot be
    written.
    """
    arms, device = experiment.arms(scale), torch.device(device)
    if seeds is not None:
        require_sizes(seeds=seeds)
    if not experiment.has_seeds and seeds not in (None, 1):
        raise ValueError(
            f"{experiment.name} gives the same numbers for every seed, got seeds {seeds}; leave seeds away"
        )
    counts = {arm.name: seeds or arm.seeds for arm in arms}

    def with_file(*records: Record) -> Results:
        return arranged(experiment, scale, counts, [*read_checked(folder, experiment.name, scale, arms), *records])

    def finished() -> set[str]:
        return {record.key for record in with_file().records}

    def through() -> set[str]:
        return finished() | (failures.found().keys() if failures else set())

    known = finished()
    turns = [(arm, seed) for arm in chosen(arms, only) for seed in range(counts[arm.name])]
    todo = [(arm, seed) for arm, seed in turns if record_key(arm.name, seed) not in known]
    if todo:
        new_figure()
    deadline = time.monotonic() + max_seconds
    with closing(one_by_one(folder, todo, through, deadline)) as turn, suppress(OutOfTime):
        for i, (arm, seed) in turn:
            key = record_key(arm.name, seed)
            saving = Saving(folder / f"{key}{SUFFIX}", as_json(arm.settings))
            saving.deadline = deadline
            told = partial(progress, f"{arm.name}, seed {seed} ({i + 1} of {len(todo)})")
            context = Context(device, seed, told, saving, data, with_file)
            try:
                record = measure(experiment, arm, context)
            except OutOfTime:
                raise
            except Exception as error:
                if failures is None:
                    raise
                failures.add(key, error)
                continue
            with own_folder(folder, wait=None):
                write_results(folder, with_file(record))
            saving.delete()
    with own_folder(folder, wait=None):
        results = with_file()
        write_results(folder, results)
        write_report(folder, experiment, results)
    return results


def one_by_one(
    folder: Path,
    todo: Sequence[tuple[Arm, int]],
    through: Callable[[], set[str]],
    deadline: float,
) -> Generator[tuple[int, tuple[Arm, int]], None, None]:
    """Number, arm and seed of what is to be measured, each while no other process measures it in this folder.

    What another process is measuring comes last, if that does not finish it, and so does what needs it. An arm that
    needs what nobody measures comes all the same.

    Args:
        through: returns the keys of what the folder has by now: records, and arms that have failed.
        deadline: of `time.monotonic`; nothing comes after it.
    """
    left = {record_key(arm.name, seed): (i, (arm, seed)) for i, (arm, seed) in enumerate(todo)}
    while left:
        took, known = False, through()
        for key, (i, (arm, seed)) in tuple(left.items()):
            if time.monotonic() >= deadline:
                return
            if key in known:
                left.pop(key)
                continue
            if any(need in left or is_owned(folder / need) for need in set(arm.needs(seed)) - known):
                continue
            with ExitStack() as turn:
                try:
                    turn.enter_context(own_file(folder / key, wait=0.0))
                except InUseError:
                    continue
                left.pop(key)
                took = True
                if key not in through():  # else another process has just done it
                    yield i, (arm, seed)
        if left and not took:
            time.sleep(LOOK)


def is_owned(path: Path) -> bool:
    """Whether another process owns a file."""
    try:
        with own_file(path, wait=0.0):
            return False
    except InUseError:
        return True


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
    seconds = time.perf_counter() - start + (context.saving.seconds_before() if context.saving else 0.0)
    settings, where = as_json(arm.settings), machine(context.device)
    return Record(arm.name, context.seed, settings, as_json(values), round(seconds, 1), where, today())
