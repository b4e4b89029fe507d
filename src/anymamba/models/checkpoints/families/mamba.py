"""Mamba (S6): Hugging Face's `mamba`, the original format of the `mamba_ssm` package, and llama.cpp's `mamba`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anymamba.base.errors import CheckpointError
from anymamba.base.schema import unknown_key
from anymamba.base.sizes import require_at_least
from anymamba.models.checkpoints.families.family import Family, Spelling, expansion
from anymamba.models.config import ModelConfig
from anymamba.parts.options import MambaOptions

PLAIN = MambaOptions()

LAYER_NAMES = {
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
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
"""Our names inside a block, and those of Hugging Face and the original format."""
HUGGINGFACE_TOP = {
    "embedding.weight": "backbone.embeddings.weight",
    "norm.weight": "backbone.norm_f.weight",
    "norm.bias": "backbone.norm_f.bias",
    "head.weight": "lm_head.weight",
}
ORIGINAL_TOP = HUGGINGFACE_TOP | {"embedding.weight": "backbone.embedding.weight"}
GGUF_LAYER = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv.weight": "ssm_conv1d.weight",
    "mixer.conv.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.ssm.delta_bias": "ssm_dt.bias",
    "mixer.ssm.A_log": "ssm_a",
    "mixer.ssm.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}
GGUF_TOP = {
    "embedding.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}


def foreign_everywhere(config: ModelConfig) -> list[str]:
    """Options that no published format of Mamba has a field for."""
    ours = config.mamba
    names = ("b_discretization", "selective_delta", "selective_B", "selective_C", "output_norm")
    options = [f"{name}={getattr(ours, name)!r}" for name in names if getattr(ours, name) != getattr(PLAIN, name)]
    if ours.is_complex:
        options.append("A_init='s4d-lin' (complex A)")
    if set(config.layer_mixers) != {"mamba"}:
        options.append(f"mixers={config.mixers!r}")
    if config.has_absolute_positions:
        options.append("positions='absolute'")
    if config.complement:
        options.append("complement (both strands of DNA)")
    return options


class _Mamba(Spelling):
    """What all formats of Mamba share."""

    top: Mapping[str, str] = HUGGINGFACE_TOP
    layer: Mapping[str, str] = LAYER_NAMES
    layers = "backbone.layers"

    @property
    def tied_head(self) -> str:
        return self.top["head.weight"]

    def foreign_options(self, config: ModelConfig) -> list[str]:
        return foreign_everywhere(config) + self._inner_norm_options(config) + self._other_options(config)

    def _inner_norm_options(self, config: ModelConfig) -> list[str]:
        return ["inner_norms=True"] if config.mamba.inner_norms else []

    @abstractmethod
    def _other_options(self, config: ModelConfig) -> list[str]:
        """Options that this format cannot hold, though other formats of Mamba can."""

    def name(self, ours: str) -> str:
        if ours in self.top:
            return self.top[ours]
        _, index, rest = ours.split(".", 2)
        return f"{self.layers}.{index}.{self.layer[rest]}"

    def encode(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[:, None] if name.endswith("conv.weight") else tensor


# ------------------------------------------------------------------------------------------ Hugging Face


HUGGINGFACE_OPTIONS = {
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_init_scheme": "dt_init",
    "time_step_scale": "dt_scale",
    "time_step_floor": "dt_init_floor",
    "use_bias": "bias",
    "use_conv_bias": "conv_bias",
}
"""Fields that mean the same as our options, with the same defaults."""


class MambaFolder(_Mamba):
    """A folder that Hugging Face's `mamba` reads."""

    kind = "mamba"
    architecture = "MambaForCausalLM"

    def matches(self, values: Mapping[str, Any]) -> bool:
        return values.get("model_type") == self.kind

    def _other_options(self, config: ModelConfig) -> list[str]:
        options = []
        if config.mamba.expand != int(config.mamba.expand):
            options.append(f"expand={config.mamba.expand!r} (not an integer)")
        if config.norm != "rmsnorm":
            options.append(f"norm={config.norm!r}")
        return options

    def to_fields(self, config: ModelConfig) -> dict[str, Any]:
        mamba = config.mamba
        return {
            "model_type": self.kind,
            "architectures": [self.architecture],
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layers,
            "vocab_size": config.padded_vocab_size,
            "state_size": mamba.d_state,
            "conv_kernel": mamba.d_conv,
            "expand": int(mamba.expand),
            "intermediate_size": config.d_inner,
            "time_step_rank": config.dt_rank,
            **{theirs: getattr(mamba, ours) for theirs, ours in HUGGINGFACE_OPTIONS.items()},
            "residual_in_fp32": config.residual_in_fp32,
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            "hidden_act": "silu",
            "rescale_prenorm_residual": False,  # if true, transformers divides the loaded weights again
            "initializer_range": 0.02,
            "use_cache": True,
        }

    def from_fields(self, values: Mapping[str, Any]) -> ModelConfig:
        if values.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act must be 'silu', got {values['hidden_act']!r}")
        require_at_least("hidden_size", values["hidden_size"], 1)
        return ModelConfig(
            d_model=values["hidden_size"],
            n_layers=values["num_hidden_layers"],
            vocab_size=values["vocab_size"],
            pad_vocab_multiple=1,
            tie_embeddings=values.get("tie_word_embeddings", True),
            norm_eps=values.get("layer_norm_epsilon", 1e-5),
            residual_in_fp32=values.get("residual_in_fp32", True),
            mamba=self._mamba_options(values),
        )

    def _mamba_options(self, values: Mapping[str, Any]) -> MambaOptions:
        d_inner, rank = values.get("intermediate_size"), values.get("time_step_rank", "auto")
        return MambaOptions(
            d_state=values.get("state_size", 16),
            d_conv=values.get("conv_kernel", 4),
            expand=values.get("expand", 2) if d_inner is None else expansion(d_inner, values["hidden_size"]),
            dt_rank=None if rank == "auto" else rank,
            **{ours: values[theirs] for theirs, ours in HUGGINGFACE_OPTIONS.items() if theirs in values},
        )

    def aliases(self, key: str) -> tuple[str, ...]:
        """Also an older name of the embedding, and the names in a model without a head; Hugging Face reads both."""
        return key, key.replace("backbone.embeddings.", "backbone.embedding."), key.removeprefix("backbone.")


