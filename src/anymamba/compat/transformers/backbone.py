"""The layers of a `LanguageModel` without its head, with the interface that `transformers` expects of a base model."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from anymamba.compat.transformers.config import AnyMambaConfig
from anymamba.compat.transformers.generating import AnyMambaCache
from anymamba.compat.transformers.packing import LENGTHS, OFFSETS, PackedRow, packed_row
from anymamba.models.language_model import Block, LanguageModel, LanguageModelState

HEAD = "head"
"""The name of the head among the children of a `LanguageModel`."""


@dataclass
class AnyMambaModelOutput(ModelOutput):
    """What `AnyMambaModel` returns."""

    last_hidden_state: Float[Tensor, "batch length d_model"] | None = None
    """The normed output of the last block."""
    cache: AnyMambaCache | None = None
    """The state after the sequence; for a packed batch it has a row for each sequence."""
    hidden_states: tuple[Float[Tensor, "batch length d_model"], ...] | None = None
    """The residual before each block, and the normed output of the last."""
    sequence_starts: Bool[Tensor, "batch length"] | None = None
    """True at the first token of each sequence; None unless rows hold several."""


class AnyMambaPreTrainedModel(PreTrainedModel):
    """The base class of the backbone and of the whole model, which run the layers of one `LanguageModel`.

    Args:
        config: sizes and options.
        language_model: the model that runs the layers.
        children: its table of children, or a view of that table.
    """

    language_model: LanguageModel
    """The model that runs the layers."""

    config_class = AnyMambaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _input_embed_layer = "embedding"

    def __init__(
        self, config: AnyMambaConfig, language_model: LanguageModel, children: MutableMapping[str, nn.Module | None]
    ) -> None:
        language_model.require_causal("has no class of transformers")
        super().__init__(config)
        # The layers are children of this module, under the names of our files. The LanguageModel that runs them uses
        # the same table of children. So when PEFT or a new vocabulary replaces a layer, it is replaced in both.
        self.__dict__["language_model"] = language_model
        self.__dict__["_modules"] = children

    def post_init(self) -> None:
        """Finish the construction as `transformers` does, but keep the weights, which are drawn already."""
        for parameter in self.parameters():  # initialised like our models; parameters on "meta" are loaded later
            parameter._is_hf_initialized = not parameter.is_meta  # type: ignore[attr-defined]
        super().post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise the parameters that were neither drawn nor loaded; `transformers` calls this after loading."""
        missing = [p for p in self.named_parameters() if not getattr(p[1], "_is_hf_initialized", False)]
        if missing and not any(parameter.is_meta for _, parameter in missing):
            drawn = LanguageModel(self.config.to_model_config()).state_dict()
            for name, parameter in missing:
                parameter.copy_(drawn[name])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):  # of a new vocabulary
            nn.init.normal_(module.weight, std=0.02)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Like the method of `PreTrainedModel`; in the new embedding every row is an id of the vocabulary."""
        before = self.config.vocab_size
        embedding = super().resize_token_embeddings(*args, **kwargs)
        if self.config.vocab_size != before:
            self.language_model.config = self.config.to_model_config()
        return embedding

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether backward recomputes each block; `transformers` sets it. It is always non-reentrant."""
        return self.language_model.activation_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.language_model.activation_checkpointing = enable

    def get_decoder(self) -> nn.Module:
        """The backbone."""
        return self.base_model

    def set_decoder(self, decoder: nn.Module) -> None:
        """Raise TypeError: the backbone runs the model's own layers."""
        raise TypeError(
            f"the backbone runs the model's own layers and cannot be set, got {type(decoder).__name__}; replace the "
            "layers by their names, or wrap another LanguageModel"
        )


