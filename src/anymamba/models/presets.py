"""Named sizes of language models.

The sizes are from arXiv:2312.00752, tables 3 and 12, and for H3 from arXiv:2212.14052; the small ones are for CPUs. A
layer of a Transformer is two blocks here, attention and MLP; a Mamba of the same size has the same number of blocks.
"""

from __future__ import annotations

from dataclasses import replace

from anymamba.models.config import ModelConfig
from anymamba.parts.options import AttentionOptions, H3Options, MLPOptions

SIZES = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "760m": (24, 1536, 16),
    "1.3b": (24, 2048, 32),
}
"""Layers, d_model and attention heads."""

DNA_COMPLEMENT = (0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11)
"""The complements of the ids of `DnaTokenizer`: A 7 and T 10, C 8 and G 9."""


def transformer(n_layers: int, d_model: int, n_heads: int, vocab_size: int = 50277) -> ModelConfig:
    """The Transformer of GPT-3's shapes: learned positions, LayerNorm, GELU, biases everywhere."""
    return ModelConfig(
        d_model=d_model,
        n_layers=2 * n_layers,
        vocab_size=vocab_size,
        norm="layernorm",
        mixers=("attention", "mlp"),
        weight_std=0.02,
        attention=AttentionOptions(n_heads=n_heads, positions="absolute", bias=True),
        mlp=MLPOptions(kind="gelu"),
    )


def transformer_plus_plus(n_layers: int, d_model: int, n_heads: int, vocab_size: int = 50277) -> ModelConfig:
    """Transformer++: rotary positions, RMSNorm, SwiGLU, no biases."""
    return ModelConfig(
        d_model=d_model,
        n_layers=2 * n_layers,
        vocab_size=vocab_size,
        mixers=("attention", "mlp"),
        weight_std=0.02,
        attention=AttentionOptions(n_heads=n_heads, positions="rotary"),
        mlp=MLPOptions(kind="swiglu"),
    )


def h3(n_layers: int, d_model: int, n_heads: int, attention_at: tuple[int, ...] = ()) -> ModelConfig:
    """H3 with S4D and an MLP in each layer; Hybrid-H3 if attention replaces H3 in the layers `attention_at`."""
    return ModelConfig(
        d_model=d_model,
        n_layers=2 * n_layers,
        norm="layernorm",
        mixers=("h3-s4d", "mlp"),
        attention_layers=tuple(2 * layer for layer in attention_at),
        weight_std=0.02,
        attention=AttentionOptions(n_heads=n_heads, positions="none", bias=True),
        mlp=MLPOptions(kind="gelu"),
    )


def h3_plus_plus(n_layers: int, d_model: int) -> ModelConfig:
    """H3++: 1.5 times as many layers, MLPs with expansion 2, heads of 8, RMSNorm, no linear biases."""
    return ModelConfig(
        d_model=d_model,
        n_layers=2 * (n_layers * 3 // 2),
        mixers=("h3-s4d", "mlp"),
        weight_std=0.02,
        h3=H3Options(d_head=8, bias=False),
        mlp=MLPOptions(kind="gelu", d_hidden=2 * d_model, bias=False),
    )


def spread(n_blocks: int, n_attention: int) -> tuple[int, ...]:
    """Indices of n_attention attention blocks among n_blocks: evenly spread, neither first nor last."""
    return tuple(round((i + 1) * n_blocks / (n_attention + 1)) for i in range(n_attention))


def dna(n_layers: int, d_model: int) -> ModelConfig:
    """Mamba over the ids of `DnaTokenizer`, which are padded to 16 (arXiv:2312.00752, appendix E.3.1)."""
    return ModelConfig(d_model=d_model, n_layers=n_layers, vocab_size=12, pad_vocab_multiple=16)


def caduceus(n_layers: int, d_model: int, *, both_strands: bool) -> ModelConfig:
    """Caduceus (arXiv:2403.03234) over the ids of `DnaTokenizer`: bidirectional Mamba, with shared strands or one."""
    return ModelConfig(
        d_model=d_model,
        n_layers=n_layers,
        vocab_size=12,
        pad_vocab_multiple=16,
        mixers=("bimamba",),
        complement=DNA_COMPLEMENT if both_strands else (),
    )


MAMBA: dict[str, ModelConfig] = {
    "nano": ModelConfig(d_model=64, n_layers=2, vocab_size=257),
    "tiny": ModelConfig(d_model=128, n_layers=4, vocab_size=257),
    "small": ModelConfig(d_model=256, n_layers=6, vocab_size=257),
    "medium": ModelConfig(d_model=512, n_layers=12, vocab_size=257),
    "mamba-130m": ModelConfig(d_model=768, n_layers=24),
    "mamba-370m": ModelConfig(d_model=1024, n_layers=48),
    "mamba-790m": ModelConfig(d_model=1536, n_layers=48),
    "mamba-1.4b": ModelConfig(d_model=2048, n_layers=48),
    "mamba-2.8b": ModelConfig(d_model=2560, n_layers=64),
}

PRESETS: dict[str, ModelConfig] = {
    **MAMBA,
    **{f"transformer-{name}": transformer(*size) for name, size in SIZES.items()},
    **{f"transformer++-{name}": transformer_plus_plus(*size) for name, size in SIZES.items()},
    **{f"h3-{name}": h3(*size) for name, size in SIZES.items()},
    **{f"hybrid-h3-{name}": h3(*size, attention_at=(size[0] // 2,)) for name, size in SIZES.items()},
    **{f"h3++-{name}": h3_plus_plus(*size[:2]) for name, size in SIZES.items()},
    "dna-1.4m": dna(12, 128),
    "dna-7.0m": dna(16, 256),
    "dna-40.7m": dna(24, 512),
    "caduceus-ps-1.9m": caduceus(4, 256, both_strands=True),
    "caduceus-ps-7.7m": caduceus(16, 256, both_strands=True),
    "caduceus-ph-7.7m": caduceus(16, 256, both_strands=False),
    # about one block in ten is attention (arXiv:2405.21060, table 2), or every second one is an MLP
    "mamba-attention-130m": replace(MAMBA["mamba-130m"], attention_layers=spread(24, 2)),
    "mamba-mlp-130m": replace(MAMBA["mamba-130m"], mixers=("mamba", "mlp")),
}


def preset(name: str) -> ModelConfig:
    """The configuration of a preset; upper and lower case are the same.

    Raises ValueError for an unknown name; the message lists the known ones.
    """
    if name.lower() not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name.lower()]
