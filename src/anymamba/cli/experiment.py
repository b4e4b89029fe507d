"""`anymamba experiment`: runs one of the paper's experiments and writes its results, charts and report."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from anymamba.console.flags import read_flags
from anymamba.console.output import print_json, progress_bar, say


@dataclass(frozen=True)
class ExperimentOptions:
    """Run an experiment: selective-copying, induction-heads, associative-recall, scaling, language-ablations,
    zero-shot, selection-ablation, dna-size, dna-length, great-apes, promoters, speed.

    results.json is written after every arm. After an interruption, the same command measures only what is missing.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Which experiment; `list` prints what each shows."""
    scale: Literal["toy", "cpu", "gpu", "paper"] = "cpu"
    """toy: seconds, to try it. cpu: an hour or two per seed on two cores. gpu: one GPU. paper: as published."""
    seeds: int | None = None
    """How often each arm is measured; defaults to the experiment's own number."""
    arms: tuple[str, ...] = ()
    """Names of the arms to run; defaults to all."""
    out: Path | None = None
    """Folder of the results; defaults to runs/experiments/NAME-SCALE."""
    data: Path | None = None
    """Folder with data that the package does not have: books for scaling and language-ablations, the tasks and a folder
    `models` for zero-shot, genomes for the others."""
    max_minutes: float | None = None
    """Stop after this time; the same command goes on. Long arms are saved and continue where they were."""
    device: str = "auto"
    """cpu, cuda, cuda:1, xpu, mps; auto takes the first of cuda, xpu, mps and cpu that can be used here."""
    jobs: int = 1
    """Arms measured at a time, each by a process of its own. Several GPUs are used in turn; small models can share
    one."""
    threads: int | None = None
    """CPU threads of each job; defaults to torch's choice, or to an equal part of the cores."""
    json: bool = False
    """Print the results as one JSON object."""


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba experiment`."""
    options = read_flags(ExperimentOptions, "experiment", arguments)
    from anymamba.experiments import EXPERIMENTS, load_experiment

    if options.name == "list":
        for name, shows in EXPERIMENTS.items():
            print(f"{name:<20} {shows}")
        return
    experiment = load_experiment(options.name)
    from anymamba.base.sizes import require_sizes
    from anymamba.console.runtime import set_threads
    from anymamba.lab.jobs import run_in_jobs
    from anymamba.lab.results import results_as_json
    from anymamba.lab.running import run_experiment
    from anymamba.ops.devices import usable_device

    require_sizes(jobs=options.jobs)
    if options.max_minutes is not None and not 0 <= options.max_minutes < math.inf:
        raise ValueError(f"--max-minutes must be at least 0 and finite, got {options.max_minutes}")
    set_threads(options.threads)
    folder = options.out or Path("runs/experiments") / f"{options.name}-{options.scale}"
    run: Callable[..., Any] = partial(run_experiment, experiment)
    if options.jobs > 1:
        load = partial(load_experiment, options.name)
        run = partial(run_in_jobs, load, n_jobs=options.jobs, threads=options.threads)
    with progress_bar(options.name) as show:
        try:
            results = run(
                scale=options.scale,
                folder=folder,
                seeds=options.seeds,
                only=options.arms,
                device=usable_device(options.device),
                progress=lambda arm, done, total, text: show(done, total, f"{arm}: {text}"),
                data=options.data,
                max_seconds=math.inf if options.max_minutes is None else 60 * options.max_minutes,
            )
        except KeyboardInterrupt as end:
            raise type(end)(f"go on with: anymamba experiment {shlex.join(arguments)}") from None
    if options.json:
        print_json(results_as_json(results))
    else:
        sys.stdout.write((folder / "report.md").read_text(encoding="utf-8"))
    say(f"wrote {folder / 'report.md'}")
