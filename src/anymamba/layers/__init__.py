"""All layers; each is imported on first use."""

from typing import TYPE_CHECKING

from anymamba.base import lazy_names

__all__ = [
    "GAU",
    "H3",
    "MLP",
    "S4",
    "S4D",
    "S6",
    "Attention",
    "BiMamba",
    "Hyena",
    "HyenaFilter",
    "LayerNorm",
    "LearnedPositions",
    "LinearAttention",
    "Mamba",
    "MambaBlock",
    "NoGate",
    "RMSNorm",
    "RWKVChannelMix",
    "RWKVTimeMix",
    "Retention",
    "SequenceLayer",
    "SharedStrands",
    "ShortConvolution",
    "StrandEmbedding",
    "StrandHead",
]

_HOMES = {
    "Attention": "anymamba.layers.attention",
    "BiMamba": "anymamba.layers.bimamba",
    "GAU": "anymamba.layers.gau",
    "H3": "anymamba.layers.h3",
    "Hyena": "anymamba.layers.hyena",
    "HyenaFilter": "anymamba.layers.hyena",
    "LayerNorm": "anymamba.parts.norm",
    "LearnedPositions": "anymamba.layers.positions",
    "LinearAttention": "anymamba.layers.linear_attention",
    "MLP": "anymamba.layers.mlp",
    "Mamba": "anymamba.layers.mamba",
    "MambaBlock": "anymamba.layers.mamba",
    "NoGate": "anymamba.layers.no_gate",
    "RMSNorm": "anymamba.parts.norm",
    "RWKVChannelMix": "anymamba.layers.rwkv",
    "RWKVTimeMix": "anymamba.layers.rwkv",
    "Retention": "anymamba.layers.retnet",
    "S4": "anymamba.layers.s4",
    "S4D": "anymamba.layers.s4d",
    "S6": "anymamba.layers.s6",
    "SequenceLayer": "anymamba.parts.sequence",
    "SharedStrands": "anymamba.layers.strands",
    "ShortConvolution": "anymamba.parts.conv",
    "StrandEmbedding": "anymamba.layers.strands",
    "StrandHead": "anymamba.layers.strands",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)

if TYPE_CHECKING:
    from anymamba.layers.attention import Attention
    from anymamba.layers.bimamba import BiMamba
    from anymamba.layers.gau import GAU
    from anymamba.layers.h3 import H3
    from anymamba.layers.hyena import Hyena, HyenaFilter
    from anymamba.layers.linear_attention import LinearAttention
    from anymamba.layers.mamba import Mamba, MambaBlock
    from anymamba.layers.mlp import MLP
    from anymamba.layers.no_gate import NoGate
    from anymamba.layers.positions import LearnedPositions
    from anymamba.layers.retnet import Retention
    from anymamba.layers.rwkv import RWKVChannelMix, RWKVTimeMix
    from anymamba.layers.s4 import S4
    from anymamba.layers.s4d import S4D
    from anymamba.layers.s6 import S6
    from anymamba.layers.strands import SharedStrands, StrandEmbedding, StrandHead
    from anymamba.parts.conv import ShortConvolution
    from anymamba.parts.norm import LayerNorm, RMSNorm
    from anymamba.parts.sequence import SequenceLayer
