"""A `LanguageModel` with the interface of `transformers`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.utils import ModelOutput

from anymamba.base.schema import config_to_dict
from anymamba.compat.transformers.backbone import (
    AnyMambaModel,
    AnyMambaPreTrainedModel,
    TiedHead,
    WithoutHead,
    require_one_place,
)
from anymamba.compat.transformers.config import AnyMambaConfig
from anymamba.compat.transformers.generating import AnyMambaCache, ExistingIds
from anymamba.models.language_model import LanguageModel

FOR_GENERATE = ("tokenizer", "assistant_tokenizer")
"""Arguments that `generate` uses itself and also passes on to the model."""


@dataclass
class AnyMambaOutput(ModelOutput):
    """What `AnyMambaForCausalLM` returns."""

    loss: Float[Tensor, ""] | None = None
    """In nats per label; None without labels."""
    logits: Float[Tensor, "batch length padded_vocab"] | None = None
    cache: AnyMambaCache | None = None
    """The state after the sequence."""
    hidden_states: tuple[Float[Tensor, "batch length d_model"], ...] | None = None
    """The residual before each block, and the normed output of the last."""


class AnyMambaForCausalLM(AnyMambaPreTrainedModel, GenerationMixin):
    """A `LanguageModel` with the interface of `transformers`.

    Its backbone is `model` (`base_model`, `get_decoder()`), its head `lm_head` (`get_output_embeddings()`). Parameters
    keep our names: for PEFT the embedding is `embedding`, and an untied head is `head`.

    To use weight decay with `Trainer`, pass it the optimizer that `training.optimizer.build_optimizer` makes for
    `language_model`. The default optimizer of `Trainer` would also decay A_log and D.

    Args:
        config: sizes and options.
        language_model: a model whose layers this one shares; defaults to a new one.
    """

    model: AnyMambaModel
    """The layers without the head."""
    _tied_head: TiedHead

    accepts_loss_kwargs = True

    def __init__(self, config: AnyMambaConfig, language_model: LanguageModel | None = None) -> None:
        if language_model is None:
            language_model = LanguageModel(config.to_model_config())
        super().__init__(config, language_model, language_model._modules)
        # They share the layers, so they must not be children of this module.
        self.__dict__.update(model=AnyMambaModel(config, language_model), _tied_head=TiedHead(language_model))
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
        position_ids: Int[Tensor, "batch length"] | None = None,
        seq_idx: Int[Tensor, "batch length"] | None = None,
        cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
        **others: Any,
    ) -> tuple[Any, ...] | AnyMambaOutput:
        """Logits of the next token at each position, and optionally the loss, the state and the hidden states.

        Args:
            labels: like input_ids, not shifted; -100 and the first token of a sequence are not counted.
            return_dict: return an `AnyMambaOutput` instead of a tuple; defaults to the config's value.
            logits_to_keep: compute logits of that many last positions, or of these positions; 0 means all.
            num_items_in_batch: divide the summed loss by it; defaults to the number of counted labels.
            Others as in `AnyMambaModel.forward`.
        Raises ValueError if not exactly one input is given, or if the arguments that describe sequences contradict
            each other, and TypeError for an argument that this model does not have.
        """
        require_one_place(getattr(self, "hf_device_map", {}))
        hidden = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            position_ids=position_ids,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            **others,
        )
        logits = self.lm_head(_positions(hidden.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            if hidden.sequence_starts is not None:  # the token before it belongs to another sequence
                labels = labels.masked_fill(hidden.sequence_starts.to(labels.device), -100)
            size = logits.shape[-1]
            loss = self.loss_function(logits, labels, vocab_size=size, num_items_in_batch=num_items_in_batch)
        output = AnyMambaOutput(loss, logits, hidden.cache, hidden.hidden_states)
        return (
            output.to_tuple() if (self.config.return_dict if return_dict is None else return_dict) is False else output
        )

    def train(self, mode: bool = True) -> AnyMambaForCausalLM:
        """Set the mode of the layers and of the modules that run them."""
        super().train(mode)
        for module in (self.model, self.language_model, self._tied_head):
            module.training = mode
        return self

    # ------------------------------------------------------------------------------------------ generation

    def generate(self, *args: Any, logits_processor: list[LogitsProcessor] | None = None, **kwargs: Any) -> Any:
        """Like `GenerationMixin.generate`; ids of padding rows of the embedding are never emitted."""
        existing = ExistingIds(self.language_model.config.vocab_size)
        parent: Any = super()
        return parent.generate(
            *args, logits_processor=LogitsProcessorList([*(logits_processor or ()), existing]), **kwargs
        )

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` inspects its signature
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        parent: Any = super()
        return parent.prepare_inputs_for_generation(
            *args, **{name: value for name, value in kwargs.items() if name not in FOR_GENERATE}
        )

    def _prepare_position_ids_for_generation(self, *args: Any) -> None:
        """None: the model counts positions itself."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first call creates the state

    # ------------------------------------------------------------------------------------------ the head

    @property
    def lm_head(self) -> Any:
        """The head; for a tied model, a module without parameters that uses the embedding's weight."""
        head = self.language_model.head
        return self._tied_head if head is None else head

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "lm_head":  # nn.Module would register it as a child and bypass the property
            self.set_output_embeddings(value)
        else:
            super().__setattr__(name, value)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Every module by its name, including the tied head, so that code that looks for a head finds it."""
        unseen = False
        for pair in super().named_modules(memo, prefix, remove_duplicate):
            unseen = True
            yield pair
        if unseen and self.language_model.head is None:
            yield f"{prefix}.lm_head" if prefix else "lm_head", self._tied_head

    def get_output_embeddings(self) -> nn.Module:
        """The head; if they are tied, its `weight` is the embedding's."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the head.

        Raises ValueError if the head is the embedding's weight.
        """
        if self.language_model.head is not None:
            self.language_model.head = new_embeddings
        elif new_embeddings is not self._tied_head:
            raise ValueError(
                "the head is the embedding's weight and cannot be set or trained separately; set or train the "
                "embedding, or make the model with tie_embeddings=False"
            )

    def _get_resized_lm_head(self, old_lm_head: Any, *args: Any, **kwargs: Any) -> Any:
        if old_lm_head is self._tied_head:  # it has the size of the embedding
            return old_lm_head
        return super()._get_resized_lm_head(old_lm_head, *args, **kwargs)

    def _replicate_for_data_parallel(self) -> AnyMambaForCausalLM:
        """A replica whose LanguageModel runs the replica's layers."""
        replica = super()._replicate_for_data_parallel()
        model = self.language_model._replicate_for_data_parallel()
        model.__dict__["_modules"] = replica._modules
        backbone = self.model._replicate_for_data_parallel()
        backbone.__dict__.update(language_model=model, _modules=WithoutHead(replica._modules))
        replica.__dict__.update(language_model=model, model=backbone, _tied_head=TiedHead(model))
        return replica


def wrap(language_model: LanguageModel, eos_token_id: int | None = None) -> AnyMambaForCausalLM:
    """A model for the tools of `transformers` that shares the parameters of a `LanguageModel`.

    Args:
        language_model: any `LanguageModel`.
        eos_token_id: ends generation, and is also the id for the beginning and for padding; defaults to None.
    The model saves folders of model_type "anymamba"; `language_model.save_pretrained` writes the other formats.
    """
    ids = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), eos_token_id)
    dtype = language_model.embedding.weight.dtype
    config = AnyMambaConfig(config_to_dict(language_model.config), dtype=dtype, **ids)
    return AnyMambaForCausalLM(config, language_model)


def _positions(x: Float[Tensor, "batch length d_model"], keep: int | Tensor) -> Tensor:
    """The positions whose logits are computed: the last `keep` (0 means all), or those that `keep` lists."""
    if isinstance(keep, Tensor):
        return x[:, keep]
    return x[:, -keep:] if keep else x
