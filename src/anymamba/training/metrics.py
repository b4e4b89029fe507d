"""The record of a run: metrics.jsonl and loss.png. Each step is in it once, also after a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from anymamba.base.files import atomic_file, write_text
from anymamba.training.config import TrainConfig
from anymamba.training.loggers import METRICS, open_loggers

PLOT = "loss.png"


class MetricsLog:
    """Appends lines to metrics.jsonl and gives them to the loggers of the config.

    Args:
        config: of the run.
        run: the run's folder.
        step: the step at which the run starts or resumes. Later lines, which a killed run left, are dropped.
    """

    def __init__(self, config: TrainConfig, run: Path, step: int) -> None:
        self.run = run
        lines = [line for line in read_metrics(run) if line["step"] <= step]
        write_text(run / METRICS, "".join(json.dumps(line) + "\n" for line in lines))
        self._loggers = open_loggers(config, run, lines)
        self._file = open(run / METRICS, "a", encoding="utf-8")  # noqa: SIM115

    def append(self, line: dict[str, Any]) -> None:
        """Record one line: "step", "kind" ("train" or "eval") and numbers."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for logger in self._loggers:
            logger.add(line)

    def flush(self) -> None:
        """Flush the record to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        for logger in self._loggers:
            logger.flush()

    def close(self) -> None:
        """Flush and close the files."""
        self.flush()
        self._file.close()
        for logger in self._loggers:
            logger.close()


class NoLog:
    """The record of a process that keeps none."""

    def append(self, line: dict[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut off by a kill is dropped."""
    path = run / METRICS
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def plot_loss(run: Path) -> None:
    """Write loss.png: bits per byte of training and held-out documents over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = read_metrics(run)
    for kind, label, style in (("train", "training", "-"), ("eval", "held-out", "o-")):
        points = [(line["step"], line["bits_per_byte"]) for line in lines if line["kind"] == kind]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    axes.set(xlabel="step", ylabel="loss (bits per byte)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    with atomic_file(run / PLOT) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
