"""A language model: embedding, pre-norm residual blocks, norm, head. The state is an argument and a result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from anymamba.layers.positions import LearnedPositions
from anymamba.models.config import ModelConfig
from anymamba.models.mixers import build_mixer
from anymamba.ops.groups import is_spread, one_sequence
from anymamba.ops.linear_cross_entropy import linear_cross_entropy
from anymamba.ops.linear_cross_entropy.chunks import sum_over_chunks
from anymamba.ops.recomputing import recomputed
from anymamba.parts.bare import is_bare
from anymamba.parts.embedding import embed
from anymamba.parts.init import WithoutMetaValues
from anymamba.parts.norm import build_norm, norm_of_sum
from anymamba.parts.parameters import WideParameters, without_decay
from anymamba.parts.recipes import recomputing
from anymamba.parts.state import as_wanted_now
from anymamba.parts.strands import (
    both_masks,
    both_offsets,
    both_strands,
    complement_table,
    head_weight,
    side_by_side,
)

if TYPE_CHECKING:
    from anymamba.data.tokenizer import Tokenizer
    from anymamba.models.inference import InferenceModel
    from anymamba.models.weight_formats import Weights


class LanguageModelState(NamedTuple):
    """State of all blocks. The state of a recurrent block has a size that does not depend on the number of tokens."""

    layers: tuple[Any, ...]
    positions: Any = ()
    """The number of tokens that each row has read, in models with a table of positions; else None."""


class LanguageModelOutput(NamedTuple):
    """What `forward` and `step` return."""

    logits: Float[Tensor, "batch ... padded_vocab"]
    """Columns of vocab_size and above are padding that sampling must never emit."""
    state: LanguageModelState


class LossOutput(NamedTuple):
    """What `loss` returns."""

    loss: Float[Tensor, ""]
    """Sum of -log p over the counted labels, in nats."""
    n_tokens: Int[Tensor, ""]
    """Number of labels counted."""
    state: LanguageModelState


class Block(nn.Module):
    """residual + mixer(norm(residual)); the residual stays in float32 if the config says so.

    The output of a block's mixer is added to the residual by the next block, whose norm reads the sum: one pass over
    memory instead of two.
    """

    def __init__(self, config: ModelConfig, index: int, like: dict[str, Any]) -> None:
        super().__init__()
        self.norm = build_norm(config.norm, config.d_model, config.norm_eps, **like)
        self.mixer: Any = build_mixer(config.layer_mixers[index], config, index, like)

    def forward(
        self,
        residual: Float[Tensor, "batch length d_model"],
        state: Any,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        update: Float[Tensor, "batch length d_model"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], Float[Tensor, "batch length d_model"], Any]:
        """residual + update, what the mixer makes of it, and the mixer's state.

        Args:
            residual: the stream without what the last block's mixer gave.
            update: that; None for nothing.
            Others as in the mixer.
        """
        projected = getattr(self.mixer, "projects_input", False)
        with recomputing(residual):
            x, residual = norm_of_sum(self.norm, update, residual, projected)
            y, state = self.mixer(x, state, attention_mask=attention_mask, cu_seqlens=cu_seqlens)
        return residual, y, state

    def step(
        self, residual: Float[Tensor, "batch d_model"], state: Any, update: Float[Tensor, "batch d_model"] | None = None
    ) -> tuple[Float[Tensor, "batch d_model"], Float[Tensor, "batch d_model"], Any]:
        """`forward` of one token per row."""
        x, residual = norm_of_sum(self.norm, update, residual)
        y, state = self.mixer.step(x, state)
        return residual, y, state


class LanguageModel(nn.Module):
    """A causal language model over token ids.

    Args:
        config: sizes and options.
        device: where the parameters live; "meta" creates them without memory, and `reset_parameters` fills them later.
        dtype: of the weights; A_log, D and the step's bias stay float32 or wider.
    """

    def __init__(self, config: ModelConfig, device=None, dtype=None) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        """Recompute the activations of each block in backward instead of keeping them."""
        with WithoutMetaValues():
            self._build({"device": device, "dtype": dtype})
            self._init_language_model()

    def _build(self, like: dict[str, Any]) -> None:
        config = self.config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model, **like)
        self.positions = (
            LearnedPositions(config.attention.max_positions, config.d_model, **like)
            if config.has_absolute_positions
            else None
        )
        self.blocks: Any = nn.ModuleList(Block(config, index, like) for index in range(config.n_layers))
        self.norm = build_norm(config.norm, config.d_model, config.norm_eps, **like)
        self.head = (
            None if config.tie_embeddings else nn.Linear(config.d_model, config.padded_vocab_size, bias=False, **like)
        )

    @torch.no_grad()
    def _init_language_model(self) -> None:
        """Change the layers' own initialisation where a model needs another.

        The embedding is N(0, 0.02) and biases of projections are 0. The output projections are drawn again and divided
        by sqrt(n_layers), so that the residual's variance does not grow with depth (one addition per block). With
        `weight_std` all projections are normal.
        """
        nn.init.normal_(self.embedding.weight, std=0.02)
        for name, module in self._projections():
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            is_output = name.endswith("out_proj")
            if self.config.weight_std is not None and not name.endswith("dt_proj"):
                nn.init.normal_(module.weight, std=self.config.weight_std)
            elif is_output:
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if is_output:
                module.weight.div_(math.sqrt(self.config.n_layers))

    def _projections(self) -> Iterator[tuple[str, nn.Linear]]:
        """Linear modules by name. Those that make kernels or that start at zero keep their values and are left out."""
        own = {m for wide in self.modules() if isinstance(wide, WideParameters) for m in wide.modules()}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and module not in own and not getattr(module, "starts_at_zero", False):
                yield name, module

    def reset_parameters(self) -> None:
        """Draw all parameters again; call it after `to_empty` for a model that was made on the meta device."""
        self.embedding.reset_parameters()
        if self.positions is not None:
            self.positions.reset_parameters()
        for block in self.blocks:
            block.norm.reset_parameters()
            block.mixer.reset_parameters()
        self.norm.reset_parameters()
        if self.head is not None:
            self.head.reset_parameters()
        self._init_language_model()

    # --------------------------------------------------------------------------------------------- running

    @property
    def grows(self) -> bool:
        """Whether the state of any layer grows with the sequence."""
        return any(block.mixer.grows for block in self.blocks)

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> LanguageModelState:
        """The state before the first token of each of `batch` sequences.

        Raises ValueError if the model is not causal.
        """
        self.require_causal("has no state")
        layers = tuple(block.mixer.init_state(batch, dtype) for block in self.blocks)
        return LanguageModelState(layers, () if self.positions is None else self.positions.init_state(batch, dtype))

    def hidden(
        self,
        input_ids: Int[Tensor, "batch length"],
        state: LanguageModelState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], LanguageModelState]:
        """The normed output of the last block, and the state.

        A model of both strands returns (batch, length, 2 d_model): the given strand, and the other at its positions.
        """
        return self._normed_ids(input_ids, state, attention_mask, cu_seqlens, projected=False)

    def hidden_of_embedded(
        self,
        embedded: Float[Tensor, "batch length d_model"],
        state: LanguageModelState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], LanguageModelState]:
        """`hidden` for vectors in place of the tokens' embeddings; of one strand, in any model."""
        return self._normed(embedded, state, attention_mask, cu_seqlens, projected=False)

    def _normed_ids(
        self,
        input_ids: Int[Tensor, "batch length"],
        state: LanguageModelState | None,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        projected: bool,
    ) -> tuple[Float[Tensor, "batch length width"], LanguageModelState]:
        """`hidden`, and `projected` as in `norm_of_sum`."""
        if state is not None:
            self.require_causal("has no state")
        if is_spread():
            self.require_causal("cannot run on parts of sequences")
        rows = self.embed_strands(input_ids)
        if not self.config.complement:
            return self._normed(rows, state, attention_mask, cu_seqlens, projected)
        if cu_seqlens is None:
            x, _ = self._normed(rows, None, both_masks(attention_mask), None, projected)
        else:
            packed, offsets = rows.reshape(1, -1, rows.shape[-1]), both_offsets(cu_seqlens)
            x = self._normed(packed, None, None, offsets, projected)[0].reshape(rows.shape)
        return side_by_side(x), LanguageModelState(())

    def embed_strands(self, input_ids: Int[Tensor, "batch length"]) -> Float[Tensor, "rows length d_model"]:
        """The tokens' embeddings. For a model of both strands those of the reverse complements are further rows."""
        _require_ids(input_ids, 2, "(batch, length)")
        if self.config.complement:
            input_ids = both_strands(input_ids, self._complement(input_ids.device))
        return embed(self.embedding, input_ids)

    def _complement(self, device: torch.device) -> Int[Tensor, " padded_vocab"]:
        return complement_table(self.config.complement, self.config.padded_vocab_size, device)

    def require_causal(self, what: str) -> None:
        """Raise ValueError, saying `what` the model lacks, if it is not causal."""
        if not self.config.is_causal:
            reads = "both strands" if self.config.complement else "sequences in both directions"
            raise ValueError(
                f"a model that reads {reads} {what} and cannot generate; give it whole sequences, or use a causal model"
            )

    def _normed(
        self,
        embedded: Float[Tensor, "batch length d_model"],
        state: LanguageModelState | None,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        projected: bool,
    ) -> tuple[Float[Tensor, "batch length d_model"], LanguageModelState]:
        """`hidden_of_embedded`, and `projected` as in `norm_of_sum`."""
        where: Any = ()
        with one_sequence(embedded.shape[1]):
            if self.positions is not None:
                before = None if state is None else state.positions
                embedded, where = self.positions(embedded, before, attention_mask=attention_mask, cu_seqlens=cu_seqlens)
            residual, update = self._residual(embedded), None
            states = []
            for i, block in enumerate(self.blocks):
                if self.activation_checkpointing and update is not None:
                    residual, update = residual + update, None  # one tensor to keep instead of two
                inputs = (residual, None if state is None else state.layers[i], attention_mask, cu_seqlens, update)
                if self.activation_checkpointing:
                    residual, update, new = recomputed(as_wanted_now(block), *inputs)
                else:
                    residual, update, new = block(*inputs)
                states.append(new)
        x, _ = norm_of_sum(self.norm, update, residual, projected)
        return x, LanguageModelState(tuple(states), where)

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"],
        state: LanguageModelState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_last_logits: int | None = None,
    ) -> LanguageModelOutput:
        """Logits of the next token at each position, and the state after the sequence.

        Args:
            input_ids: (batch, length).
            state: one row per sequence; defaults to the state before the first token.
            attention_mask: (batch, length), true at real tokens; padding on either side changes neither the logits of
                real tokens nor the state.
            cu_seqlens: int32 offsets of sequences packed along the length of one row.
            num_last_logits: compute the logits of this many last positions only; defaults to all.
        """
        x, state = self.hidden(input_ids, state, attention_mask=attention_mask, cu_seqlens=cu_seqlens)
        if num_last_logits is not None:
            if num_last_logits < 0:
                raise ValueError(f"num_last_logits must be at least 0, got {num_last_logits}")
            x = x[:, max(0, x.shape[1] - num_last_logits) :]
        return LanguageModelOutput(self.logits(x), state)

    def step(self, token_ids: Int[Tensor, " batch"], state: LanguageModelState) -> LanguageModelOutput:
        """One token per row: logits (batch, padded_vocab) and the new state, in constant time."""
        x, state = self.hidden_step(token_ids, state)
        return LanguageModelOutput(self.logits(x), state)

    def hidden_step(
        self, token_ids: Int[Tensor, " batch"], state: LanguageModelState
    ) -> tuple[Float[Tensor, "batch d_model"], LanguageModelState]:
        """`hidden` of one token per row. Raises ValueError if the model is not causal."""
        self.require_causal("has no step")
        _require_ids(token_ids, 1, "(batch,)")
        if not isinstance(state, LanguageModelState):
            raise TypeError(
                f"step needs a LanguageModelState, got {type(state).__name__}; begin with init_state(batch)"
            )
        embedded, where = embed(self.embedding, token_ids), state.positions
        if self.positions is not None:
            embedded, where = self.positions.step(embedded, where)
        residual, update = self._residual(embedded), None
        states = []
        for block, layer_state in zip(self.blocks, state.layers, strict=True):
            residual, update, new = block.step(residual, layer_state, update)
            states.append(new)
        x, _ = norm_of_sum(self.norm, update, residual)
        return x, LanguageModelState(tuple(states), where)

    def loss(
        self,
        input_ids: Int[Tensor, "batch length"],
        labels: Int[Tensor, "batch length"],
        state: LanguageModelState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> LossOutput:
        """Cross-entropy of the labels, summed in nats. Logits are computed in chunks, so they never fill memory.

        Args:
            labels: (batch, length), the token after each position; -100 is not counted.
            Others as in `forward`.
        """
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels must be like input_ids {tuple(input_ids.shape)}, got {tuple(labels.shape)}")
        x, state = self._normed_ids(input_ids, state, attention_mask, cu_seqlens, projected=True)
        loss = self._summed_loss(x.flatten(0, 1), labels.flatten().long())
        return LossOutput(loss, (labels != -100).sum(), state)

    def _summed_loss(self, x: Float[Tensor, "tokens width"], labels: Int[Tensor, " tokens"]) -> Tensor:
        head = self.embedding if self.head is None else self.head
        if self.head is None or (is_bare(head, nn.Linear) and self.head.bias is None):
            weight = head.weight
            if self.config.complement:
                weight = head_weight(weight, self._complement(x.device))
            return linear_cross_entropy(x, weight, labels)
        # an adapter, say, or a quantised layer
        return sum_over_chunks(self._cross_entropy, x, labels, self.config.padded_vocab_size)

    def _residual(self, embedded: Tensor) -> Tensor:
        wide = torch.promote_types(embedded.dtype, torch.float32)
        return embedded.to(wide) if self.config.residual_in_fp32 else embedded

    def logits(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... padded_vocab"]:
        """Apply the head to the output of `hidden`."""
        if not self.config.complement:
            return self._head(x)
        given, other = x.chunk(2, dim=-1)
        return self._head(given) + self._head(other).index_select(-1, self._complement(x.device))

    def _head(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... padded_vocab"]:
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)

    def _cross_entropy(self, x: Float[Tensor, "tokens d_model"], labels: Int[Tensor, " tokens"]) -> Tensor:
        logits = self.logits(x)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), labels, ignore_index=-100, reduction="sum")

    # --------------------------------------------------------------------------------------------- parameters

    def n_parameters(self) -> int:
        """The number of parameters; a tied weight counts once."""
        return sum(p.numel() for p in self.parameters())

    def no_decay_parameter_names(self) -> set[str]:
        """Names of parameters that get no weight decay: those of the SSM, all biases, all norms."""
        exempt = without_decay(self)
        return {name for name, parameter in self.named_parameters() if parameter in exempt}

    # --------------------------------------------------------------------------------------------- inference

    def for_inference(
        self,
        weights: Weights = "float32",
        *,
        device: torch.device | str | None = None,
        invariant: bool = False,
    ) -> InferenceModel:
        """A copy of the model with packed weights, which reads and generates faster and in less memory.

        To run a saved model, `InferenceModel.from_pretrained` is better: it uses weights as they lie in the file.

        Args:
            weights: "float32", "bfloat16", "int8" or "int4"; `models/weight_formats.py` says which tensors take which
                format.
            device: where the copy goes; defaults to where the model is.
            invariant: make a row's logits the same bits alone and in any batch, read whole, in pieces, or token by
                token. Only on a CPU, for models whose blocks are all Mamba.
        Raises ValueError for another name, for a device that cannot run the format, and for invariance of a model that
        does not have it.
        """
        from anymamba.models.inference import InferenceModel

        return InferenceModel.of(self, weights, device=device, invariant=invariant)

    # --------------------------------------------------------------------------------------------- files

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device=None,
        dtype=None,
        revision: str | None = None,
        *,
        verify: bool = True,
        adapter: str | Path | None = None,
    ) -> LanguageModel:
        """Load a published or a saved model, or a checkpoint in the folder of a run.

        Args:
            path: a folder in Hugging Face's format (`mamba`, `falcon_mamba`) or the original `state-spaces` one, a
                .gguf file, or a name on the Hugging Face hub.
            dtype: of the weights; defaults to that of the file.
            revision: of a repository on the hub.
            verify: compare the files with the digests or checksums that they have. This reads them once more.
            adapter: a LoRA adapter in PEFT's format, a folder or a name on the hub, that is merged into the weights.
        Raises FileNotFoundError if there is no such model, CheckpointError if its files are broken, have changed since
            they were saved, or are of another kind of model.
        """
        from anymamba.models.checkpoints import load_pretrained

        return load_pretrained(path, device=device, dtype=dtype, revision=revision, verify=verify, adapter=adapter)

    def save_pretrained(
        self,
        path: str | Path,
        tokenizer: Tokenizer | None = None,
        *,
        format: Literal["hf", "state-spaces", "gguf", "anymamba"] | None = None,
    ) -> None:
        """Write a model folder (or a .gguf file), each file atomically; with the tokenizer's file if given.

        Args:
            format: defaults to Hugging Face's if its readers compute the same function, else to our own.
        Raises CheckpointError, which names the options, if the format cannot hold the model.
        """
        from anymamba.models.checkpoints import save_pretrained

        save_pretrained(self, path, tokenizer, format=format)


def _require_ids(ids: Tensor, ndim: int, words: str) -> None:
    if ids.ndim != ndim:
        raise ValueError(f"token ids must be {words}, got shape {tuple(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"token ids must be integers, got {ids.dtype}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"token ids must be int64 or int32, got {ids.dtype}; convert them with .long()")
