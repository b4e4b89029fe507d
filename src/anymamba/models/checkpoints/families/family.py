"""A family of models in the file formats: how its config, parameter names and tensors are written and read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

from anymamba.base.sizes import require_at_least
from anymamba.models.config import ModelConfig

Format = Literal["hf", "state-spaces", "gguf", "anymamba"]


class Spelling(ABC):
    """One family of models in one format.

    `values` are the contents of a config.json, or the metadata of a GGUF file. To the metadata two keys are added that
    come from the tensors: `vocab_size` and `tie_embeddings`.
    """

    kind: str
    """The family's name in files: the model_type in a config.json, the architecture in a GGUF file."""
    own_version: int | None = None
    """The newest format version if the format is our own, else None."""

    @abstractmethod
    def matches(self, values: Mapping[str, Any]) -> bool:
        """Whether a file is of this family and format."""

    @abstractmethod
    def foreign_options(self, config: ModelConfig) -> list[str]:
        """Options of a config that this spelling cannot hold, as "name=value"; empty if it can hold the model."""

    @abstractmethod
    def to_fields(self, config: ModelConfig) -> dict[str, Any]:
        """The fields that describe a config."""

    @abstractmethod
    def from_fields(self, values: Mapping[str, Any]) -> ModelConfig:
        """The config that the fields describe.

        Raises KeyError for a field that is missing, TypeError or ValueError for a value that the family does not have.
        """

    @abstractmethod
    def name(self, ours: str) -> str:
        """The name in the file of one of our parameters. Raises KeyError if it has none."""

    @property
    def tied_head(self) -> str | None:
        """The name under which a file may hold the embedding a second time, if the head shares its weight."""
        return None

    def aliases(self, key: str) -> tuple[str, ...]:
        """All names under which a file may hold the tensor that `name` calls `key`."""
        return (key,)

    def encode(self, name: str, tensor: Tensor) -> Tensor:
        """Turn one of our parameters into the tensor that the file holds."""
        return tensor

    def decode(self, name: str, tensor: Tensor, where: str) -> Tensor:
        """The inverse of `encode`, up to dimensions of size 1. Raises CheckpointError for impossible values."""
        return tensor

    def shape(self, name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Our shape of a parameter that a file holds in the shape `stored`.

        A convolution filter in the file may have an extra dimension of size 1, as in torch's convolutions.
        """
        is_filter = name.endswith("conv.weight") and len(stored) == 3 and stored[1] == 1
        return (stored[0], stored[2]) if is_filter else stored


class Family(NamedTuple):
    """A family of models in every format that can hold it."""

    name: str
    spellings: Mapping[Format, Spelling]


def expansion(d_inner: int, d_model: int) -> float:
    """A ratio for which int(ratio * d_model) is exactly d_inner in spite of rounding."""
    require_at_least("intermediate_size", d_inner, 1)
    ratio = d_inner / d_model
    return ratio if int(ratio * d_model) == d_inner else math.nextafter(ratio, math.inf)
