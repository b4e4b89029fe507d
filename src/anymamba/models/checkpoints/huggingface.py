"""Model folders in Hugging Face's layout: config.json, model.safetensors, tokenizer.json.

A pure Mamba model is written as `model_type: "mamba"`, so that other readers take it as it is. A model with options
that those readers have no field for is written as `model_type: "anymamba"`, under our own names.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anymamba.models.checkpoints.errors import CheckpointError
from anymamba.models.config import MambaOptions, ModelConfig, config_from_dict, config_to_dict, require_at_least
from anymamba.models.language_model import LanguageModel

if TYPE_CHECKING:
    from anymamba.data.tokenizer import Tokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKEN_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "pytorch_model.pt")

LAYER_NAMES = {
    "norm.weight": "norm.weight",
    "mixer.in_proj.weight": "mixer.in_proj.weight",
    "mixer.in_proj.bias": "mixer.in_proj.bias",
    "mixer.conv.weight": "mixer.conv1d.weight",
    "mixer.conv.bias": "mixer.conv1d.bias",
    "mixer.x_proj.weight": "mixer.x_proj.weight",
    "mixer.dt_proj.weight": "mixer.dt_proj.weight",
    "mixer.ssm.delta_bias": "mixer.dt_proj.bias",
    "mixer.ssm.A_log": "mixer.A_log",
    "mixer.ssm.D": "mixer.D",
    "mixer.out_proj.weight": "mixer.out_proj.weight",
    "mixer.out_proj.bias": "mixer.out_proj.bias",
}
"""Our names inside a block and Hugging Face's."""

TOP_NAMES = {
    "embedding.weight": "backbone.embeddings.weight",
    "norm.weight": "backbone.norm_f.weight",
    "head.weight": "lm_head.weight",
}


# ------------------------------------------------------------------------------------------ names and configs


