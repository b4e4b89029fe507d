"""config.json in Hugging Face's terms: `mamba`, `falcon_mamba`, and `anymamba` for what these have no field for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from anymamba.base.errors import CheckpointError
from anymamba.base.schema import config_from_dict, config_to_dict
from anymamba.base.sizes import require_at_least
from anymamba.models.config import ModelConfig
from anymamba.models.options import MambaOptions

MODEL_TYPES = ("mamba", "falcon_mamba", "anymamba")
TOKEN_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")


def foreign_options(config: ModelConfig) -> list[str]:
    """Options of a config that `mamba` and `falcon_mamba` have no field for; empty where one computes the same."""
    options = foreign_mamba_options(config)
    if config.mamba.inner_norms and config.mamba.inner_norm_weights:
        options.append("inner_norms=True (with weights)")
    if config.mamba.expand != int(config.mamba.expand):
        options.append(f"expand={config.mamba.expand!r} (no integer)")
    if config.norm != "rmsnorm":
        options.append(f"norm={config.norm!r}")
    return options


def foreign_mamba_options(config: ModelConfig) -> list[str]:
    """Options that no published format has a field for."""
    ours, plain = config.mamba, MambaOptions()
    names = ("b_discretization", "selective_delta", "selective_B", "selective_C", "output_norm")
    options = [f"{name}={getattr(ours, name)!r}" for name in names if getattr(ours, name) != getattr(plain, name)]
    if ours.is_complex:
        options.append("A_init='s4d-lin' (complex A)")
    if set(config.layer_mixers) != {"mamba"}:
        options.append(f"mixers={config.mixers!r}")
    if config.has_absolute_positions:
        options.append("positions='absolute'")
    return options


# ------------------------------------------------------------------------------------------ writing


def config_to_json(config: ModelConfig, dtype: torch.dtype, token_ids: dict[str, Any], ours: bool) -> dict[str, Any]:
    """The contents of config.json, as `anymamba` (ours) or as what Hugging Face's readers take.

    Args:
        token_ids: eos_token_id and its like, those that are known.
    """
    shared: dict[str, Any] = {"anymamba": config_to_dict(config), "dtype": str(dtype).removeprefix("torch.")}
    shared |= dict.fromkeys(TOKEN_IDS, token_ids.get("eos_token_id")) | token_ids
    if ours:
        return {"model_type": "anymamba", **shared}
    mamba, falcon = config.mamba, config.mamba.inner_norms
    return {
        "model_type": "falcon_mamba" if falcon else "mamba",
        "architectures": ["FalconMambaForCausalLM" if falcon else "MambaForCausalLM"],
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
        **({"mixer_rms_eps": mamba.norm_eps} if falcon else {}),
        **shared,
    }


# ------------------------------------------------------------------------------------------ reading


def config_from_json(values: dict[str, Any], where: Path) -> ModelConfig:
    """The model's config from the contents of config.json.

    Raises CheckpointError for another model_type, or a value that a Mamba model cannot have.
    """
    kind = values.get("model_type")
    if kind not in MODEL_TYPES:
        known = ", ".join(map(repr, MODEL_TYPES))
        raise CheckpointError(f"{where} is of model_type {kind!r}; this reader takes {known} and state-spaces folders")
    try:
        if "anymamba" not in values:
            return _from_huggingface(values)
        ours = config_from_dict(ModelConfig, values["anymamba"], "anymamba")
        return ours if _agrees(ours, values) else _from_huggingface(values)
    except KeyError as error:
        raise CheckpointError(f"{where} lacks the key {error}; it is not a complete Mamba config") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _agrees(ours: ModelConfig, values: dict[str, Any]) -> bool:
    """Whether the fields of a `mamba` config still are what our table says; another program may have changed them."""
    if values["model_type"] == "anymamba":
        return True
    written = config_to_json(ours, torch.float32, {}, ours=False)
    fields = set(written) & set(values) - {"anymamba", "architectures", "dtype", "use_cache", *TOKEN_IDS}
    return all(values[field] == written[field] for field in fields)


def _from_huggingface(values: dict[str, Any]) -> ModelConfig:
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act must be 'silu', got {values['hidden_act']!r}")
    d_model, d_inner = values["hidden_size"], values.get("intermediate_size")
    require_at_least("hidden_size", d_model, 1)
    rank = values.get("time_step_rank", "auto")
    falcon = values["model_type"] == "falcon_mamba"
    mamba = MambaOptions(
        d_state=values.get("state_size", 16),
        d_conv=values.get("conv_kernel", 4),
        expand=values.get("expand", 2) if d_inner is None else expansion(d_inner, d_model),
        dt_rank=None if rank == "auto" else rank,
        dt_min=values.get("time_step_min", 0.001),
        dt_max=values.get("time_step_max", 0.1),
        dt_init=values.get("time_step_init_scheme", "random"),
        dt_scale=values.get("time_step_scale", 1.0),
        dt_init_floor=values.get("time_step_floor", 1e-4),
        conv_bias=values.get("use_conv_bias", True),
        bias=values.get("use_bias", False),
        inner_norms=falcon,
        inner_norm_weights=not falcon,
        norm_eps=values.get("mixer_rms_eps", 1e-6) if falcon else MambaOptions.norm_eps,
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


def expansion(d_inner: int, d_model: int) -> float:
    """The ratio of which int(ratio * d_model) is d_inner, in spite of rounding."""
    require_at_least("intermediate_size", d_inner, 1)
    ratio = d_inner / d_model
    return ratio if int(ratio * d_model) == d_inner else math.nextafter(ratio, math.inf)
