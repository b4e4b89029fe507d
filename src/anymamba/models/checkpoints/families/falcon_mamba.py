"""FalconMamba: Mamba with RMS norms, without weights, on dt, B and C."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from anymamba.models.checkpoints.families.family import Family
from anymamba.models.checkpoints.families.mamba import DT_B_C_RMS, EPSILON, MambaFolder, MambaGGUF
from anymamba.models.config import ModelConfig
from anymamba.parts.options import MambaOptions

HF_EPS = 1e-6  # Hugging Face's default epsilon of the inner norms


def _norm_options(config: ModelConfig) -> list[str]:
    """The options of a config whose inner norms are not FalconMamba's."""
    if not config.mamba.inner_norms:
        return ["inner_norms=False"]
    return ["inner_norms=True (with weights)"] if config.mamba.inner_norm_weights else []


class FalconMambaFolder(MambaFolder):
    """A folder that Hugging Face's `falcon_mamba` reads."""

    kind = "falcon_mamba"
    architecture = "FalconMambaForCausalLM"

    def _inner_norm_options(self, config: ModelConfig) -> list[str]:
        return _norm_options(config)

    def to_fields(self, config: ModelConfig) -> dict[str, Any]:
        return super().to_fields(config) | {"mixer_rms_eps": config.mamba.norm_eps}

    def _mamba_options(self, values: Mapping[str, Any]) -> MambaOptions:
        eps = values.get("mixer_rms_eps", HF_EPS)
        plain = super()._mamba_options(values)
        return dataclasses.replace(plain, inner_norms=True, inner_norm_weights=False, norm_eps=eps)


class FalconMambaGGUF(MambaGGUF):
    """A file of llama.cpp's architecture `mamba` with inner norms. They share the epsilon of the other norms."""

    def matches(self, values: Mapping[str, Any]) -> bool:
        return values.get("general.architecture") == self.kind and bool(values.get(DT_B_C_RMS, False))

    def _inner_norm_options(self, config: ModelConfig) -> list[str]:
        mamba = config.mamba
        options = _norm_options(config)
        if not options and mamba.norm_eps != config.norm_eps:
            options.append(
                f"mamba.norm_eps={mamba.norm_eps!r} with norm_eps={config.norm_eps!r} (there is one for all norms)"
            )
        return options

    def to_fields(self, config: ModelConfig) -> dict[str, Any]:
        return super().to_fields(config) | {DT_B_C_RMS: True}

    def _mamba_options(self, values: Mapping[str, Any]) -> MambaOptions:
        plain = super()._mamba_options(values)
        return dataclasses.replace(plain, inner_norms=True, inner_norm_weights=False, norm_eps=values[EPSILON])


FALCON_MAMBA = Family("falcon_mamba", {"hf": FalconMambaFolder(), "gguf": FalconMambaGGUF()})
