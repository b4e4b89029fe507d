"""Checkpoints of training runs as models: `runs/x/checkpoints/step-00001000`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anymamba.base.errors import CheckpointError
from anymamba.base.schema import config_from_dict
from anymamba.models.checkpoints.adapters import Adapter, low_ranks
from anymamba.models.checkpoints.formats.files import CONFIG, SafetensorsFile, read_json
from anymamba.models.checkpoints.formats.tensors import StoredTensor
from anymamba.models.config import ModelConfig
from anymamba.ops.packed_linear import PackedWeight

STATE, RUN_CONFIG, PREFIX = "state.json", "train_config.json", "model."
PARTS = ("best", "adapter")
"""Folders in a run's folder that hold a model, or an adapter of one."""
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def is_run_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run rather than a model folder."""
    return (folder / STATE).is_file() and not (folder / CONFIG).exists()


def run_folder(checkpoint: Path) -> Path:
    """The run of a checkpoint. Raises FileNotFoundError if the checkpoint has been taken out of it."""
    run = checkpoint.resolve().parent.parent
    if not (run / RUN_CONFIG).is_file():
        raise FileNotFoundError(
            f"{checkpoint} is a checkpoint of a run, but {run} has no {RUN_CONFIG}; leave it in the run's folder"
        )
    return run


def run_config(checkpoint: Path) -> dict[str, Any]:
    """The config of a checkpoint's run."""
    return read_json(run_folder(checkpoint) / RUN_CONFIG)


def trained_objective(model: Path) -> str | None:
    """The objective of the run that made a model, "causal" or "mlm"; None if no run says so.

    Args:
        model: the run's folder, one in it that holds a model or an adapter, or one of its checkpoints.
    Raises CheckpointError if the run's config cannot be read.
    """
    model = model.resolve()
    run = model.parent.parent if is_run_checkpoint(model) else model.parent if model.name in PARTS else model
    config = next((folder / RUN_CONFIG for folder in (model, run) if (folder / RUN_CONFIG).is_file()), None)
    objective = None if config is None else read_json(config).get("objective")
    return objective if objective in ("causal", "mlm") else None


def model_config(checkpoint: Path) -> ModelConfig:
    """The config of a checkpoint's model. Raises CheckpointError if it cannot be read."""
    values = run_config(checkpoint)
    try:
        return config_from_dict(ModelConfig, values["model"])
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{run_folder(checkpoint) / RUN_CONFIG} cannot be read: {error}") from error


def adapter_of(checkpoint: Path) -> Adapter:
    """The adapter in a checkpoint of a run with LoRA."""
    values, file = run_config(checkpoint), ModelTensors(checkpoint)
    alpha = values["lora_alpha"] if values.get("lora_alpha") is not None else 2 * values["lora"]
    tensors = {name: tensor.clone() for name, tensor in file.read(file.stored())}
    return low_ranks(tensors, alpha / values["lora"], checkpoint)


class ModelTensors(SafetensorsFile):
    """The model's tensors among those of a checkpoint: optimizer, carried states and random state are left out."""

    def __init__(self, folder: Path) -> None:
        found = sorted(folder.glob("*.safetensors"))
        if len(found) != 1:
            raise CheckpointError(f"{folder} must hold one safetensors file, got {len(found)}; copy it again")
        super().__init__(found[0])

    def stored(self) -> dict[str, StoredTensor]:
        """The model's tensors by our names."""
        found = {}
        try:
            with safe_open(self.path, framework="pt") as file:
                for name in (name for name in file.keys() if name.startswith(PREFIX)):  # noqa: SIM118
                    part = file.get_slice(name)
                    dtype = getattr(torch, DTYPES.get(part.get_dtype(), ""), None)
                    if dtype is None:
                        raise CheckpointError(f"{self.path}: {name} must be floating point, got {part.get_dtype()}")
                    found[name.removeprefix(PREFIX)] = StoredTensor(tuple(part.get_shape()), dtype)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path} is truncated or corrupt ({error}); copy it again") from error
        return found

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """As in `TensorFile`."""
        for name, tensor in super().read([PREFIX + name for name in names]):
            yield name.removeprefix(PREFIX), tensor

    def blocks(self, name: str) -> PackedWeight | None:
        """As in `TensorFile`."""
        return super().blocks(PREFIX + name)
