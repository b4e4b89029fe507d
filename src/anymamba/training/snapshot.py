"""The state of a run, everything that its next step depends on, as tensors and JSON values."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.parts.state import map_state, state_tensors
from anymamba.training.lora import load_parameters, saved_parameters
from anymamba.training.optimizer import optimizer_tensors, restore_optimizer


@dataclass
class Progress:
    """The numbers of a run that change at each step."""

    step: int = 0
    tokens: int = 0
    """Tokens read since the first step."""
    skipped: int = 0
    """Steps skipped for a non-finite loss or gradient."""
    skipped_in_a_row: int = 0
    bits_per_byte: float | None = None
    """Training loss of the last step with a finite one."""
    held_out_bits_per_byte: float | None = None
    best_step: int | None = None
    """The step with the lowest held-out loss so far."""
    best_bits_per_byte: float | None = None
    """That loss."""
    position: dict[str, Any] | None = None
    """Position of the data stream."""
    seconds: float = 0.0
    """Time of a run with max_minutes, over all processes that worked on it."""


def snapshot(
    model: LanguageModel, optimizer: torch.optim.Optimizer, carried: LanguageModelState | None, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a run, and the rest as JSON values. The random state is part of both."""
    tensors = {f"model.{name}": p.detach() for name, p in saved_parameters(model).items()}
    tensors |= {f"optimizer.{k}": v for k, v in optimizer_tensors(model, optimizer).items()}
    if carried is not None:
        numbered = enumerate(state_tensors(carried))  # may be views, which safetensors refuses
        tensors |= {f"carried.{i}": t.clone(memory_format=torch.contiguous_format) for i, t in numbered}
    tensors["random.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    kind, keys, *rest = np.random.get_state(legacy=True)
    values = {
        **asdict(progress),
        "python_random": random.getstate(),
        "numpy_random": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.__version__,
        "tensors": sorted(tensors),
    }
    return tensors, values


def restore(
    tensors: dict[str, Tensor], values: dict[str, Any], model: LanguageModel, optimizer: torch.optim.Optimizer
) -> tuple[LanguageModelState | None, Progress]:
    """Restore the model, the optimizer and the random state from a snapshot; return the carried state and the progress.

    Raises RuntimeError if the tensors do not fit the model.
    """
    parts = {prefix: _with_prefix(tensors, prefix) for prefix in ("model", "optimizer", "carried", "random")}
    load_parameters(model, parts["model"])
    restore_optimizer(model, optimizer, parts["optimizer"])
    carried = None
    if parts["carried"]:
        carried = _as_state(model, [parts["carried"][str(i)] for i in range(len(parts["carried"]))])
    torch.set_rng_state(parts["random"]["torch"])
    if "cuda" in parts["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(parts["random"]["cuda"])
    version, internal, gauss = values["python_random"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = values["numpy_random"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    return carried, Progress(**{f.name: values[f.name] for f in fields(Progress) if f.name in values})


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}."): t for key, t in tensors.items() if key.startswith(f"{prefix}.")}


def _as_state(model: LanguageModel, tensors: list[Tensor]) -> LanguageModelState:
    """A state of the model, made of tensors in the order of `state_tensors`."""
    device = model.embedding.weight.device
    remaining = iter([t.to(device) for t in tensors])
    return map_state(lambda _: next(remaining), model.init_state(0))
