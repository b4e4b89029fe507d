"""What tests of training on DNA share."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from anymamba.training.checkpoint import checkpoint_folder
from anymamba.training.config import TrainConfig
from anymamba.training.metrics import read_metrics


def with_data(config: TrainConfig, **values) -> TrainConfig:
    return replace(config, data=replace(config.data, **values))


def lines(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(run)]


def cut_back(run: Path, step: int) -> None:
    """Make a run look as if it had been killed after the checkpoint of a step."""
    for folder in (run / "checkpoints").iterdir():
        if folder.name > checkpoint_folder(run, step).name:
            shutil.rmtree(folder)