class AnyMambaModel(AnyMambaPreTrainedModel):
    """A `LanguageModel` without its head, with the interface of `transformers`.

    Args:
        config: sizes and options.
        language_model: a model whose layers this one shares; defaults to a new one.
    """

    def __init__(self, config: AnyMambaConfig, language_model: LanguageModel | None = None) -> None:
        if language_model is None:
            language_model = LanguageModel(config.to_model_config())
            language_model.head = None
        super().__init__(config, language_model, WithoutHead(language_model._modules))
        self._keys_to_ignore_on_load_unexpected = {rf"^{HEAD}\."}  # a folder holds the whole model
        self.post_init()

    @property
    def embed_tokens(self) -> nn.Module:
        """The embedding, under the name that most models of `transformers` use."""
        return self.language_model.embedding

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "batch length d_model"] | None = None,
        cache: AnyMambaCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Int[Tensor, "batch length"] | None = None,
        seq_idx: Int[Tensor, "batch length"] | None = None,
        cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
        **others: Any,
    ) -> tuple[Any, ...] | AnyMambaModelOutput:
        """The normed output of the last block at each position, and optionally the state and the hidden states.

        Args:
            input_ids, inputs_embeds: exactly one of them.
            attention_mask: (batch, length), nonzero at real tokens, padding on any side; it may start with the columns
                of earlier calls.
            cache: the state to continue from; defaults to the beginning.
            use_cache: return the state; defaults to the config's `use_cache`, and to False in training.
            output_hidden_states: return the hidden states; defaults to the config's value.
            return_dict: return an `AnyMambaModelOutput` instead of a tuple; defaults to the config's value.
            position_ids: (batch, length) or (1, length), rising by one in a sequence; a new sequence begins where they
                start again at 0 inside a row. The model counts positions itself.
            seq_idx: (batch, length) or (1, length), the number of the sequence that a token belongs to.
            cu_seqlens: int32 offsets of sequences packed along the length of one row.
            others: FlashAttention's `cu_seq_lens_q` and `cu_seq_lens_k`, which have the meaning of cu_seqlens, with
                `max_length_q` and `max_length_k`, which follow from them; `logits_to_keep`, which is for the head; and
                arguments of other models, which must be None or False.
        Raises ValueError if not exactly one input is given, or if the arguments that describe sequences contradict
            each other, and TypeError for an argument that this model does not have.
        """
        require_one_place(getattr(self, "hf_device_map", {}))
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        offsets = {"cu_seqlens": cu_seqlens, **{name: others.pop(name, None) for name in OFFSETS[1:]}}
        _refuse({name: value for name, value in others.items() if name not in (*LENGTHS, "logits_to_keep")})
        state = None if cache is None else cache.state
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        inputs: Any = input_ids if inputs_embeds is None else inputs_embeds
        mask = _mask_of(attention_mask, inputs, state is not None)
        packed = packed_row(
            inputs,
            mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            offsets=offsets,
            continues=state is not None,
            first=self._first_positions(inputs, state),
        )
        hidden_states: tuple[Tensor, ...] | None = None
        one = inputs_embeds is None and inputs.shape[1] == 1 and mask is None and packed is None
        if one and state is not None and not output_hidden_states and _may_step(self.language_model.blocks):
            x, state = self.language_model.hidden_step(inputs[:, 0], state)
            x = x[:, None]
        else:
            with _inputs_of(self.language_model.blocks if output_hidden_states else ()) as residuals:
                run = self.language_model.hidden if inputs_embeds is None else self.language_model.hidden_of_embedded
                x, state = _run(run, inputs, state, mask, packed)
            if packed is not None:
                residuals = [packed.unpack(residual, *inputs.shape[:2]) for residual in residuals]
            hidden_states = (*residuals, x) if output_hidden_states else None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        after = AnyMambaCache(state) if use_cache else None
        starts = None if packed is None else packed.starts(*inputs.shape[:2])
        output = AnyMambaModelOutput(x, after, hidden_states, starts)
        return (
            output.to_tuple() if (self.config.return_dict if return_dict is None else return_dict) is False else output
        )

    def _first_positions(self, inputs: Tensor, state: LanguageModelState | None) -> Int[Tensor, " batch"] | None:
        """How many tokens each row has seen; None if the model has no table of positions."""
        if not self.language_model.config.has_absolute_positions:
            return None
        if state is None:
            return torch.zeros(inputs.shape[0], dtype=torch.int64, device=inputs.device)
        return state.positions.n_seen


