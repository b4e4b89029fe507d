"""Configs and weights of published models, by folder or by name on the Hugging Face hub."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anymamba.models.checkpoints.formats.files import CONFIG, open_weights, read_json
from anymamba.models.checkpoints.hub import local_path


def load_config_hf(model_name: str) -> dict[str, Any]:
    """The contents of a model's config.json."""
    return read_json(local_path(model_name) / CONFIG)


def load_state_dict_hf(model_name: str, device=None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors of a model's weights under the names of the file, read without running code.

    Args:
        device: device of the tensors; defaults to the CPU.
        dtype: dtype of all tensors; defaults to the stored dtype of each.
    """
    weights = open_weights(local_path(model_name))
    names = list(weights.stored())
    return {name: tensor.to(device=device, dtype=dtype, copy=True) for name, tensor in weights.read(names)}
