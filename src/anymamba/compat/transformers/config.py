"""`ModelConfig` as a config of `transformers`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from transformers import PretrainedConfig

from anymamba.base.schema import config_from_dict, config_to_dict
from anymamba.models.config import ModelConfig

DERIVED = ("hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings", "intermediate_size", "state_size")


class AnyMambaConfig(PretrainedConfig):
    """`ModelConfig` as a config of `transformers`.

    Args:
        anymamba: the fields of a `ModelConfig` that differ from its defaults, as a table; see `models/config.py`.
        eos_token_id, bos_token_id, pad_token_id: ids of the tokenizer; default to None.
        use_cache: outside training, `forward` returns the state by default.
        others: arguments that every config of `transformers` takes.
    Raises ValueError or TypeError for fields that a `ModelConfig` cannot have.
    """

    model_type = "anymamba"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Empty, because folders contain no code; TRL reads it from models that are not part of `transformers`."""

    def __init__(
        self,
        anymamba: dict[str, Any] | None = None,
        eos_token_id: int | list[int] | None = None,
        bos_token_id: int | None = None,
        pad_token_id: int | None = None,
        use_cache: bool = True,
        **others: Any,
    ) -> None:
        for name in DERIVED:
            if name in others:
                raise ValueError(f"{name} follows from the table `anymamba` of ModelConfig's fields; change it there")
        self.anymamba = config_to_dict(config_from_dict(ModelConfig, anymamba or {}, "anymamba"))
        self.use_cache = use_cache
        self.eos_token_id, self.bos_token_id, self.pad_token_id = eos_token_id, bos_token_id, pad_token_id
        super().__init__(**others)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> AnyMambaConfig:
        """Like `PretrainedConfig.from_dict`, but a config of another model_type is an error, not a warning."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"this is a model of model_type {kind!r}, whose parameters have other names; load it with "
                "anymamba's LanguageModel.from_pretrained and pass the model to anymamba.compat.transformers.wrap"
            )
        if config_dict.get("weight_formats"):
            raise ValueError(
                "the weights of this model are in blocks of integers, which transformers does not read; load it with "
                "anymamba's LanguageModel.from_pretrained and pass the model to anymamba.compat.transformers.wrap"
            )
        return super().from_dict(config_dict, **kwargs)

    def to_model_config(self) -> ModelConfig:
        """Our own config."""
        return config_from_dict(ModelConfig, self.anymamba, "anymamba")

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding and columns of the logits; those from `ModelConfig.vocab_size` on are padding."""
        return self.to_model_config().padded_vocab_size

    @vocab_size.setter
    def vocab_size(self, rows: int) -> None:
        resized = dataclasses.replace(self.to_model_config(), vocab_size=rows, pad_vocab_multiple=1)
        self.anymamba = config_to_dict(resized)

    @property
    def hidden_size(self) -> int:
        """d_model."""
        return self.to_model_config().d_model

    @property
    def intermediate_size(self) -> int:
        """d_inner."""
        return self.to_model_config().d_inner

    @property
    def state_size(self) -> int:
        """d_state."""
        return self.to_model_config().mamba.d_state

    @property
    def num_hidden_layers(self) -> int:
        """n_layers."""
        return self.to_model_config().n_layers

    @property
    def tie_word_embeddings(self) -> bool:
        """tie_embeddings."""
        return self.to_model_config().tie_embeddings
