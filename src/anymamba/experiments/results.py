"""Results on disk. Every finished arm is a file of its own, written whole or not at all; results.json gathers them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from anymamba.experiments.experiment import Arm, Record, Results, Scale
from anymamba.models.checkpoints.files import atomic_file
from anymamba.models.schema import config_from_dict, config_to_dict


class ResultStore:
    """A folder of results of one experiment at one scale."""

    def __init__(self, folder: Path, experiment: str, scale: Scale) -> None:
        self.folder, self.experiment, self.scale = folder, experiment, scale
        self.arms_folder = folder / "arms"

    def check(self) -> None:
        """Refuse a folder of another experiment or scale, whose report would be overwritten.

        Raises ValueError that names a file of it.
        """
        for path in sorted(self.arms_folder.glob("*.json")):
            if (values := read_json(path)) is not None and "experiment" in values:
                self._check_owner(path, values)

    def _check_owner(self, path: Path, values: dict[str, Any]) -> None:
        found = (values.get("experiment"), values.get("scale"))
        if found != (self.experiment, self.scale):
            raise ValueError(
                f"{path} is of {found[0]} at scale {found[1]}, not {self.experiment} at {self.scale}; "
                "choose another folder with --out"
            )

    def prepare(self) -> None:
        """Make the folder and try to write there. Raises OSError where that is impossible."""
        self.arms_folder.mkdir(parents=True, exist_ok=True)
        probe = self.arms_folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()

    def finished(self, arm: Arm, seed: int) -> Record | None:
        """The record of an arm, or None where there is none that can be read.

        Raises ValueError where there is one of other settings: it is never overwritten unasked.
        """
        path = self.arms_folder / f"{arm.name}-seed{seed}.json"
        values = read_json(path)
        try:
            record = Record(**values["record"]) if values is not None else None
        except (KeyError, TypeError):
            record = None
        if values is None or record is None:
            return None  # absent, or the torn file of another program: it is measured (again)
        self._check_owner(path, values)
        if not same_settings(arm.settings, record.settings):
            raise ValueError(
                f"{path} was measured with other settings; choose another folder with --out, or delete the file to "
                "measure the arm again"
            )
        return replace(record, settings=as_json(arm.settings))

    def seeds_of(self, arm: Arm) -> int:
        """How many seeds the finished ones of an arm are counted by: the largest and one."""
        names = [path.stem.rpartition("-seed")[::2] for path in self.arms_folder.glob(f"{arm.name}-seed*.json")]
        seeds = [int(seed) for name, seed in names if name == arm.name and seed.isdecimal()]
        return max((seed + 1 for seed in seeds if self.finished(arm, seed) is not None), default=0)

    def add(self, record: Record) -> None:
        """Write a finished arm, whole or not at all."""
        self.arms_folder.mkdir(parents=True, exist_ok=True)
        values = {"experiment": self.experiment, "scale": self.scale, "record": as_json(record)}
        write_text(self.arms_folder / f"{record.key}.json", json.dumps(values, indent=1, allow_nan=False) + "\n")

    def load(self, arms: Sequence[Arm], seeds: dict[str, int]) -> Results:
        """The finished ones of these arms, with this many seeds each, in this order."""
        wanted = [(arm, seed) for arm in arms for seed in range(seeds[arm.name])]
        records = [record for arm, seed in wanted if (record := self.finished(arm, seed)) is not None]
        planned = tuple(f"{arm.name}-seed{seed}" for arm, seed in wanted)
        return Results(self.experiment, self.scale, tuple(records), planned)

    def write_summary(self, results: Results) -> None:
        """results.json: all records in one file."""
        write_text(self.folder / "results.json", json.dumps(as_json(results), indent=1, allow_nan=False) + "\n")


def same_settings(settings: Any, written: dict[str, Any]) -> bool:
    """Whether settings are those of a file; one that is older than a setting had its default."""
    try:
        return config_from_dict(type(settings), written) == settings
    except (TypeError, ValueError):
        return False


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none, or none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return values if isinstance(values, dict) else None


def as_json(values: Any) -> Any:
    """A dataclass or plain values as JSON has them: tuples are lists."""
    return json.loads(json.dumps(config_to_dict(values), allow_nan=False))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def machine(device: torch.device) -> str:
    """The processor or GPU, threads, Python and torch, in a line."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    where = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"
    )
    return f"{where}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"


def today() -> str:
    """The date, in UTC."""
    return datetime.now(UTC).date().isoformat()