# ------------------------------------------------------------------------------------------ the original format

NORM_EPS = 1e-5  # a constant in the code of mamba_ssm; configs do not have it
SSM_OPTIONS = ("d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor")
SSM_BIASES = ("conv_bias", "bias")
IGNORED = ("layer", "use_fast_path")


class OriginalMamba(_Mamba):
    """A folder of the `mamba_ssm` package, as state-spaces publishes it: no model_type, other names, ssm_cfg."""

    kind = "state-spaces"
    top = ORIGINAL_TOP

    def matches(self, values: Mapping[str, Any]) -> bool:
        return "model_type" not in values and {"d_model", "n_layer"} <= set(values)

    def _other_options(self, config: ModelConfig) -> list[str]:
        return [f"norm_eps={config.norm_eps!r} (always {NORM_EPS})"] if config.norm_eps != NORM_EPS else []

    def to_fields(self, config: ModelConfig) -> dict[str, Any]:
        ssm = {name: getattr(config.mamba, name) for name in (*SSM_OPTIONS, *SSM_BIASES)}
        return {
            "d_model": config.d_model,
            "d_intermediate": 0,
            "n_layer": config.n_layers,
            "vocab_size": config.vocab_size,
            "ssm_cfg": {name: value for name, value in ssm.items() if value != getattr(PLAIN, name)},
            "attn_layer_idx": [],
            "attn_cfg": {},
            "rms_norm": config.norm == "rmsnorm",
            "residual_in_fp32": config.residual_in_fp32,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": config.pad_vocab_multiple,
            "tie_embeddings": config.tie_embeddings,
        }

    def from_fields(self, values: Mapping[str, Any]) -> ModelConfig:
        for name in ("attn_layer_idx", "d_intermediate"):
            if values.get(name):
                raise ValueError(
                    f"{name}={values[name]!r} asks for layers other than Mamba, which this reader does not support"
                )
        return ModelConfig(
            d_model=values["d_model"],
            n_layers=values["n_layer"],
            vocab_size=values.get("vocab_size", 50277),
            pad_vocab_multiple=values.get("pad_vocab_size_multiple", 8),
            tie_embeddings=values.get("tie_embeddings", True),
            norm="rmsnorm" if values.get("rms_norm", True) else "layernorm",
            norm_eps=NORM_EPS,
            residual_in_fp32=values.get("residual_in_fp32", True),
            mamba=self._mamba_options(values.get("ssm_cfg") or {}),
        )

    def _mamba_options(self, ssm: Any) -> MambaOptions:
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
        return MambaOptions(**options)


