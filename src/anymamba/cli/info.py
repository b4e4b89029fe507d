"""`anymamba info`: versions, devices, threads, and which backend of each operator runs here."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import tyro

from anymamba.console.flags import read_flags
from anymamba.console.output import print_facts, print_json

DEPENDENCIES = (
    *("torch", "numpy", "einops", "jaxtyping", "safetensors", "tokenizers", "tyro", "rich"),
    *("datasets", "tensorboard", "matplotlib", "pyarrow", "triton", "transformers"),
)


@dataclass(frozen=True)
class InfoOptions:
    """Versions, devices, threads, and which backend of each operator runs here and why another is missing."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba info`."""
    options = read_flags(InfoOptions, "info", arguments)
    facts = collect()
    if options.json:
        print_json(facts)
    else:
        print_facts(readable(facts))


def collect() -> dict[str, Any]:
    """Everything that `info` prints."""
    import torch

    from anymamba.base import __version__
    from anymamba.compat import drop_in
    from anymamba.ops import devices, dispatch

    return {
        "anymamba": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "executable": sys.executable,
        "packages": {name: installed_version(name) for name in DEPENDENCIES},
        "device": str(devices.best_device()),
        "devices": [kind._asdict() for kind in devices.device_kinds()],
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "drop-in": drop_in.status(),
        "backends": [status._asdict() for status in dispatch.report()],
    }


def installed_version(name: str) -> str | None:
    """A package's version, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def readable(facts: dict[str, Any]) -> dict[str, str]:
    """The same facts as one line each."""
    lines = {name: facts[name] for name in ("anymamba", "python", "platform", "executable")}
    lines |= {name: found or "not installed" for name, found in facts["packages"].items()}
    for device in facts["devices"]:
        mark = "missing" if device["reason"] else "chosen" if device["kind"] == facts["device"] else "available"
        lines[f"device {device['kind']}"] = f"{mark:<9} {device['reason'] or ', '.join(device['names'])}"
    lines |= facts["drop-in"]
    lines["threads"] = f"{facts['threads']['torch']} of {facts['threads']['cores']} cores"
    for status in facts["backends"]:
        mark = "chosen" if status["chosen"] else "available" if status["available"] else "missing"
        name = f"{status['op']} {status['backend']}"
        lines[name] = f"{mark:<9} {status['device']}" + (f": {status['reason']}" if status["reason"] else "")
    return lines
