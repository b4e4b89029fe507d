"""A `LanguageModel` with the interface of `transformers`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.utils import ModelOutput

from anymamba.compat.transformers.config import AnyMambaConfig
from anymamba.compat.transformers.generating import AnyMambaCache, ExistingIds
from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.models.schema import config_to_dict


@dataclass
class AnyMambaOutput(ModelOutput):
    """What `AnyMambaForCausalLM` returns."""

    loss: Float[Tensor, ""] | None = None
    """In nats a label; absent without labels."""
    logits: Float[Tensor, "batch length padded_vocab"] | None = None
    cache: AnyMambaCache | None = None
    """The state after the sequence."""
    hidden_states: tuple[Float[Tensor, "batch length d_model"], ...] | None = None
    """The residual before each block, and the normed output of the last."""


class AnyMambaForCausalLM(PreTrainedModel, GenerationMixin):
    """A `LanguageModel` with the interface of `transformers`.

    Where `Trainer` is to decay weights it must be given an optimizer, as `training.optimizer.build_optimizer` makes one
    of `language_model`: its own would decay A_log and D, too.

    Args:
        config: sizes and options.
        language_model: a model whose layers this one shares; absent means a new one.
    """

    language_model: LanguageModel
    """The model that runs the layers."""

    config_class = AnyMambaConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _is_stateful = True
    _input_embed_layer = "embedding"

    def __init__(self, config: AnyMambaConfig, language_model: LanguageModel | None = None) -> None:
        super().__init__(config)
        model = LanguageModel(config.to_model_config()) if language_model is None else language_model
        # The layers are this module's own children, under the names of our files, and the same table of children
        # serves the LanguageModel that runs them: a layer that PEFT or a new vocabulary replaces is replaced in both.
        self.__dict__["language_model"] = model
        self.__dict__["_modules"] = model._modules
        for parameter in self.parameters():  # drawn as our models are; on "meta" they are still to be loaded
            parameter._is_hf_initialized = not parameter.is_meta  # type: ignore[attr-defined]
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "batch length d_model"] | None = None,
        cache: AnyMambaCache | None = None,
        labels: Int[Tensor, "batch length"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Int[Tensor, " positions"] = 0,
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> tuple[Any, ...] | AnyMambaOutput:
        """Logits of the next token at each position, and what else is asked for.

        Args:
            input_ids, inputs_embeds: exactly one of them.
            attention_mask: (batch, length), nonzero at real tokens, padding on any side; columns of earlier calls may
                come before.
            cache: the state to go on from; absent means the beginning.
            labels: like input_ids, not shifted; -100 is not counted.
            use_cache: return the state; absent means the config's `use_cache`, and never in training.
            output_hidden_states: return them; absent means the config's.
            return_dict: an `AnyMambaOutput`, else a tuple of what there is; absent means the config's.
            logits_to_keep: compute logits of that many last positions, or of these positions; 0 means all.
            num_items_in_batch: divide the summed loss by it; absent means by the counted labels.
            others: arguments of other models, which must be None or False.
        Raises ValueError when there is nothing or too much to read, TypeError for what this model has not.
        """
        _refuse({name: value for name, value in others.items() if value is not None and value is not False})
        _require_one_place(getattr(self, "hf_device_map", {}))
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        config, state = self.config, None if cache is None else cache.state
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        mask = _mask_of(attention_mask, input_ids if inputs_embeds is None else inputs_embeds, state is not None)
        hidden_states: tuple[Tensor, ...] | None = None
        token = None if input_ids is None or input_ids.shape[1] != 1 else input_ids[:, 0]
        if token is not None and state is not None and mask is None and not output_hidden_states:
            logits, state = self.language_model.step(token, state)
            logits = logits[:, None]
        else:
            with _inputs_of(self.blocks if output_hidden_states else ()) as residuals:
                x, state = self._hidden(input_ids, inputs_embeds, state, mask)
            hidden_states = (*residuals, x) if output_hidden_states else None
            logits = self.language_model.logits(_positions(x, logits_to_keep))
        loss = None
        if labels is not None:
            size = logits.shape[-1]
            loss = self.loss_function(logits, labels, vocab_size=size, num_items_in_batch=num_items_in_batch)
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        after = AnyMambaCache(state) if use_cache else None
        output = AnyMambaOutput(loss, logits, after, hidden_states)
        return output.to_tuple() if (config.return_dict if return_dict is None else return_dict) is False else output

    def _hidden(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, state: Any, mask: Tensor | None
    ) -> tuple[Tensor, LanguageModelState]:
        model = self.language_model
        if input_ids is not None:
            return model.hidden(input_ids, state, attention_mask=mask)
        assert inputs_embeds is not None  # `forward` has checked it
        return model.hidden_of_embedded(inputs_embeds, state, attention_mask=mask)

    def generate(self, *args: Any, logits_processor: list[LogitsProcessor] | None = None, **kwargs: Any) -> Any:
        """As everywhere in `transformers`; ids that only pad the embedding's rows are never emitted."""
        existing = ExistingIds(self.language_model.config.vocab_size)
        parent: Any = super()
        return parent.generate(
            *args, logits_processor=LogitsProcessorList([*(logits_processor or ()), existing]), **kwargs
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first call makes the state

    # ------------------------------------------------------------------------------------------ weights

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw what is neither drawn nor loaded as a new model draws it; `transformers` asks for it after loading."""
        missing = [p for p in self.named_parameters() if not getattr(p[1], "_is_hf_initialized", False)]
        if missing and not any(parameter.is_meta for _, parameter in missing):
            drawn = LanguageModel(self.config.to_model_config()).state_dict()
            for name, parameter in missing:
                parameter.copy_(drawn[name])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):  # of a new vocabulary
            nn.init.normal_(module.weight, std=0.02)

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where it is the embedding's weight."""
        return self.language_model.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the head.

        Raises ValueError where it is the embedding's weight.
        """
        if self.language_model.head is None:
            raise ValueError("the head is the embedding's weight; use set_input_embeddings, or tie_embeddings=False")
        self.language_model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As everywhere in `transformers`; all rows of the new embedding are ids that exist."""
        before = self.config.vocab_size
        embedding = super().resize_token_embeddings(*args, **kwargs)
        if self.config.vocab_size != before:
            self.language_model.config = self.config.to_model_config()
        return embedding

    # ------------------------------------------------------------------------------------------ training

    @property
    def gradient_checkpointing(self) -> bool:
        """Recompute each block in backward; `transformers` sets it, without re-entrance whatever its options say."""
        return self.language_model.activation_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.language_model.activation_checkpointing = enable

    def _replicate_for_data_parallel(self) -> AnyMambaForCausalLM:
        """A replica whose LanguageModel runs the replica's layers."""
        replica = super()._replicate_for_data_parallel()
        model = self.language_model._replicate_for_data_parallel()
        model.__dict__["_modules"] = replica._modules
        replica.__dict__["language_model"] = model
        return replica


def wrap(language_model: LanguageModel, eos_token_id: int | None = None) -> AnyMambaForCausalLM:
    """A model for the tools of `transformers` that shares the parameters of a `LanguageModel`.

    Args:
        language_model: any that we load or make.
        eos_token_id: ends generation, and stands for the beginning and for padding, too; absent means none.
    What it saves is a folder of model_type "anymamba"; `language_model.save_pretrained` writes the other formats.
    """
    ids = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), eos_token_id)
    dtype = language_model.embedding.weight.dtype
    config = AnyMambaConfig(config_to_dict(language_model.config), dtype=dtype, **ids)
    return AnyMambaForCausalLM(config, language_model)


