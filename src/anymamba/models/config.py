"""The configuration of a model: a frozen dataclass. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from anymamba.base.sizes import require_at_least, require_complement, require_positive
from anymamba.parts.options import (
    AttentionOptions,
    GAUOptions,
    H3Options,
    HyenaOptions,
    LinearAttentionOptions,
    MambaOptions,
    MLPOptions,
    RetentionOptions,
    S4DOptions,
    S4Options,
)

NOT_CAUSAL = ("bimamba",)
"""The mixers whose outputs depend on later tokens, too."""


@dataclass(frozen=True)
class ModelConfig:
    """A language model: embedding, pre-norm residual blocks, norm, head."""

    d_model: int = 768
    """Width of the residual stream."""
    n_layers: int = 24
    """Number of residual blocks."""
    vocab_size: int = 50277
    """Number of token ids; taken from the tokenizer if one is given."""
    pad_vocab_multiple: int = 8
    """The number of rows of the embedding is rounded up to a multiple of this; sampling never emits the padding."""
    tie_embeddings: bool = True
    """The head shares the embedding's weight."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Norm before each mixer and before the head."""
    norm_eps: float = 1e-5
    """Epsilon of these norms."""
    residual_in_fp32: bool = True
    """Keep the residual stream in float32 for any dtype of the weights."""
    mixers: tuple[str, ...] = ("mamba",)
    """The name of each block's mixer; a tuple shorter than n_layers repeats. `models/mixers.py` lists the names."""
    attention_layers: tuple[int, ...] = ()
    """Blocks, counted from 0, whose mixer is attention instead of the one in `mixers`."""
    complement: tuple[int, ...] = ()
    """The complement of each token id, for a model of both strands of DNA: the output for a reverse complement is the
    reverse complement of the output. Ids that are not listed are their own complement; () is one strand."""
    weight_std: float | None = None
    """Draw the weights of projections from N(0, weight_std), and divide those of output projections by sqrt(n_layers).
    None: keep each layer's own initialisation."""
    mamba: MambaOptions = field(default_factory=MambaOptions)
    """Options of Mamba, of S6 without Mamba's block, and of Mamba's block with another inner layer."""
    s4: S4Options = field(default_factory=S4Options)
    """Options of S4."""
    s4d: S4DOptions = field(default_factory=S4DOptions)
    """Options of S4D."""
    hyena: HyenaOptions = field(default_factory=HyenaOptions)
    """Options of Hyena and its filter."""
    h3: H3Options = field(default_factory=H3Options)
    """Options of H3."""
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    """Options of attention."""
    mlp: MLPOptions = field(default_factory=MLPOptions)
    """Options of the MLPs."""
    gau: GAUOptions = field(default_factory=GAUOptions)
    """Options of gated attention units."""
    linear_attention: LinearAttentionOptions = field(default_factory=LinearAttentionOptions)
    """Options of linear attention."""
    retention: RetentionOptions = field(default_factory=RetentionOptions)
    """Options of retention."""

    def __post_init__(self) -> None:
        for name, example in (("mixers", '("mamba",)'), ("attention_layers", "(3,)"), ("complement", "(1, 0, 3, 2)")):
            values = getattr(self, name)
            if not isinstance(values, tuple | list):
                raise TypeError(f"{name} must be a tuple, got {values!r}; for example {example}")
            object.__setattr__(self, name, tuple(values))
        for name in ("d_model", "n_layers", "vocab_size", "pad_vocab_multiple"):
            require_at_least(name, getattr(self, name), 1)
        require_positive("norm_eps", self.norm_eps)
        if self.weight_std is not None:
            require_positive("weight_std", self.weight_std)
        beyond = [i for i in self.attention_layers if not 0 <= i < self.n_layers]
        if beyond:
            raise ValueError(f"attention_layers must lie in 0 to n_layers - 1 = {self.n_layers - 1}, got {beyond[0]}")
        require_complement(self.complement, self.vocab_size)
        if not self.mixers:
            raise ValueError('mixers must name at least one mixer, got (); for example ("mamba",)')
        if self.d_inner < 1:
            raise ValueError(
                f"d_inner = int(expand * d_model) must be at least 1, got expand={self.mamba.expand} "
                f"and d_model={self.d_model}; raise either"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head."""
        return math.ceil(self.vocab_size / self.pad_vocab_multiple) * self.pad_vocab_multiple

    @property
    def d_inner(self) -> int:
        """Channels of the scan."""
        return int(self.mamba.expand * self.d_model)

    @property
    def dt_rank(self) -> int:
        """R: rank of the projection to the step dt."""
        return self.mamba.dt_rank or math.ceil(self.d_model / 16)

    @property
    def has_absolute_positions(self) -> bool:
        """Whether a table of positions is added to the embeddings, for all mixers."""
        return self.attention.positions == "absolute"

    @property
    def is_causal(self) -> bool:
        """Whether the output at a token depends on this and earlier tokens only. Other models cannot generate."""
        return not self.complement and not set(NOT_CAUSAL) & set(self.layer_mixers)

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """The mixer's name for each of the n_layers blocks."""
        chosen = set(self.attention_layers)
        return tuple("attention" if i in chosen else self.mixers[i % len(self.mixers)] for i in range(self.n_layers))
