"""LoRA: a model whose weights are frozen and whose projections get trained low-rank adapters, through PEFT.

The adapter of a projection W adds (alpha / rank) B A to it. A run with adapters writes the merged model where other
runs write theirs, and the adapters in PEFT's format beside it. Its checkpoints hold the adapters only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from anymamba.base.files import atomic_folder
from anymamba.data.tokenizer import Tokenizer
from anymamba.models.checkpoints import weights_digest
from anymamba.models.language_model import LanguageModel
from anymamba.parts.parameters import WideParameters
from anymamba.training.config import TrainConfig

FOLDER = "adapter"
"""The folder of the adapters in that of the merged model."""
NAME, MARK, BASE = "default", ".lora_", ".base_layer"
"""What PEFT calls our adapters, and parts of the names of parameters."""
PEFT_PREFIX = "base_model.model."


def require_peft() -> None:
    """Raise ModuleNotFoundError, which names the extra, if PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError("--lora needs the package peft, which is not installed: pip install 'anymamba[lora]'")


def target_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that can have adapters, by name: all linear ones but a tied head and those that make kernels."""
    own = {m for wide in model.modules() if isinstance(wide, WideParameters) for m in wide.modules()}
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m not in own}


def chosen_targets(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The last parts of the names of the layers that get adapters; defaults to all projections of the blocks.

    Raises ValueError for a name that no layer has.
    """
    kinds = sorted({name.rpartition(".")[2] for name in target_layers(model)})
    unknown = [name for name in names if name not in kinds]
    if unknown:
        raise ValueError(
            f"no layer that can have an adapter is called {unknown[0]!r}; the model has {', '.join(kinds)}"
        )
    return list(names) or [kind for kind in kinds if kind != "head"]


def add_adapters(model: LanguageModel, config: TrainConfig) -> None:
    """Freeze the model and give its projections the adapters of the config. B starts at zero: nothing changes yet."""
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    assert config.lora is not None, "called for runs with adapters only"
    peft_config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.start_from,
        r=config.lora,
        lora_alpha=adapter_alpha(config),  # type: ignore[arg-type]  # fractions work, too
        target_modules=chosen_targets(model, config.lora_targets),
    )
    inject_adapter_in_model(peft_config, model, NAME)


def adapter_alpha(config: TrainConfig) -> float:
    """The alpha of the adapters: what is given, else twice the rank."""
    assert config.lora is not None, "called for runs with adapters only"
    return 2 * config.lora if config.lora_alpha is None else config.lora_alpha


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return hasattr(model, "peft_config")


def saved_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint holds: all of them, or only the adapters of a model that has some."""
    adapted = is_adapted(model)
    return {name: p for name, p in model.named_parameters() if not adapted or MARK in name}


def load_parameters(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load what `saved_parameters` gave. Raises RuntimeError if the tensors do not fit the model."""
    if not is_adapted(model):
        model.load_state_dict(tensors)
        return
    differing = tensors.keys() ^ saved_parameters(model).keys()
    if differing:
        raise RuntimeError(f"the adapters are not those of the config: {min(differing)}")
    model.load_state_dict(tensors, strict=False)


def base_digest(model: nn.Module) -> str:
    """The digest of the frozen weights, which a checkpoint does not hold."""
    return weights_digest(p for name, p in model.named_parameters() if MARK not in name)


@torch.no_grad()
def merged(model: LanguageModel) -> LanguageModel:
    """A model without adapters that computes the same. It shares the weights that have none."""
    tensors: dict[str, Tensor] = {
        name.replace(BASE, ""): p.detach() for name, p in model.named_parameters() if MARK not in name
    }
    layers: list[tuple[str, Any]] = [(name, m) for name, m in model.named_modules() if hasattr(m, "get_delta_weight")]
    for name, layer in layers:
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + layer.get_delta_weight(NAME)
    result = LanguageModel(model.config, device="meta")
    result.load_state_dict(tensors, assign=True)
    return result


def save_model(model: LanguageModel, folder: Path, tokenizer: Tokenizer) -> None:
    """Write a model into a folder; one with adapters is written merged, with the adapters in a folder in it."""
    if not is_adapted(model):
        model.save_pretrained(folder, tokenizer)
        return
    merged(model).save_pretrained(folder, tokenizer)
    save_adapter(model, folder / FOLDER)


def save_adapter(model: LanguageModel, folder: Path) -> None:
    """Write the adapters in PEFT's format; `PeftModel.from_pretrained(wrap(base), folder)` reads them."""
    peft_config: Any = model.peft_config
    with atomic_folder(folder, replace=True) as temporary:
        temporary.mkdir()
        peft_config[NAME].save_pretrained(str(temporary))
        tensors = {
            PEFT_PREFIX + name.replace(f".{NAME}.", "."): p.detach().cpu().contiguous()
            for name, p in saved_parameters(model).items()
        }
        save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
