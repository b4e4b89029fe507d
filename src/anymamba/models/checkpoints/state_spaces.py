"""config.json of the original format, that of the `mamba_ssm` package: no model_type, its own names, ssm_cfg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anymamba.base.errors import CheckpointError
from anymamba.base.schema import unknown_key
from anymamba.models.checkpoints.huggingface import foreign_mamba_options
from anymamba.models.config import ModelConfig
from anymamba.models.options import MambaOptions

NORM_EPS = 1e-5  # written in that package's code, in no config

SSM_OPTIONS = ("d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor")
SSM_BIASES = ("conv_bias", "bias")
IGNORED = ("layer", "use_fast_path")


def is_state_spaces(values: dict[str, Any]) -> bool:
    """Whether the contents of a config.json are of this format."""
    return "model_type" not in values and {"d_model", "n_layer"} <= set(values)


def foreign_options(config: ModelConfig) -> list[str]:
    """Options of a config that this format has no field for."""
    options = foreign_mamba_options(config)
    if config.mamba.inner_norms:
        options.append("inner_norms=True")
    if config.norm_eps != NORM_EPS:
        options.append(f"norm_eps={config.norm_eps!r} (it is {NORM_EPS} there)")
    return options


def representable(config: ModelConfig) -> ModelConfig:
    """The same config; raises CheckpointError, naming the options, where this format cannot hold it."""
    options = foreign_options(config)
    if options:
        raise CheckpointError(f"the format state-spaces cannot hold this model: {', '.join(options)}")
    return config


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The contents of config.json."""
    plain = MambaOptions()
    ssm = {name: getattr(config.mamba, name) for name in (*SSM_OPTIONS, *SSM_BIASES)}
    return {
        "d_model": config.d_model,
        "d_intermediate": 0,
        "n_layer": config.n_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {name: value for name, value in ssm.items() if value != getattr(plain, name)},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": config.norm == "rmsnorm",
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config.pad_vocab_multiple,
        "tie_embeddings": config.tie_embeddings,
    }


def config_from_json(values: dict[str, Any], where: Path) -> ModelConfig:
    """The model's config from the contents of config.json.

    Raises CheckpointError for what a Mamba (S6) model cannot have, naming the field.
    """
    try:
        return _from_json(values)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _from_json(values: dict[str, Any]) -> ModelConfig:
    for name in ("attn_layer_idx", "d_intermediate"):
        if values.get(name):
            raise ValueError(f"{name}={values[name]!r} asks for layers that are no Mamba; this reader has none")
    ssm = values.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise TypeError(f"ssm_cfg must be a table, got {ssm!r}")
    if ssm.get("layer", "Mamba1") != "Mamba1":
        raise ValueError(f"ssm_cfg.layer must be 'Mamba1', got {ssm['layer']!r}")
    known = [*SSM_OPTIONS, *SSM_BIASES, *IGNORED]
    for key in ssm:
        if key not in known:
            raise ValueError(unknown_key(key, known, "ssm_cfg"))
    options = {name: value for name, value in ssm.items() if name not in IGNORED}
    if options.get("dt_rank") == "auto":
        del options["dt_rank"]
    return ModelConfig(
        d_model=values["d_model"],
        n_layers=values["n_layer"],
        vocab_size=values.get("vocab_size", 50277),
        pad_vocab_multiple=values.get("pad_vocab_size_multiple", 8),
        tie_embeddings=values.get("tie_embeddings", True),
        norm="rmsnorm" if values.get("rms_norm", True) else "layernorm",
        norm_eps=NORM_EPS,
        residual_in_fp32=values.get("residual_in_fp32", True),
        mamba=MambaOptions(**options),
    )