class WithoutHead(MutableMapping[str, Any]):
    """A view of a table of children that leaves out the head; assignments change the table.

    Args:
        table: the children of a `LanguageModel`.
    """

    def __init__(self, table: dict[str, Any]) -> None:
        self.table = table

    def __getitem__(self, name: str) -> Any:
        if name == HEAD:
            raise KeyError(name)
        return self.table[name]

    def __setitem__(self, name: str, module: Any) -> None:
        self.table[name] = module

    def __delitem__(self, name: str) -> None:
        del self.table[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.table if name != HEAD)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def copy(self) -> dict[str, Any]:
        """The children in a new table."""
        return dict(self)


class TiedHead(nn.Module):
    """The head of a model that uses the embedding's weight as its head; it has no parameters.

    Args:
        language_model: a model without a head.
    """

    language_model: LanguageModel
    bias = None

    def __init__(self, language_model: LanguageModel) -> None:
        super().__init__()
        self.__dict__["language_model"] = language_model

    @property
    def weight(self) -> Float[Tensor, "padded_vocab d_model"]:
        """The embedding's."""
        return self.language_model.embedding.weight

    @property
    def in_features(self) -> int:
        """d_model."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of the embedding."""
        return self.weight.shape[0]

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... padded_vocab"]:
        return self.language_model.logits(x)


def _may_step(blocks: Any) -> bool:
    """Whether a step may skip the calls of the blocks: they have no hooks, no replaced forward and no shards."""
    return all(
        type(block) is Block
        and not block._forward_pre_hooks
        and not block._forward_hooks
        and "forward" not in vars(block)
        and not hasattr(type(block.mixer), "unshard")  # FSDP2's shards
        for block in blocks
    )


def _run(
    run: Any, inputs: Tensor, state: LanguageModelState | None, mask: Tensor | None, packed: PackedRow | None
) -> tuple[Float[Tensor, "batch length d_model"], LanguageModelState]:
    if packed is None:
        return run(inputs, state, attention_mask=mask)
    mask = mask if packed.places is None else None
    x, state = run(packed.pack(inputs), state, attention_mask=mask, cu_seqlens=packed.offsets)
    return packed.unpack(x, *inputs.shape[:2]), state


def require_one_place(device_map: dict[str, Any]) -> None:
    """Raise ValueError when a map puts layers in more than one place."""
    places = sorted({str(place) for place in device_map.values()})
    if len(places) > 1:
        raise ValueError(
            f"device_map must put the whole model in one place, got {', '.join(places)}; give a device by its name, "
            'as in device_map="cuda:0"'
        )


def _refuse(others: dict[str, Any]) -> None:
    unknown = sorted(name for name, value in others.items() if value is not None and value is not False)
    if unknown:
        raise TypeError(f"models of anymamba do not take {', '.join(unknown)}; leave these arguments out")


def _mask_of(attention_mask: Tensor | None, inputs: Tensor, continues: bool) -> Tensor | None:
    """The mask of these inputs, without the columns of earlier calls; None if there is no padding."""
    if attention_mask is None:
        return None
    if continues:
        attention_mask = attention_mask[:, -inputs.shape[1] :]
    if not torch.compiler.is_compiling() and bool(attention_mask.all()):
        return None
    return attention_mask


@contextmanager
def _inputs_of(blocks: Any) -> Iterator[list[Tensor]]:
    """A list that collects the residual stream before each block while the context is open."""
    seen: list[Tensor] = []

    def see(_: Any, inputs: tuple[Any, ...]) -> None:
        residual, *_, update = inputs
        seen.append(residual if update is None else residual + update)

    handles = [block.register_forward_pre_hook(see) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
