"""Our own format, for every model that this package can build: its whole config, with our own parameter names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anymamba.base.errors import FORMAT_VERSION
from anymamba.base.schema import config_from_dict
from anymamba.models.checkpoints.families.family import Family, Spelling
from anymamba.models.config import ModelConfig

TABLE = "anymamba"
"""The key of our own config in a config.json. Files that we write for other programs have it, too."""


class OwnFolder(Spelling):
    """A folder with a config.json of model_type `anymamba`."""

    kind = "anymamba"
    own_version = 2  # that of a folder with weights in blocks; others are written as version 1

    def matches(self, values: Mapping[str, Any]) -> bool:
        return values.get("model_type") == self.kind

    def foreign_options(self, config: ModelConfig) -> list[str]:
        return []

    def to_fields(self, config: ModelConfig) -> dict[str, Any]:
        return {"model_type": self.kind, FORMAT_VERSION: 1}

    def from_fields(self, values: Mapping[str, Any]) -> ModelConfig:
        return config_from_dict(ModelConfig, values[TABLE], TABLE)

    def name(self, ours: str) -> str:
        return ours


ANYMAMBA = Family("anymamba", {"anymamba": OwnFolder()})
