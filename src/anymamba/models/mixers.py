"""The mixers that a config can name, and how each is built from the config.

The name of an inner layer (s4, s4d, hyena-filter, s6) gives a block without a gate around it. The prefix "h3-" or
"mamba-" puts the layer into H3's or Mamba's block, so the paper's tables 1 and 6 are lists of names. "mamba" is Mamba's
block with S6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from anymamba.layers.attention import Attention
from anymamba.layers.bimamba import BiMamba
from anymamba.layers.gau import GAU
from anymamba.layers.h3 import H3
from anymamba.layers.hyena import Hyena, HyenaFilter
from anymamba.layers.linear_attention import LinearAttention
from anymamba.layers.mamba import Mamba, MambaBlock
from anymamba.layers.mlp import MLP
from anymamba.layers.no_gate import NoGate
from anymamba.layers.retnet import Retention
from anymamba.layers.rwkv import RWKVChannelMix, RWKVTimeMix
from anymamba.layers.s4 import S4
from anymamba.layers.s4d import S4D
from anymamba.layers.s6 import S6
from anymamba.models.config import ModelConfig
from anymamba.parts.init import WithoutMetaValues
from anymamba.parts.sequence import SequenceLayer

Like = dict[str, Any]
Builder = Callable[[ModelConfig, int, Like], SequenceLayer]

S6_OPTIONS = (
    *("d_state", "dt_rank", "dt_min", "dt_max", "dt_init_floor", "dt_init", "dt_scale", "b_discretization"),
    *("selective_delta", "selective_B", "selective_C", "A_init"),
)


def options(values: Any, *without: str) -> dict[str, Any]:
    """The fields of an options dataclass as arguments of its layer."""
    return {f.name: getattr(values, f.name) for f in dataclasses.fields(values) if f.name not in without}


INNER: dict[str, Builder] = {
    "s4": lambda config, width, like: S4(width, **options(config.s4), **like),
    "s4d": lambda config, width, like: S4D(width, **options(config.s4d), **like),
    "hyena-filter": lambda config, width, like: HyenaFilter(width, **options(config.hyena, "order"), **like),
    "s6": lambda config, width, like: S6(width, **{n: getattr(config.mamba, n) for n in S6_OPTIONS}, **like),
}
"""Builders of inner layers, from the config and the number of channels."""


def _no_gate(name: str) -> Builder:
    return lambda config, _, like: NoGate(config.d_model, lambda width: INNER[name](config, width, like), **like)


def _h3(name: str) -> Builder:
    def build(config: ModelConfig, _: int, like: Like) -> SequenceLayer:
        if config.d_model % config.h3.d_head:
            raise ValueError(
                f"d_model must be a multiple of h3.d_head, got {config.d_model} and {config.h3.d_head}; change either"
            )
        inner = INNER[name](config, config.d_model // config.h3.d_head, like)
        return H3(config.d_model, inner, **options(config.h3), **like)

    return build


def _mamba(name: str) -> Builder:
    def build(config: ModelConfig, _: int, like: Like) -> SequenceLayer:
        shared = {n: getattr(config.mamba, n) for n in ("d_conv", "expand", "conv_bias", "bias")}
        return MambaBlock(config.d_model, lambda width: INNER[name](config, width, like), **shared, **like)

    return build


def _attention(config: ModelConfig, _: int, like: Like) -> SequenceLayer:
    arguments = options(config.attention, "max_positions", "positions")
    absolute = config.attention.positions == "absolute"  # those are the model's, added to the embeddings
    positions = "none" if absolute else config.attention.positions
    return Attention(config.d_model, positions=positions, **arguments, **like)


def _among_its_like(config: ModelConfig, index: int) -> dict[str, int]:
    """A block's index among the blocks with the same mixer, and their number.

    A layer of RWKV is two blocks, a time mix and a channel mix, so block indices do not count its layers.
    """
    names = config.layer_mixers
    return {"layer": names[:index].count(names[index]), "n_layers": max(1, names.count(names[index]))}


MIXERS: dict[str, Builder] = {
    "mamba": lambda config, _, like: Mamba(config.d_model, **options(config.mamba), **like),
    **{name: _no_gate(name) for name in INNER},
    **{f"h3-{name}": _h3(name) for name in INNER},
    **{f"mamba-{name}": _mamba(name) for name in INNER if name != "s6"},
    "attention": _attention,
    "mlp": lambda config, _, like: MLP(config.d_model, **options(config.mlp), **like),
    "hyena": lambda config, _, like: Hyena(config.d_model, **options(config.hyena), **like),
    "gau": lambda config, _, like: GAU(config.d_model, **options(config.gau), **like),
    "linear-attention": lambda config, _, like: LinearAttention(
        config.d_model, **options(config.linear_attention), **like
    ),
    "retention": lambda config, _, like: Retention(config.d_model, **options(config.retention), **like),
    "rwkv": lambda config, i, like: RWKVTimeMix(config.d_model, **_among_its_like(config, i), **like),
    "rwkv-channel": lambda config, i, like: RWKVChannelMix(config.d_model, **_among_its_like(config, i), **like),
}
"""Builders of causal mixers, from the config and the block's index."""

BIDIRECTIONAL: dict[str, Builder] = {"bimamba": lambda config, _, like: BiMamba(config.d_model, config.mamba, **like)}
"""Builders of mixers that read in both directions; `NOT_CAUSAL` of the config lists their names."""


def growing_mixers(config: ModelConfig) -> tuple[str, ...]:
    """The names of a config's mixers whose state grows with the sequence."""
    names = config.layer_mixers
    like: Like = {"device": "meta", "dtype": None}
    with WithoutMetaValues():
        return tuple(name for name in sorted(set(names)) if build_mixer(name, config, names.index(name), like).grows)


def build_mixer(name: str, config: ModelConfig, index: int, like: Like) -> SequenceLayer:
    """The mixer of block `index`.

    Raises ValueError for a name that does not exist.
    """
    if name == "mamba-s6":
        raise ValueError("unknown mixer 'mamba-s6' in mixers; Mamba's block with S6 is \"mamba\"")
    known = MIXERS | BIDIRECTIONAL
    if name not in known:
        raise ValueError(f"unknown mixer {name!r} in mixers; the mixers are {', '.join(known)}")
    return known[name](config, index, like)