def _refuse(others: dict[str, Any]) -> None:
    if others:
        raise TypeError(
            f"AnyMambaForCausalLM has no {', '.join(sorted(others))}: it has no attention and no positions, and takes "
            "no such argument"
        )


def _require_one_place(device_map: dict[str, Any]) -> None:
    places = sorted({str(place) for place in device_map.values()})
    if len(places) > 1:
        raise ValueError(
            f"device_map must put the whole model in one place, got {', '.join(places)}; give a device by its name, "
            'as in device_map="cuda:0"'
        )


def _mask_of(attention_mask: Tensor | None, inputs: Tensor | None, continues: bool) -> Tensor | None:
    """The mask of these inputs, without the columns of earlier calls; None where nothing is padding."""
    if attention_mask is None or inputs is None:
        return None
    if continues:
        attention_mask = attention_mask[:, -inputs.shape[1] :]
    if not torch.compiler.is_compiling() and bool(attention_mask.all()):
        return None
    return attention_mask


def _positions(x: Float[Tensor, "batch length d_model"], keep: int | Tensor) -> Tensor:
    """The positions whose logits are wanted: the last `keep` (0: all), or these."""
    if isinstance(keep, Tensor):
        return x[:, keep]
    return x[:, -keep:] if keep else x


@contextmanager
def _inputs_of(blocks: Any) -> Iterator[list[Tensor]]:
    """A list that fills with what goes into each of the blocks."""
    seen: list[Tensor] = []
    handles = [block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
