"""What a family of models tells the file formats: its config, its names and its tensors, both ways."""

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

    `values` are the contents of a config.json, or the metadata of a GGUF file. The latter have two keys more, which the
    tensors decide: `vocab_size` and `tie_embeddings`.
    """

    kind: str
    """What files call the family: the model_type of a config.json, the architecture of a GGUF file."""
    own_version: int | None = None
    """The newest format version, where the format is our own."""

    @abstractmethod
    def matches(self, values: Mapping[str, Any]) -> bool:
        """Whether a file is of this family and format."""

    @abstractmethod
    def foreign_options(self, config: ModelConfig) -> list[str]:
        """Options of a config that this spelling cannot hold, by name and value; empty where it can hold the model."""

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
        """The file's name of one of our parameters. Raises KeyError where it has none."""

    @property
    def tied_head(self) -> str | None:
        """The name under which a file may hold the embedding once more where the head shares its weight."""
        return None

    def aliases(self, key: str) -> tuple[str, ...]:
        """All names under which a file may hold the tensor that `name` calls `key`."""
        return (key,)

    def encode(self, name: str, tensor: Tensor) -> Tensor:
        """One of our parameters as the file holds it."""
        return tensor

    def decode(self, name: str, tensor: Tensor, where: str) -> Tensor:
        """The inverse of `encode`, up to dimensions of size 1. Raises CheckpointError for impossible values."""
        return tensor

    def shape(self, name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Our shape of a parameter that a file holds in the shape `stored`.

        A filter may have the dimension of one input channel that torch's convolutions have.
        """
        is_filter = name.endswith("conv.weight") and len(stored) == 3 and stored[1] == 1
        return (stored[0], stored[2]) if is_filter else stored


class Family(NamedTuple):
    """A family of models in every format that can hold it."""

    name: str
    spellings: Mapping[Format, Spelling]


def expansion(d_inner: int, d_model: int) -> float:
    """The ratio of which int(ratio * d_model) is d_inner, in spite of rounding."""
    require_at_least("intermediate_size", d_inner, 1)
    ratio = d_inner / d_model
    return ratio if int(ratio * d_model) == d_inner else math.nextafter(ratio, math.inf)