def to_huggingface_name(name: str) -> str:
    """Hugging Face's name of one of our parameters (`mamba` models)."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, index, rest = name.split(".", 2)
    return f"backbone.layers.{index}.{LAYER_NAMES[rest]}"


def foreign_options(config: ModelConfig) -> list[str]:
    """Options of a config that a `mamba` reader has no field for; empty where it computes the same function."""
    ours, plain = config.mamba, MambaOptions()
    names = ("b_discretization", "selective_delta", "selective_B", "selective_C", "output_norm", "inner_norms")
    options = [f"{name}={getattr(ours, name)!r}" for name in names if getattr(ours, name) != getattr(plain, name)]
    if ours.A_init == "s4d-lin":
        options.append("A_init='s4d-lin' (complex A)")
    if ours.expand != int(ours.expand):
        options.append(f"expand={ours.expand!r} (no integer)")
    if config.norm != "rmsnorm":
        options.append(f"norm={config.norm!r}")
    if set(config.layer_mixers) != {"mamba"}:
        options.append(f"mixers={config.mixers!r}")
    return options


def config_to_json(config: ModelConfig, dtype: torch.dtype, eos_id: int | None) -> dict[str, Any]:
    """The contents of config.json."""
    ours: dict[str, Any] = {"anymamba": config_to_dict(config), "dtype": str(dtype).removeprefix("torch.")}
    ours |= dict.fromkeys(TOKEN_IDS, eos_id)
    if foreign_options(config):
        return {"model_type": "anymamba", **ours}
    mamba = config.mamba
    return {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "vocab_size": config.padded_vocab_size,
        "state_size": mamba.d_state,
        "conv_kernel": mamba.d_conv,
        "expand": int(mamba.expand),
        "intermediate_size": config.d_inner,
        "time_step_rank": config.dt_rank,
        "time_step_min": mamba.dt_min,
        "time_step_max": mamba.dt_max,
        "time_step_init_scheme": mamba.dt_init,
        "time_step_scale": mamba.dt_scale,
        "time_step_floor": mamba.dt_init_floor,
        "use_bias": mamba.bias,
        "use_conv_bias": mamba.conv_bias,
        "residual_in_fp32": config.residual_in_fp32,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "rescale_prenorm_residual": False,  # where true, transformers divides loaded weights once more
        "initializer_range": 0.02,
        "use_cache": True,
        **ours,
    }


def config_from_json(values: dict[str, Any], where: Path) -> ModelConfig:
    """The model's config from the contents of config.json.

    Raises CheckpointError for another model_type, or a value that a Mamba model cannot have.
    """
    kind = values.get("model_type")
    if kind not in ("mamba", "anymamba"):
        raise CheckpointError(f"{where} is of model_type {kind!r}; this reader takes 'mamba' and 'anymamba'")
    try:
        if "anymamba" not in values:
            return _config_from_huggingface(values)
        ours = config_from_dict(ModelConfig, values["anymamba"], "anymamba")
        return ours if _agrees(ours, values) else _config_from_huggingface(values)
    except KeyError as error:
        raise CheckpointError(f"{where} lacks the key {error}; it is not a complete Mamba config") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _agrees(ours: ModelConfig, values: dict[str, Any]) -> bool:
    """Whether the fields of a `mamba` config still are what our table says; another program may have changed them."""
    if values["model_type"] == "anymamba":
        return True
    written = config_to_json(ours, torch.float32, None)
    fields = set(written) & set(values) - {"anymamba", "architectures", "dtype", "use_cache", *TOKEN_IDS}
    return all(values[field] == written[field] for field in fields)


def _config_from_huggingface(values: dict[str, Any]) -> ModelConfig:
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act must be 'silu', got {values['hidden_act']!r}")
    d_model, d_inner = values["hidden_size"], values.get("intermediate_size")
    require_at_least("hidden_size", d_model, 1)
    rank = values.get("time_step_rank", "auto")
    mamba = MambaOptions(
        d_state=values.get("state_size", 16),
        d_conv=values.get("conv_kernel", 4),
        expand=values.get("expand", 2) if d_inner is None else _expansion(d_inner, d_model),
        dt_rank=None if rank == "auto" else rank,
        dt_min=values.get("time_step_min", 0.001),
        dt_max=values.get("time_step_max", 0.1),
        dt_init=values.get("time_step_init_scheme", "random"),
        dt_scale=values.get("time_step_scale", 1.0),
        dt_init_floor=values.get("time_step_floor", 1e-4),
        conv_bias=values.get("use_conv_bias", True),
        bias=values.get("use_bias", False),
    )
    return ModelConfig(
        d_model=d_model,
        n_layers=values["num_hidden_layers"],
        vocab_size=values["vocab_size"],
        pad_vocab_multiple=1,
        tie_embeddings=values.get("tie_word_embeddings", True),
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        residual_in_fp32=values.get("residual_in_fp32", True),
        mamba=mamba,
    )


def _expansion(d_inner: int, d_model: int) -> float:
    """The ratio of which int(ratio * d_model) is d_inner, in spite of rounding."""
    require_at_least("intermediate_size", d_inner, 1)
    ratio = d_inner / d_model
    return ratio if int(ratio * d_model) == d_inner else math.nextafter(ratio, math.inf)


# ------------------------------------------------------------------------------------------ writing


def save_pretrained(model: LanguageModel, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write config.json, model.safetensors and the tokenizer's file; each replaces its predecessor atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    foreign = bool(foreign_options(model.config))
    tensors = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().cpu().contiguous()
        if not foreign:
            tensor = tensor[:, None] if name.endswith("conv.weight") else tensor
            name = to_huggingface_name(name)
        tensors[name] = tensor.clone() if tensor.data_ptr() == parameter.data_ptr() and not foreign else tensor
    eos_id = None if tokenizer is None else tokenizer.eos_id
    values = config_to_json(model.config, model.embedding.weight.dtype, eos_id)
    with atomic_file(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with atomic_file(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(folder)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, flushed to disk, when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------ reading


def load_pretrained(
    folder: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """Load a model folder; memory stays within the weights and one tensor.

    Args:
        folder: holds config.json and model.safetensors.
        device: where the weights go; absent means the CPU.
        dtype: of the weights; absent means that of the file. A_log, D and the step's bias stay float32 or wider.
    Raises FileNotFoundError when the folder or a file is absent, CheckpointError when a file is broken, is a pickle,
        or does not hold the tensors of the model in config.json.
    """
    folder = Path(folder)
    config = config_from_json(_read_config(folder), folder / CONFIG)
    try:
        model = LanguageModel(config, device="meta")
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    foreign = bool(foreign_options(config))
    wanted = {name if foreign else to_huggingface_name(name): name for name, _ in model.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wide = {name for name, p in model.named_parameters() if ".ssm." in name}
    path = _weights_file(folder)
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            if config.tie_embeddings and not foreign:
                stored.discard("lm_head.weight")
            _require_names(stored, set(wanted), path)
            for key, name in wanted.items():
                tensor = file.get_tensor(key)
                tensors[name] = _fit(tensor, shapes[name], key, path, device, dtype, name in wide)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}); copy it again") from error
    model.load_state_dict(tensors, assign=True)
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise FileNotFoundError(f"no model folder {folder}; give a folder that holds {CONFIG} and {WEIGHTS}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is a file; give the folder that holds {CONFIG} and {WEIGHTS}")
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}: it is not a model folder, or a run without a checkpoint yet"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a table of keys and values, got {type(values).__name__}")
    return values


def _weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS
    if path.exists():
        return path
    for name in PICKLES:
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder / name} is a pickle, which can run code when it is read; convert it to {WEIGHTS} first"
            )
    raise FileNotFoundError(f"{folder} has no {WEIGHTS}")


def _require_names(stored: set[str], wanted: set[str], path: Path) -> None:
    missing, unexpected = sorted(wanted - stored), sorted(stored - wanted)
    if missing or unexpected:
        parts = [
            f"{len(names)} {kind} (first: {names[0]})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise CheckpointError(f"{path} does not hold the model of {CONFIG}: tensors {' and '.join(parts)}")


def _fit(
    tensor: Tensor,
    shape: tuple[int, ...],
    key: str,
    path: Path,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    wide: bool,
) -> Tensor:
    """One stored tensor in the model's shape, on the device, in the dtype."""
    if key.endswith("conv1d.weight") and tensor.ndim == 3 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{path}: {key} must have shape {shape}, got {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise CheckpointError(f"{path}: {key} must be floating point, got {tensor.dtype}")
    target = dtype or tensor.dtype
    if wide:
        target = torch.promote_types(target, torch.float32)
    return tensor.to(device=device, dtype=target, copy=True).contiguous()
