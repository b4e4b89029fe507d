"""Where the numbers of a run are recorded besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, Trackio."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from anymamba.base.files import write_json
from anymamba.training.config import TrainConfig, file_values

METRICS, EVENTS, IDS = "metrics.jsonl", "tensorboard", "trackers.json"
PROJECT = "anymamba"
"""The project (in MLflow: the experiment) of the runs, if the tracker's own environment variable names no other."""
PACKAGES = {
    "tensorboard": ("tensorboard", "train"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
    "trackio": ("trackio", "trackio"),
}
"""The module that each logger needs, and the extra of this package that installs it."""
LONGEST_VALUE = 500  # of a parameter in MLflow


class Logger(Protocol):
    """Receives the lines of metrics.jsonl."""

    def add(self, line: Mapping[str, Any]) -> None:
        """Record one line: "step", "kind" and numbers."""

    def flush(self) -> None:
        """Flush what has been recorded."""

    def close(self) -> None:
        """Record nothing more."""


def is_installed(module: str) -> bool:
    """Whether a module can be imported; it is not imported yet."""
    return importlib.util.find_spec(module) is not None


def require_loggers(names: Sequence[str]) -> None:
    """Raise ModuleNotFoundError, which names the extra, if the package of a logger is not installed."""
    for name in names:
        module, extra = PACKAGES[name]
        if not is_installed(module):
            raise ModuleNotFoundError(
                f"--log {name} needs the package {module}, which is not installed: pip install 'anymamba[{extra}]'"
            )


def open_loggers(config: TrainConfig, run: Path, lines: Sequence[Mapping[str, Any]]) -> list[Logger]:
    """The loggers that a config names.

    Args:
        run: the run's folder.
        lines: what the run has recorded so far. TensorBoard's events are written again from them; the other loggers go
            on with the run that they have begun.
    """
    require_loggers(config.log)
    found: list[Logger] = []
    for name in dict.fromkeys(config.log):
        if name == "tensorboard":
            found.append(TensorBoard(run, lines))
        else:
            with redirect_stdout(sys.stderr):  # the results of a command go to stdout, and nothing else
                found.append(Tolerant(name, TRACKERS[name](config, run)))
    return found


def curves(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line, by names such as train/bits_per_byte."""
    for name, value in line.items():
        if name not in ("step", "kind") and value is not None:
            yield f"{line['kind']}/{name}", value


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, run: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(run / EVENTS, ignore_errors=True)
        self._events = SummaryWriter(str(run / EVENTS))
        for line in lines:
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """Record one line."""
        for name, value in curves(line):
            self._events.add_scalar(name, value, line["step"])

    def flush(self) -> None:
        """Flush the events to disk."""
        self._events.flush()

    def close(self) -> None:
        """Close the file."""
        self._events.close()


class Tolerant:
    """A tracker whose failures do not end the run, such as a server that is gone: it is left alone from then on."""

    def __init__(self, name: str, tracker: Logger) -> None:
        self.name, self._tracker = name, tracker
        self._failed = False

    def add(self, line: Mapping[str, Any]) -> None:
        """Record one line."""
        self._try(lambda: self._tracker.add(line))

    def flush(self) -> None:
        """Flush what has been recorded."""
        self._try(self._tracker.flush)

    def close(self) -> None:
        """End the run."""
        self._try(self._tracker.close)

    def _try(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            with redirect_stdout(sys.stderr):
                call()
        except Exception as error:  # each tracker has errors of its own
            self._failed = True
            warnings.warn(
                f"{self.name} failed ({error}); it is told nothing more by this process, {METRICS} has everything",
                stacklevel=4,
            )


class Wandb:
    """Weights & Biases. WANDB_PROJECT, WANDB_MODE=offline and its other variables work as usual."""

    def __init__(self, config: TrainConfig, run: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.absolute().name,
            id=run_id(run, "wandb"),
            resume="allow",
            dir=str(run),
            config=file_values(config),
        )
        self._run.define_metric("step")  # a resumed run repeats steps, which must not be W&B's own step
        self._run.define_metric("*", step_metric="step")

    def add(self, line: Mapping[str, Any]) -> None:
        """Record one line."""
        self._run.log({"step": line["step"], **dict(curves(line))})

    def flush(self) -> None:
        """W&B sends by itself."""

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class MLflow:
    """MLflow. MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME work as usual."""

    def __init__(self, config: TrainConfig, run: Path) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient(), Metric
        known = read_ids(run).get("mlflow")
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        self._id = self._client.create_run(experiment, run_name=run.absolute().name).info.run_id
        params = [Param(key, str(value)[:LONGEST_VALUE]) for key, value in flat(file_values(config))]
        for start in range(0, len(params), 100):  # the most that one call may send
            self._client.log_batch(self._id, params=params[start : start + 100])
        keep_id(run, "mlflow", self._id)

    def add(self, line: Mapping[str, Any]) -> None:
        """Record one line."""
        now = time.time_ns() // 1_000_000
        metrics = [self._metric(name, float(value), now, line["step"]) for name, value in curves(line)]
        self._client.log_batch(self._id, metrics=metrics)

    def flush(self) -> None:
        """Each line has been sent."""

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._id)


class Trackio:
    """Trackio, in a local database or a space of the hub. TRACKIO_PROJECT and TRACKIO_SPACE_ID are used."""

    def __init__(self, config: TrainConfig, run: Path) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.absolute().name}-{run_id(run, 'trackio')}",
            resume="allow",
            config=file_values(config),
            embed=False,
        )

    def add(self, line: Mapping[str, Any]) -> None:
        """Record one line."""
        self._run.log(dict(curves(line)), step=line["step"])

    def flush(self) -> None:
        """Trackio sends by itself."""

    def close(self) -> None:
        """End the run."""
        self._run.finish()


TRACKERS: dict[str, Callable[[TrainConfig, Path], Logger]] = {"wandb": Wandb, "mlflow": MLflow, "trackio": Trackio}


# ------------------------------------------------------------------------------------------------- which run it is


def run_id(run: Path, tracker: str) -> str:
    """The id of this run in a tracker: the one in its folder, else a new one."""
    known = read_ids(run).get(tracker)
    return keep_id(run, tracker, secrets.token_hex(4)) if known is None else known


def read_ids(run: Path) -> dict[str, str]:
    """The ids of a run in the trackers; empty if it has none yet."""
    path = run / IDS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def keep_id(run: Path, tracker: str, value: str) -> str:
    """Keep a run's id in its folder, so that a resumed run goes on in the same one; returns it."""
    write_json(run / IDS, read_ids(run) | {tracker: value})
    return value


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested tables, by names such as model.d_model."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
