"""Named sizes of language models. The published ones are of arXiv:2312.00752, table 3; the others are for CPUs."""

from __future__ import annotations

from anymamba.models.config import ModelConfig

PRESETS: dict[str, ModelConfig] = {
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


def preset(name: str) -> ModelConfig:
    """The configuration of a preset.

    Raises ValueError for an unknown name, naming those that exist.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
