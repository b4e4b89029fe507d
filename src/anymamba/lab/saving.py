"""The state of an arm that is not finished: one file, from which the same command goes on bit for bit."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from anymamba.base.files import atomic_file
from anymamba.training.optimizer import optimizer_tensors, restore_optimizer

SUFFIX = ".unfinished.safetensors"
VALUES = "anymamba"
"""The key of the values in the file's metadata."""


class OutOfTime(Exception):
    """The time of a run is up; the arm that was being measured is saved, if it can be."""


@dataclass
class Saving:
    """Where and when the state of an arm is saved."""

    path: Path
    settings: dict[str, Any]
    """The settings of the arm, as JSON; the state of other settings is not used."""
    every: float = 60.0
    """Seconds between two writes."""
    deadline: float = math.inf
    """Of `time.monotonic`: a training that reaches it is saved and ends with `OutOfTime`."""
    earlier: float = 0.0
    """Seconds that earlier runs have spent on what was read from the file."""
    _started: float = field(default_factory=time.monotonic)
    _written: float = field(default_factory=time.monotonic)
    _parts: list[Saving] = field(default_factory=list)

    def part(self, name: str) -> Saving:
        """The saving of one of several trainings of the arm, in a file of its own."""
        path = self.path.with_name(f"{self.path.name.removesuffix(SUFFIX)}.{name}{SUFFIX}")
        now = time.monotonic()
        self._parts.append(replace(self, path=path, earlier=0.0, _started=now, _written=now, _parts=[]))
        return self._parts[-1]

    def seconds_before(self) -> float:
        """Of earlier runs, those of the parts included."""
        return self.earlier + sum(part.seconds_before() for part in self._parts)

    def is_due(self) -> bool:
        """Whether it is time to write the state."""
        return self.is_late() or time.monotonic() - self._written >= self.every

    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self.deadline

    def write(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        values: dict[str, Any],
    ) -> None:
        """Replace the file. `values` is what else the next step needs, as JSON."""
        tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
        tensors |= {f"optimizer.{name}": t for name, t in optimizer_tensors(model, optimizer).items()}
        tensors["generator"] = generator.get_state()
        tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as temporary:
            stored = {"settings": self.settings, "values": values, "seconds": self._seconds()}
            save_file(tensors, temporary, {VALUES: json.dumps(stored)})
        self._written = time.monotonic()

    def _seconds(self) -> float:
        return self.earlier + time.monotonic() - self._started

    def read(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> dict[str, Any] | None:
        """Restore the model, the optimiser and the generator; returns the values, or None if there is no such file.

        Raises ValueError if the file is damaged or belongs to other settings.
        """
        if not self.path.exists():
            return None
        way_out = f"delete {self.path} to measure the arm from its beginning"
        try:
            with safe_open(self.path, "pt") as file:
                stored = json.loads((file.metadata() or {})[VALUES])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            settings, _ = stored["settings"], stored["values"]
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} cannot be read ({error}); {way_out}") from error
        if settings != self.settings:
            raise ValueError(f"{self.path} was written with other settings; {way_out}")
        try:
            _require_state_of(model, tensors)
            generator.set_state(tensors.pop("generator"))
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{self.path} cannot be read ({error}); {way_out}") from error
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors.pop(f"model.{name}"))
        restore_optimizer(model, optimizer, {name.removeprefix("optimizer."): t for name, t in tensors.items()})
        self.earlier = stored.get("seconds", 0.0)
        return stored["values"]

    def delete(self) -> None:
        """Delete the file and those of the parts, where they exist."""
        for saving in (*self._parts, self):
            saving.path.unlink(missing_ok=True)


def _require_state_of(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless the tensors, those of the optimiser aside, are the generator's and the parameters."""
    shapes = {f"model.{name}": p.shape for name, p in model.named_parameters()}
    found = {name for name in tensors if not name.startswith("optimizer.")}
    for name in sorted(found ^ {*shapes, "generator"}):
        raise ValueError(f"{name} is {'unknown' if name in found else 'missing'}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensors[name].shape)}")