# ------------------------------------------------------------------------------------------ GGUF

CONTEXT_LENGTH = 1 << 20  # llama.cpp requires a number; the model has no limit
EPSILON, DT_B_C_RMS = "mamba.attention.layer_norm_rms_epsilon", "mamba.ssm.dt_b_c_rms"


class MambaGGUF(_Mamba):
    """A file of llama.cpp's architecture `mamba`. It holds A = -exp(A_log), and filters as (d_inner, d_conv)."""

    kind = "mamba"
    top, layer, layers = GGUF_TOP, GGUF_LAYER, "blk"

    def matches(self, values: Mapping[str, Any]) -> bool:
        return values.get("general.architecture") == self.kind and not values.get(DT_B_C_RMS, False)

    def _other_options(self, config: ModelConfig) -> list[str]:
        options, mamba = [], config.mamba
        if config.norm != "rmsnorm":
            options.append(f"norm={config.norm!r}")
        if config.d_inner != 2 * config.d_model:
            options.append(f"expand={mamba.expand!r} (always 2)")
        if mamba.bias:
            options.append("bias=True")
        if not mamba.conv_bias:
            options.append("conv_bias=False")
        return options

    def to_fields(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "mamba.context_length": CONTEXT_LENGTH,
            "mamba.embedding_length": config.d_model,
            "mamba.feed_forward_length": 0,
            "mamba.attention.head_count": 0,
            "mamba.block_count": config.n_layers,
            "mamba.vocab_size": config.padded_vocab_size,
            "mamba.ssm.conv_kernel": config.mamba.d_conv,
            "mamba.ssm.inner_size": config.d_inner,
            "mamba.ssm.state_size": config.mamba.d_state,
            "mamba.ssm.time_step_rank": config.dt_rank,
            DT_B_C_RMS: False,
            EPSILON: config.norm_eps,
        }

    def from_fields(self, values: Mapping[str, Any]) -> ModelConfig:
        require_at_least("mamba.embedding_length", values["mamba.embedding_length"], 1)
        return ModelConfig(
            d_model=values["mamba.embedding_length"],
            norm_eps=values[EPSILON],
            vocab_size=values["vocab_size"],
            pad_vocab_multiple=1,
            tie_embeddings=values["tie_embeddings"],
            n_layers=values["mamba.block_count"],
            mamba=self._mamba_options(values),
        )

    def _mamba_options(self, values: Mapping[str, Any]) -> MambaOptions:
        return MambaOptions(
            d_state=values["mamba.ssm.state_size"],
            d_conv=values["mamba.ssm.conv_kernel"],
            expand=expansion(values["mamba.ssm.inner_size"], values["mamba.embedding_length"]),
            dt_rank=values["mamba.ssm.time_step_rank"],
        )

    def encode(self, name: str, tensor: Tensor) -> Tensor:
        return -torch.exp(tensor.double()) if name.endswith("A_log") else tensor

    def decode(self, name: str, tensor: Tensor, where: str) -> Tensor:
        """Also computes A_log in float32, exact to half a unit in the last place of exp(A_log) or of A_log."""
        if not name.endswith("A_log"):
            return tensor
        if not bool((tensor <= 0).all()):
            raise CheckpointError(f"{where} must be -exp(A_log), below 0; got up to {tensor.max().item():.4g}")
        return torch.log(-tensor.double()).float()


ORIGINAL = OriginalMamba()
MAMBA = Family("mamba", {"hf": MambaFolder(), "state-spaces": ORIGINAL, "gguf": MambaGGUF()})
