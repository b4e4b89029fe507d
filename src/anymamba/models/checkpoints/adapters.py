"""LoRA adapters in PEFT's format: read, and merged into weights while these are read."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from anymamba.base.errors import CheckpointError
from anymamba.models.checkpoints.formats.files import read_json
from anymamba.models.checkpoints.formats.tensors import StoredTensor
from anymamba.models.checkpoints.hub import local_path

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
HALF = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
"""The name of one half of a layer's adapter, in a file of PEFT or in a model that has adapters."""
UNSUPPORTED = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
}
"""Options of PEFT that must have these values: others than a plain product of two matrices cannot be merged here."""


class LowRank(NamedTuple):
    """What an adapter adds to a weight: scale * B A."""

    A: Tensor
    B: Tensor
    scale: float

    def added_to(self, weight: Tensor) -> Tensor:
        """The merged weight, in float32 or wider."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(wide) + self.scale * (self.B.to(wide) @ self.A.to(wide))


Adapter = Mapping[str, LowRank]
"""By the name of a layer, as it is in the file."""


def read_adapter(name: str | Path) -> Adapter:
    """The adapter of a folder of PEFT or of a name on the hub.

    Raises FileNotFoundError if there is none, CheckpointError if it is broken or is not a plain LoRA.
    """
    folder = local_path(name)
    for file in (CONFIG, TENSORS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} is no folder of a LoRA adapter: it has no {file}")
    values = read_json(folder / CONFIG)
    _require_plain(values, folder / CONFIG)
    try:
        tensors = load_file(folder / TENSORS)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / TENSORS} is truncated or corrupt ({error}); copy it again") from error
    rank, alpha = values["r"], values["lora_alpha"]
    return low_ranks(tensors, alpha / (math.sqrt(rank) if values.get("use_rslora") else rank), folder)


def low_ranks(tensors: Mapping[str, Tensor], scale: float, where: Path) -> Adapter:
    """Pair the halves of adapters. Raises CheckpointError for a tensor that is no half, and for a single half."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = HALF.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise CheckpointError(f"{where} has a tensor {name}, which is not one of a linear layer's LoRA")
        halves.setdefault(match["layer"], {})[match["half"]] = tensor
    for layer, pair in halves.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise CheckpointError(f"{where}: the two matrices of {layer} are not there or do not fit each other")
    return {layer: LowRank(pair["A"], pair["B"], scale) for layer, pair in halves.items()}


def fitted(adapter: Adapter, stored: Mapping[str, StoredTensor], names: Mapping[str, str], where: Path) -> Adapter:
    """An adapter by our names of weights.

    Args:
        adapter: with layers named as in this package or as in the model's file.
        stored: the weights of the model by our names.
        names: our names by those of the file.
        where: the model.
    Raises CheckpointError if the model has no such layer, or one of another shape.
    """
    found = {}
    for layer, low_rank in adapter.items():
        key = f"{layer}.weight"
        name = key if key in stored else names.get(key)
        wanted = (low_rank.B.shape[0], low_rank.A.shape[1])
        if name is None:
            raise CheckpointError(f"the adapter is of another model: {where} has no layer {layer}")
        if stored[name].shape != wanted:
            shape = stored[name].shape
            raise CheckpointError(f"the adapter is of another model: its {layer} is {wanted}, that of {where} {shape}")
        found[name] = low_rank
    return found


def weights_digest(tensors: Iterable[Tensor]) -> str:
    """The SHA-256 of weights in float32, which identifies the model that adapters belong to."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().to("cpu", torch.float32).contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _require_plain(values: Mapping[str, Any], path: Path) -> None:
    if values.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: only adapters of peft_type LORA can be merged, got {values.get('peft_type')!r}")
    for name, wanted in UNSUPPORTED.items():
        if values.get(name, wanted) not in (wanted, None):
            raise CheckpointError(
                f"{path}: an adapter with {name}={values[name]!r} cannot be merged here; merge it with PEFT's "
                "merge_and_unload (docs/transformers.md)"
            )
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{path}: r must be a positive integer and lora_alpha a number, got {rank!r}, {alpha!r}")
