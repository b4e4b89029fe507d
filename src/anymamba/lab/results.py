"""Results on disk: results.json holds every finished arm, and a run resumes from it alone."""

from __future__ import annotations

import json
import os
import platform
import reprlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from anymamba.base.errors import FORMAT_VERSION, require_format_version
from anymamba.base.files import write_text
from anymamba.base.schema import config_from_dict, config_to_dict
from anymamba.lab.experiment import Arm, Record, Results, Scale, record_key

FILE = "results.json"
VERSION = 1
"""The format version that is written, and the newest that is read."""
FIELDS: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "arm": ("a string", str),
    "seed": ("an integer", int),
    "settings": ("an object", dict),
    "values": ("an object with at least one value", dict),
    "seconds": ("a number", (int, float)),
    "machine": ("a string", str),
    "date": ("a string", str),
}
"""Of a record: what each is, in words and as types."""


def read_results(folder: Path) -> Results | None:
    """The results in a folder, or None if it has none.

    Raises ValueError if results.json is not a file of results, and CheckpointError if its format version is newer, so
        such a file is never overwritten.
    """
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        require_format_version(values if isinstance(values, dict) else {}, VERSION, path)
        records = tuple(record_from_json(record, number) for number, record in enumerate(values["records"], 1))
        return Results(values["experiment"], values["scale"], records, tuple(values["planned"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a file of results ({type(error).__name__}: {error}); choose another folder with --out, or "
            "delete the file to measure everything again"
        ) from error


def record_from_json(values: Any, number: int) -> Record:
    """The record with that number in the file, counted from 1.

    Raises ValueError, which names the record, if a field is missing, unknown or of the wrong type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"record {number} must be an object, got {reprlib.repr(values)}")
    where = f"record {number}, {record_key(values.get('arm', '?'), values.get('seed', '?'))}"
    for name in sorted(values.keys() ^ FIELDS.keys()):
        raise ValueError(f"{where}: {name} is {'unknown' if name in values else 'missing'}")
    for name, (words, types) in FIELDS.items():
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, types) or (name == "values" and not value):
            raise ValueError(f"{where}: {name} must be {words}, got {reprlib.repr(value)}")
    return Record(**values)


def read_checked(folder: Path, experiment: str, scale: Scale, arms: Sequence[Arm]) -> list[Record]:
    """The records of a folder, checked against the experiment, the scale, the arms and their settings.

    Raises ValueError if they do not match.
    """
    found, path = read_results(folder), folder / FILE
    if found is None:
        return []
    if (found.experiment, found.scale) != (experiment, scale):
        raise ValueError(
            f"{path} must hold results of {experiment} at scale {scale}, got {found.experiment} at scale "
            f"{found.scale}; choose another folder with --out"
        )
    settings = {arm.name: arm.settings for arm in arms}
    for record in found.records:
        if record.arm not in settings:
            raise ValueError(
                f"{record.key} in {path} is no arm of {experiment} at scale {scale} in this version; choose another "
                "folder with --out, or delete its record there"
            )
        if not same_settings(settings[record.arm], record.settings):
            raise ValueError(
                f"{record.key} in {path} was measured with other settings; choose another folder with --out, or delete "
                "its record there to measure the arm again"
            )
    return [replace(record, settings=as_json(settings[record.arm])) for record in found.records]


def write_results(folder: Path, results: Results) -> None:
    """Write results.json, whole or not at all."""
    write_text(folder / FILE, json.dumps(results_as_json(results), indent=1, allow_nan=False) + "\n")


def same_settings(settings: Any, written: dict[str, Any]) -> bool:
    """Whether settings equal those of a record; settings that the record lacks had their defaults."""
    try:
        return config_from_dict(type(settings), written) == settings
    except (TypeError, ValueError):
        return False


def results_as_json(results: Results) -> dict[str, Any]:
    """The contents of results.json."""
    return {FORMAT_VERSION: VERSION, **as_json(results)}


def as_json(values: Any) -> Any:
    """A dataclass or plain values as JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(config_to_dict(values), allow_nan=False))


def machine(device: torch.device) -> str:
    """One line with the processor or GPU, threads, Python and torch."""
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
